"""How long an API server that is away is waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass

from shoal.jobs.kube.api import FIRST_PAUSE
from shoal.workers.errors import ClusterRefused, ShoalError

PATIENCE = 300.0  # seconds that the API server may be away
_SLOWEST = 5.0  # seconds between two tries


@dataclass
class Patience:
    """Time since the API server last answered as it should, and the pause before it is asked again."""

    away: float | None = None
    pause: float = FIRST_PAUSE

    def restore(self) -> None:
        """It answers."""
        self.away, self.pause = None, FIRST_PAUSE

    def spend(self, error: ShoalError, until: float | None = None) -> None:
        """It did not: returns after a pause, which ends at ``until`` at the latest (of ``time.monotonic``).

        Raises ClusterRefused once it has been away for ``PATIENCE``.
        """
        now = time.monotonic()
        self.away = self.away or now
        if now - self.away > PATIENCE:
            raise ClusterRefused(f"{error} (it was away for {PATIENCE:.0f} s)") from None
        time.sleep(self.pause if until is None else max(0.0, min(self.pause, until - now)))
        self.pause = min(2 * self.pause, _SLOWEST)
