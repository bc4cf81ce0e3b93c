"""Kubernetes' notation for amounts: ``64Gi``, ``500m``, ``1e9``."""

from __future__ import annotations

import re
from fractions import Fraction

from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput

_UNITS = {"": 0, "n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_POWERS = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_FORM = re.compile(r"\+?(\d+\.?\d*|\.\d+)([numkMGTPE]?|[KMGTPE]i|[eE][+-]?\d{1,2})", re.ASCII)


def to_bytes(text: str, what: str) -> int:
    """Bytes (or pieces) of a quantity, rounded up. what: names it in the error. Raises InvalidInput."""
    match = _FORM.fullmatch(text)
    if not match or len(text) > 32:
        raise InvalidInput(f"{what}={quote(text)} is not a quantity: write, say, 64Gi")
    number, unit = Fraction(match[1]), match[2]
    if unit in _POWERS:
        size = number * (1 << _POWERS[unit])
    elif unit in _UNITS:
        size = number * Fraction(10) ** _UNITS[unit]
    else:
        size = number * Fraction(10) ** int(unit[1:])
    if size <= 0:
        raise InvalidInput(f"{what}={quote(text)} is nothing: write, say, 64Gi")
    return -(-size.numerator // size.denominator)


def in_gib(size: int) -> str:
    """The next whole ``Gi`` that holds ``size`` bytes."""
    return f"{-(-size // (1 << 30))}Gi"
