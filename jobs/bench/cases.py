"""Runs cases in ranks of their own, in turn; one that ends its ranks (for want of memory, say), or that takes too long,
is left out."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.jobs.bench.result import Row
from shoal.jobs.interrupt import handled

if TYPE_CHECKING:
    from torch.multiprocessing import ProcessContext

Case = TypeVar("Case")
RankMain = Callable[[int, int, str, list[Case], str], None]
"""``(rank, ranks, store, cases, results)``: measures cases in turn. The first rank calls :func:`tell` as each begins
and ends. store: a file that does not exist yet, for ``init_process_group``."""
POLL = 0.5  # seconds between looks at what was measured
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0  # seconds that ranks which are asked to end may take


@dataclass(frozen=True)
class Patience:
    """case: seconds that one may take, and ranks to begin. end: of ``time.monotonic()``, when no more is measured."""

    case: float = float("inf")
    end: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds that a case which begins now may take; 0 where nothing may begin."""
        return max(0.0, min(self.case, self.end - time.monotonic()))

    def lost(self, since: float) -> str:
        """Why what nothing was heard of ``since`` then is waited for no longer; an empty text while it is."""
        now = time.monotonic()
        if now > self.end:
            return "no time was left"
        return f"not done after {self.case:g} s" if now - since > self.case else ""


ENDLESS = Patience()


def run_cases(
    main: RankMain[Case],
    ranks: int,
    cases: Sequence[Case],
    say: Callable[[str], None],
    patience: Patience = ENDLESS,
) -> Iterator[tuple[Case, list[Row]]]:
    """Cases and their rows as they are measured. After a case that ended the ranks, or took too long, the others go on
    in new ones. The ranks end with the iterator.

    A case's ``str`` names it.
    """
    found: set[Case] = set()
    left = list(cases)
    while left:
        if not patience.left:
            say(f"left out, {of(ranks)}, {', '.join(map(str, left))}: no time was left")
            break
        say(f"{of(ranks)}: {', '.join(map(str, left))}")
        begun, failed = yield from _run(main, ranks, left, found, patience)
        if not failed:
            break
        late = left[begun] in found  # its ranks failed as they let go of it
        say(f"{'measured, then' if late else 'left out,'} {of(ranks)}, {left[begun]}: {failed}")
        left = [case for case in left[begun + 1 :] if case not in found]


def measure_each(
    rank: int,
    results: str,
    cases: Sequence[Case],
    measure: Callable[[Case], list[Row]],
    after: Callable[[], object] = lambda: None,
) -> None:
    """Measures cases in turn; the first rank appends a line of JSON to ``results`` as each begins and ends. after:
    called when a case is told of."""
    for index, case in enumerate(cases):
        tell(rank, results, {"begins": index})
        tell(rank, results, {"case": index, "rows": measure(case)})
        after()


def tell(rank: int, results: str, line: dict[str, Any]) -> None:
    """The first rank's ``{"begins": index}``, then ``{"case": index, "rows": rows}``."""
    if rank == 0:
        with Path(results).open("a") as file:
            file.write(json.dumps(line) + "\n")


def of(ranks: int) -> str:
    """So many ranks, in words."""
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _run(
    main: RankMain[Case],
    ranks: int,
    cases: list[Case],
    found: set[Case],
    patience: Patience,
) -> Generator[tuple[Case, list[Row]], None, tuple[int, str]]:
    """Yields what is measured, and adds its case to ``found``. Returns the last case that was begun, and why the ranks
    ended before their time; an empty string if they did not."""
    import torch

    if torch.cuda.device_count() < ranks:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results = Path(folder) / "results"
        results.touch()
        begun = read = 0
        failed, over, heard = "", False, time.monotonic()
        with started(main, ranks, (ranks, str(Path(folder) / "store"), cases, str(results))) as processes:
            while True:
                try:
                    over = over or processes.join(POLL)
                except Exception as error:  # whatever a rank raised, or what killed it
                    failed, over = str(error).strip().splitlines()[-1], True
                lines = [line for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
                for line in map(json.loads, lines[read:]):
                    begun = max(begun, line.get("begins", 0))
                    if "rows" in line:
                        found.add(cases[line["case"]])
                        yield cases[line["case"]], line["rows"]
                if len(lines) > read:
                    heard = time.monotonic()
                read = len(lines)
                if not over and (lost := patience.lost(heard)):
                    failed, over = lost, True
                if over:
                    return begun, failed


@contextmanager
def started(main: Callable[..., None], ranks: int, arguments: tuple[Any, ...]) -> Iterator[ProcessContext]:
    """Processes that run ``main(rank, *arguments)``; at the end of the block they are ended, if they have not.

    A terminal and ``timeout`` signal all processes of a command at once, and Python shows a traceback for one that is
    importing then, or whose parent was about to tell it what to do: ``STOPS`` wait until all are started, and in a
    process until it has begun, which they then end without a word.
    """
    import torch.multiprocessing as mp

    came: list[int] = []
    with handled(minded(), lambda number, _: came.append(number)):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # processes inherit it; other threads here may hear
        try:
            processes = mp.spawn(_begin, (main, *arguments), ranks, join=False)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        if came:
            signal.raise_signal(came[0])
        yield processes
    finally:
        _end(processes.processes)  # those that wait for each other, and those of a caller that gives up


def minded() -> list[signal.Signals]:
    """Of ``STOPS`` those that Python handles here: neither ignored nor left to the system."""
    return [number for number in STOPS if callable(signal.getsignal(number))]


def _begin(rank: int, main: Callable[..., None], *arguments: Any) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    main(rank, *arguments)


def _end(processes: Sequence[Any]) -> None:
    """Ends processes, if they have not: one that hangs in a library does not hear that it is to."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
