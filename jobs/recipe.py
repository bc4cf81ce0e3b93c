"""Recipes: read from TOML, changed by ``--set``, checked as a whole, refused in one sentence, written back.

A recipe is a built-in name (``jobs/recipes/NAME.toml``) or a TOML file. Its optional top-level key ``extends`` names
another one (a built-in, or a file beside it) whose tables it changes key by key. Neither torch nor Ray is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shoal.jobs.recipe_errors import one_sentence, plain, quote
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput, NotFound, UsageError

Tables = dict[str, Any]

_RANKS_OF_PLACEMENT = re.compile(r"\d+A:\d+F")
_LARGEST = 2**63 - 1
_OWN_KEYS = ("name", "description")  # what a recipe never inherits from the one that it extends


@dataclass(frozen=True)
class _Source:
    """Where a recipe's text lies. ``folder`` is None for a built-in."""

    label: str
    text: Traversable
    folder: Path | None


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _builtins().iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_file: str | Path, sets: Sequence[str] = (), overrides: dict[str, Any] | None = None) -> Recipe:
    """Read, change and check a recipe.

    ``sets``: texts ``a.b=value``, the value in TOML or a bare string. ``overrides``: values of a command line's own
    options by dotted key (``{"parallel.ranks": 4}``); None leaves the recipe's. A placement given here brings its own
    rank count, unless ``parallel.ranks`` is given here too.

    Raises NotFound (no such recipe), UsageError (a ``--set`` without ``=``), InvalidInput (anything else that is
    wrong), each in one sentence with key, value and remedy.
    """
    tables = _read(_find(str(name_or_file), None), ())
    changes = dict(parse_set(text) for text in sets)
    changes |= {key: value for key, value in (overrides or {}).items() if value is not None}
    _forget_ranks(tables, changes.get("parallel.placement"))
    for key, value in changes.items():
        _put(tables, key, value)
    return check_recipe(tables)


def check_recipe(tables: Tables) -> Recipe:
    """Validate plain tables; the ValidationError of pydantic becomes InvalidInput in one sentence."""
    for table, keys in tables.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            if isinstance(value, int) and abs(value) > _LARGEST:  # TOML promises 64 bits, torch's seeds have them
                raise InvalidInput(
                    f"{plain(table)}.{plain(key)}={quote(value)} does not fit 64 bits: set a smaller one"
                )
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise InvalidInput(one_sentence(error, Recipe)) from None


def recipe_to_toml(recipe: Recipe) -> str:
    """The whole recipe, defaults written out, as TOML that loads to an equal recipe."""
    values = recipe.model_dump()
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for table, keys in values.items():
        if isinstance(keys, dict):
            lines += ["", f"[{table}]", *(f"{key} = {toml_value(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def recipe_hash(recipe: Recipe, without: Collection[str] = ("name", "description")) -> str:
    """SHA-256 (hex) of the recipe's values, but for the top-level keys and tables in ``without``."""
    values = recipe.model_dump(mode="json", exclude=set(without))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _builtins() -> Traversable:
    return files("shoal.jobs").joinpath("recipes")


def _find(name: str, beside: Path | None) -> _Source:
    """A built-in by its name, else a file; a relative one is looked for beside the recipe that extends it."""
    if name in builtin_recipes():
        return _Source(name, _builtins().joinpath(f"{name}.toml"), None)
    path = beside / name if beside else Path(name)
    try:
        if path.is_file():
            return _Source(str(path), path, path.parent)
        if path.is_dir():
            raise InvalidInput(f"recipe {quote(name)} is a folder: name a TOML file, such as {path / 'recipe.toml'}")
    except (OSError, ValueError):  # a name that no file system takes
        pass
    near = get_close_matches(name, builtin_recipes(), n=1)
    remedy = f"did you mean {near[0]}" if near else "give a TOML file"
    raise NotFound(
        f"recipe {quote(name)} is neither a file nor built in: {remedy}; built in are {', '.join(builtin_recipes())}"
    )


def _read(source: _Source, chain: tuple[str, ...]) -> Tables:
    """The tables of a recipe, with those of the recipe that it extends below them."""
    here = str(Path(source.label).resolve()) if source.folder else source.label
    if here in chain:
        raise InvalidInput(f"recipe {quote(source.label)} extends itself: remove one 'extends' of the circle")
    tables = _parse(source)
    stem = Path(source.label).stem.lower() if source.folder else source.label
    if "name" not in tables and re.fullmatch(r"[a-z0-9][a-z0-9._-]*", stem):
        tables["name"] = stem
    if "extends" not in tables:
        return tables
    parent = tables.pop("extends")
    if not isinstance(parent, str):
        raise InvalidInput(f"extends={quote(parent)} in {source.label} is not a text: set it to the name of a recipe")
    base = {k: v for k, v in _read(_find(parent, source.folder), (*chain, here)).items() if k not in _OWN_KEYS}
    parallel = tables.get("parallel")
    _forget_ranks(base, parallel.get("placement") if isinstance(parallel, dict) else None)
    return _merge(base, tables)


def _parse(source: _Source) -> Tables:
    try:
        return tomllib.loads(source.text.read_bytes().decode())
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"recipe {source.label} is not valid TOML: {error}: correct it there") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"recipe {source.label} is not UTF-8 text at byte {error.start}: give a TOML file") from None
    except OSError as error:
        raise InvalidInput(f"recipe {source.label} cannot be read, {error.strerror}: make it readable") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets in brackets in brackets
        raise InvalidInput(f"recipe {source.label} holds a value too large to read: make it smaller") from None


def _merge(base: Tables, over: Tables) -> Tables:
    """``over`` laid on ``base``, table by table."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def parse_set(text: str) -> tuple[str, Any]:
    """Key and value of a ``--set``. Raises UsageError."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {quote(text)} is not of the form key=value: write, say, --set train.steps=100")
    return key.strip(), _value(raw.strip())


def _value(raw: str) -> Any:
    """A TOML value, or the text itself where it is none (dates are texts too: no key of a recipe is a date)."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict) else raw


def _forget_ranks(tables: Tables, placement: Any) -> None:
    """A new placement ``nA:mF`` says how many ranks there are: inherited counts of ranks give way to it."""
    parallel = tables.get("parallel")
    if isinstance(parallel, dict) and isinstance(placement, str) and _RANKS_OF_PLACEMENT.fullmatch(placement):
        tables["parallel"] = {key: value for key, value in parallel.items() if key not in ("ranks", "expert")}


def _put(tables: Tables, key: str, value: Any) -> None:
    """Set ``a.b`` in nested tables; what is no table on the way is replaced, and the check then refuses it."""
    *path, last = key.split(".")
    for part in path:
        below = tables.get(part)
        tables[part] = dict(below) if isinstance(below, dict) else {}
        tables = tables[part]
    tables[last] = value


def toml_value(value: Any) -> str:
    """A text, number or truth value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
