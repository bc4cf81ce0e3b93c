"""Requests of somebody who waits no longer than a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LEAST = 0.1  # seconds: 0 would be no limit


class Limited:
    """What asks a server, and in a block of ``limited`` waits no longer for its answers."""

    _until = math.inf  # of time.monotonic

    @contextmanager
    def limited(self, seconds: float | None) -> Iterator[None]:
        """The time that all requests of the block have together; None: as long as each may take by itself."""
        before = self._until
        self._until = min(before, math.inf if seconds is None else time.monotonic() + seconds)
        try:
            yield
        finally:
            self._until = before

    @property
    def out_of_time(self) -> bool:
        """Whether a block's time is over, so that nothing is tried again."""
        return time.monotonic() >= self._until

    def left(self, most: float) -> float:
        """Seconds that an answer is waited for: ``most``, or what is left."""
        return max(_LEAST, min(most, self._until - time.monotonic()))
