"""What pydantic finds wrong with a recipe, said in one sentence: the key, its value, the remedy."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_LONGEST = 60  # characters of a value that are shown

_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": 'a text, in quotes ("…")',
    "string_unicode": "a text in UTF-8",
}
# Of pydantic's errors of range: the name of the bound, and how it is said.
BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def quote(value: Any) -> str:
    """``repr`` of a value on one line, cut where it is long."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, tables within tables
        return "a very large value"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def one_sentence(error: ValidationError, schema: type[BaseModel]) -> str:
    """The most telling of the errors: an unknown key first, since it is often why another key is missing."""
    details = error.errors(include_url=False)
    chosen = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    rest = len(details) - 1
    more = f" (and {rest} more {'problem' if rest == 1 else 'problems'})" if rest else ""
    return " ".join(_say(chosen, schema).split()) + more


def _say(detail: ErrorDetails, schema: type[BaseModel]) -> str:
    kind, value = detail["type"], detail["input"]
    key = ".".join(plain(part) for part in detail["loc"])
    context = detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return f"{key}={quote(value)} is not a key of a recipe: {_suggest(detail['loc'], schema)}"
    if kind == "missing":
        return f"{key} is missing and has no default: set {key}"
    if kind in BOUNDS:
        bound, words = BOUNDS[kind]
        return f"{key}={quote(value)} is out of range: set {key} to {words} {context[bound]:g}"
    if kind == "literal_error":
        return f"{key}={quote(value)} is not one of its values: set {key} to {context['expected']}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key or 'recipe'}={quote(value)} is not a table: write its keys under [{key or 'model'}]"
    if kind == "string_pattern_mismatch":
        return (
            f"{key}={quote(value)} is not a name: set {key} to lower-case letters, digits, '.', '_' and '-', "
            "with a letter or digit first"
        )
    wanted = _KINDS.get(kind)
    if wanted:
        return f"{key}={quote(value)} is not {wanted}: set {key} to {wanted}{_range(detail['loc'], schema)}"
    return f"{key}={quote(value)} cannot be used: {detail['msg']}"


def plain(part: int | str) -> str:
    """A key as it is written in a sentence: bare where it can be."""
    text = str(part)
    return text if text.isprintable() and len(text) <= _LONGEST and text.strip() == text != "" else quote(text)


def _tables(schema: type[BaseModel]) -> dict[str, list[str]]:
    """Keys of each table; the empty name stands for the top level."""
    tables = {"": list(schema.model_fields)}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            tables[name] = list(field.annotation.model_fields)
    return tables


def _suggest(loc: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """The nearest key of the same table, the same key of another table, or all the keys there are."""
    tables = _tables(schema)
    table, key = (str(loc[0]), str(loc[-1])) if len(loc) > 1 else ("", str(loc[0]))
    keys = tables.get(table, [])
    elsewhere = [name for name, others in tables.items() if name and name != table and key in others]
    if elsewhere:
        return f"did you mean {elsewhere[0]}.{key}"
    near = get_close_matches(key, keys, n=1)
    if near:
        return f"did you mean {f'{table}.' if table else ''}{near[0]}"
    return f"{f'[{table}]' if table else 'a recipe'} has the keys {', '.join(keys)}"


def _range(loc: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """Bounds of the field at ``loc``, in words, where it has any."""
    field: Any = None
    for part in loc:
        fields = getattr(schema, "model_fields", {})
        field = fields.get(part)
        if field is None:
            return ""
        schema = field.annotation
    found = [
        f"{text} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, text in BOUNDS.values()
        if getattr(rule, name, None) is not None and math.isfinite(getattr(rule, name))
    ]
    return f", {' and '.join(found)}" if found else ""
