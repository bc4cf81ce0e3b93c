"""Calls that are timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from shoal.jobs.bench.turns import medians


def cpu_times(call: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begin))
    return found


def test_all_sides_take_turns_and_a_turn_begins_with_a_call_that_does_not_count() -> None:
    """Each side's calls take a time that is known, so the median and the number of calls are too."""
    order: list[str] = []
    spans = {"slow": [70.0, 30.0, 31.0, 90.0, 30.0, 29.0], "fast": [9.0, 2.0, 1.0, 3.0, 2.5, 9.0, 2.0, 1.0, 3.0, 2.5]}

    def times(call: Callable[[], object], count: int) -> list[float]:
        call()
        name = order[-1]
        taken, spans[name] = spans[name][:count], spans[name][count:]
        return taken

    calls = {"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}
    found = medians(calls, times, rounds=2, least=2, window_ms=30.0)
    assert order == ["slow", "slow", "fast", "fast"] * 2
    assert spans == {"slow": [], "fast": []}
    assert found == {"slow": statistics.median([30.0, 31.0, 30.0, 29.0]), "fast": 2.25}


def test_what_takes_longer_is_told_to() -> None:
    found = medians({"short": lambda: None, "long": lambda: time.sleep(0.01)}, cpu_times, rounds=2, window_ms=1.0)
    assert found["long"] >= 10.0 > found["short"]
