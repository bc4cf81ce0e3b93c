"""A job of Ray's job API, watched: its log, and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from shoal.jobs.kube.api import Unreachable
from shoal.jobs.kube.patience import Patience
from shoal.jobs.kube.status import Status
from shoal.jobs.ray_jobs.api import RayCluster
from shoal.jobs.ray_jobs.status import exit_code, summarize
from shoal.workers.errors import NotFound, TimedOut

POLL = 1.0  # seconds between two looks

Told = Callable[[str], None]


def logs(
    ray: RayCluster,
    name: str,
    write: Callable[[bytes], object],
    follow: bool = False,
    tail: int | None = None,
    told: Told = lambda said: None,
) -> None:
    """Writes a job's log line by line, with line ends. follow: until the job ends, waiting for it to begin.

    The dashboard may go away for ``PATIENCE`` while a log is followed. tail: begins that many lines before the end.
    told: is given sentences on why there is no log yet.

    Raises NotFound (no such job, or it has no log without ``follow``), ClusterRefused.
    """
    status = summarize(ray.job(name))
    if follow:
        asyncio.run(_Following(ray, name, write, told, tail).run())
        return
    text = ray.log(name)
    if not text and not status.over:
        raise NotFound(f"{name} is {status.phase} and has no log: {ray.hint(f'status {name}')} says more")
    *lines, rest = text[_begin(text, tail) :].split("\n")
    for line in [*lines, rest] if rest else lines:
        write(line.encode(errors="replace") + b"\n")


def _begin(text: str, tail: int | None) -> int:
    """Where the last ``tail`` lines of a text begin."""
    if tail is None:
        return 0
    at = len(text) - text.endswith("\n")
    for _ in range(tail):
        at = text.rfind("\n", 0, at)
        if at < 0:
            return 0
    return at + 1 if tail else len(text)


@dataclass
class _Following:
    """A log that is followed. Ray tells all of it again whenever it is asked, so what was shown is left out."""

    ray: RayCluster
    name: str
    write: Callable[[bytes], object]
    told: Told
    tail: int | None
    shown: int = 0  # characters
    rest: str = ""  # of them, those of a line without an end
    patience: Patience = field(default_factory=Patience)

    async def run(self) -> None:
        """Until the job has ended and all was shown."""
        while True:
            try:
                over = self._over()
                if self.tail is not None:
                    self.shown, self.tail = _begin(self.ray.log(self.name), self.tail), None
                await self._stream()
                if over:
                    break
                self.patience.restore()
                await asyncio.sleep(POLL)
            except Unreachable as error:
                self.patience.spend(error)
        if self.rest:
            self.write(self.rest.encode(errors="replace") + b"\n")

    def _over(self) -> bool:
        """Whether it has ended; waits until it has begun."""
        while True:
            status = summarize(self.ray.job(self.name))
            if status.phase != "waiting":
                return status.over
            self.told(status.reasons[0] if status.reasons else f"{self.name} is waiting")
            time.sleep(POLL)

    async def _stream(self) -> None:
        seen = 0
        async with aclosing(self.ray.tail(self.name)) as pieces:
            async for piece in pieces:
                self.patience.restore()
                fresh = piece[max(0, self.shown - seen) :]
                seen += len(piece)
                self.shown = max(self.shown, seen)
                *lines, self.rest = (self.rest + fresh).split("\n")
                for line in lines:
                    self.write(line.encode(errors="replace") + b"\n")


def wait(
    ray: RayCluster, name: str, timeout: float | None = None, told: Callable[[Status], None] = lambda status: None
) -> tuple[Status, int]:
    """Waits for a job's end. Returns how it ended, and the job's own exit code; see ``exit_code``.

    timeout: seconds. told: is given the status whenever its phase changes.

    Raises TimedOut; NotFound; ClusterRefused when Ray stays away.
    """
    until = None if timeout is None else time.monotonic() + timeout
    before, patience = "", Patience()
    while True:
        try:
            with ray.limited(None if until is None else until - time.monotonic()):
                job = ray.job(name)
            patience.restore()
            status = summarize(job)
            if status.phase != before:
                before = status.phase
                told(status)
            if status.over:
                return status, exit_code(job)
            left = POLL if until is None else until - time.monotonic()
            time.sleep(max(0.0, min(POLL, left)))
        except Unreachable as error:
            patience.spend(error, until)
        if until is not None and time.monotonic() >= until:
            raise TimedOut(f"{name} has not ended in the time given: it goes on, {ray.hint(f'status {name}')} shows it")
