"""Times what is compared in turns, so that each side meets the machine as warm, and as slow, as the others do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Call = Callable[[], object]
Key = TypeVar("Key")

ROUNDS, LEAST, WINDOW_MS = 3, 3, 60.0
MOST = 200  # calls of one side in one round


def gpu_times(call: Call, count: int) -> list[float]:
    """Milliseconds of so many calls, queued one behind the other, the L2 cache emptied before each."""
    import torch
    from triton.runtime import driver

    active: Any = driver.active
    cache = active.get_empty_cache_for_benchmark()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in marks:
        active.clear_cache(cache)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [float(begin.elapsed_time(end)) for begin, end in marks]


def medians(
    calls: Mapping[Key, Call],
    times: Callable[[Call, int], list[float]] = gpu_times,
    rounds: int = ROUNDS,
    least: int = LEAST,
    window_ms: float = WINDOW_MS,
) -> dict[Key, float]:
    """The median milliseconds of each call, over rounds in which all take turns.

    A side's turn begins with one call that does not count, and has ``least`` calls that do, or as many as
    ``window_ms`` has room for.
    """
    found: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            (first,) = times(call, 1)
            found[key] += times(call, min(max(least, math.ceil(window_ms / first)), MOST))
    return {key: statistics.median(ms) for key, ms in found.items()}
