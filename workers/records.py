"""Names within the records of a run that several rooms share. Importing this costs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PARTS = ("data", "forward", "backward", "reduce", "update")
"""Parts of a step, which follow one another; a record has their times as ``data_seconds`` and so on."""

GATES = ("compressed", "selected", "window")
"""NSA's branches, in the order of a layer's gates."""

PROFILE, TABLE = "profile", "table.txt"
"""A run's folder of traces, and in it the operations that took most time."""


def spread(load: Sequence[float]) -> dict[str, float]:
    """Of one layer's load (1.0 = fair share): largest, smallest, and entropy as a share of its maximum.

    Entropy is 1 when all experts get the same, 0 when one gets everything. The mean is 1 by definition.
    """
    total = sum(load)
    if not total:
        return {}
    shares = [value / total for value in load if value > 0]
    entropy = -sum(p * math.log(p) for p in shares) / math.log(len(load)) if len(load) > 1 else 1.0
    return {"max": max(load), "min": min(load), "entropy": entropy}


def load_figures(load: Sequence[Sequence[float]], by_place: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A record of the load of each layer's experts, and of places in a set of expert ranks; 1.0 is a fair share."""
    figures = [spread(row) for row in load]
    return {
        "load": load,
        "devices": [sum(place) / len(by_place) for place in zip(*by_place, strict=True)],
        "layer_devices": by_place,
        "entropy": [each.get("entropy", 0.0) for each in figures],
        "max_over_mean": [each.get("max", 0.0) for each in figures],
    }


def coverage_figures(record: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """Of each layer of a record of coverage: its mean and maximum over ranks, and bytes that a rank receives in a step
    by either way to fetch."""
    for shares, gather, pull in zip(record["coverage"], record["gather_bytes"], record["pull_bytes"], strict=True):
        yield {"mean": sum(shares) / len(shares), "max": max(shares), "gather_bytes": gather, "pull_bytes": pull}
