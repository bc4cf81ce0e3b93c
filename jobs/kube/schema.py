"""Checks a manifest's spec against KubeRay's own schema, with keys that it does not know refused.

An API server drops such a key without a word, and the job then runs without what was meant. schema.json is what
``compact_schema.py`` makes of KubeRay's CRDs. The structural schemas of CRDs use a small part of JSON Schema, so the
check is written out here: it names the key and the nearest one that exists.
"""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from shoal.jobs.recipe_errors import plain, quote
from shoal.workers.errors import InvalidInput

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float), "object": (dict,), "array": (list,)
}  # fmt: skip
_WORDS = {"string": "a text", "boolean": "true or false", "integer": "a whole number", "number": "a number",
          "object": "a table of keys", "array": "a list"}  # fmt: skip
_LARGEST = {"int32": 2**31 - 1, "int64": 2**63 - 1}


@cache
def _schemas() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("shoal.jobs.kube").joinpath("schema.json").read_text())
    return found


def check_spec(kind: str, spec: Any) -> None:
    """Raises InvalidInput for the first value of a RayJob's or RayService's spec that its schema does not allow."""
    _check(_schemas()["kinds"][kind], spec, "spec")


def _check(schema: Any, value: Any, where: str) -> None:
    if isinstance(schema, int):
        schema = _schemas()["parts"][schema]
    if value is None and schema.get("nullable"):
        return
    _check_type(schema, value, where)
    _check_bounds(schema, value, where)
    if isinstance(value, dict):
        _check_keys(schema, value, where)
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            _check(schema["items"], item, f"{where}[{index}]")


def _check_type(schema: dict[str, Any], value: Any, where: str) -> None:
    if schema.get("int_or_string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise InvalidInput(f"{where}={quote(value)} is neither a whole number nor a text: write one of them")
        return
    kind = schema.get("type")
    if kind is None:
        return
    wrong = not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
    if wrong or (isinstance(value, float) and value - value != 0):
        raise InvalidInput(f"{where}={quote(value)} is not {_WORDS[kind]}: write {_WORDS[kind]}")


def _check_bounds(schema: dict[str, Any], value: Any, where: str) -> None:
    if "enum" in schema and value not in schema["enum"]:
        raise InvalidInput(
            f"{where}={quote(value)} is not one of its values: use {', '.join(map(str, schema['enum']))}"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        most = schema.get("maximum", _LARGEST.get(schema.get("format", "")))
        least = schema.get("minimum", -most - 1 if most is not None and "maximum" not in schema else None)
        if (least is not None and value < least) or (most is not None and value > most):
            raise InvalidInput(f"{where}={quote(value)} is out of range: use {least} to {most or 'more'}")
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0) or len(value) > schema.get("maxLength", len(value)):
            raise InvalidInput(f"{where}={quote(value)} has {len(value)} characters: use another length")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            raise InvalidInput(f"{where}={quote(value)} does not have the form {schema['pattern']}: correct it")
    if isinstance(value, list) and not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        raise InvalidInput(f"{where} has {len(value)} entries: use another number of them")


def _check_keys(schema: dict[str, Any], value: dict[Any, Any], where: str) -> None:
    keys = schema.get("keys", {})
    for key in value:
        if not isinstance(key, str):
            raise InvalidInput(f"{where}: the key {quote(key)} is not a text: put it in quotes")
    for key in schema.get("required", ()):
        if key not in value:
            raise InvalidInput(f"{where}.{key} is missing: set it")
    for key, item in value.items():
        below = f"{where}.{plain(key)}"
        if key in keys:
            _check(keys[key], item, below)
        elif "values" in schema:
            _check(schema["values"], item, below)
        elif not schema.get("open") and (keys or schema.get("type") != "object"):
            near = get_close_matches(key, keys, n=1)
            remedy = f"did you mean {near[0]}" if near else "leave it out"
            raise InvalidInput(f"{below} is not a field that KubeRay knows, and would be dropped: {remedy}")
        elif not schema.get("open"):
            raise InvalidInput(f"{below} is not a field that KubeRay knows, and would be dropped: leave it out")
