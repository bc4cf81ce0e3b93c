"""Runs cases in ranks of their own, in turn; one that ends its ranks (for want of memory, say), or that takes too long,
is left out."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shoal.jobs.bench.result import Row

Case = TypeVar("Case")
RankMain = Callable[[int, int, str, list[Case], str], None]
"""``(rank, ranks, store, cases, results)``: measures cases in turn. The first rank calls :func:`tell` as each begins
and ends. store: a file that does not exist yet, for ``init_process_group``."""
POLL = 0.5  # seconds between looks at what was measured
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
    after: Callable[[Case, list[Row]], None] = lambda case, rows: None,
    patience: Patience = ENDLESS,
) -> dict[Case, list[Row]]:
    """Rows by case. After a case that ended the ranks, or took too long, the others go on in new ones. after: called as
    each is measured.

    A case's ``str`` names it.
    """
    found: dict[Case, list[Row]] = {}
    left = list(cases)
    while left:
        if not patience.left:
            say(f"left out, {of(ranks)}, {', '.join(map(str, left))}: no time was left")
            break
        say(f"{of(ranks)}: {', '.join(map(str, left))}")
        begun, failed = _run(main, ranks, left, found, after, patience)
        if not failed:
            break
        late = left[begun] in found  # its ranks failed as they let go of it
        say(f"{'measured, then' if late else 'left out,'} {of(ranks)}, {left[begun]}: {failed}")
        left = [case for case in left[begun + 1 :] if case not in found]
    return found


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
    found: dict[Case, list[Row]],
    after: Callable[[Case, list[Row]], None],
    patience: Patience,
) -> tuple[int, str]:
    """The last case that was begun, and why the ranks ended before their time; an empty string if they did not."""
    import torch
    import torch.multiprocessing as mp

    if torch.cuda.device_count() < ranks:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results = Path(folder) / "results"
        results.touch()
        begun = read = 0
        failed, over, heard = "", False, time.monotonic()
        processes = mp.spawn(main, (ranks, str(Path(folder) / "store"), cases, str(results)), ranks, join=False)
        try:
            while True:
                try:
                    over = over or processes.join(POLL)
                except Exception as error:  # whatever a rank raised, or what killed it
                    failed, over = str(error).strip().splitlines()[-1], True
                lines = [line for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
                for line in map(json.loads, lines[read:]):
                    begun = max(begun, line.get("begins", 0))
                    if "rows" in line:
                        found[cases[line["case"]]] = line["rows"]
                        after(cases[line["case"]], line["rows"])
                if len(lines) > read:
                    heard = time.monotonic()
                read = len(lines)
                if not over and (lost := patience.lost(heard)):
                    failed, over = lost, True
                if over:
                    return begun, failed
        finally:
            _end(processes.processes)  # those that wait for each other, and those of a caller that gives up


def _end(processes: Sequence[Any]) -> None:
    """Ends processes, if they have not: one that hangs in a library does not hear that it is to."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
