"""Time of named parts of what a rank does, as its device spends it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shoal.workers.profile import span


class Clock:
    """Adds up the time of named parts, while ``on``.

    On a GPU time is that of its stream, between two events in it, so that nothing waits for what is measured; ``read``
    may be called once all of it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures a ``with`` block as a part, or as some more of it. In a trace it is a range, ``on`` or not."""
        with span(name):
            if not self.on:
                yield
                return
            begin = self._mark()
            yield
            self._spans.append((name, begin, self._mark()))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = {}
        for name, begin, end in spans:
            took = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            seconds[name] = seconds.get(name, 0.0) + took
        return seconds
