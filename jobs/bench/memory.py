"""Peak memory of what ``make train`` runs: data preparation, training, validation, checkpoints, on two ranks.

Memory is the sum of PSS (proportional set size: a page that n processes share counts 1/n in each) over the driver,
Ray's processes and the ranks, sampled while they run. Linux only.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from shoal.jobs.bench.command import failure, shoal_command, started
from shoal.jobs.bench.registry import Settings
from shoal.jobs.bench.result import Row, value_row
from shoal.workers.errors import ClusterRefused, TrainingFailed

LIMIT_GB = 3.0
EVERY = 0.25  # seconds between samples
LARGEST = 6  # processes named
Sample = dict[str, float]  # GB of each process, by name
PROC = Path("/proc")


def run(settings: Settings) -> list[Row]:
    """Trains the recipe to its end (``--steps``: so many steps), into a fresh data folder, as after a fresh clone."""
    if not (PROC / "self" / "smaps_rollup").exists():
        raise ClusterRefused(
            "this system has no /proc/PID/smaps_rollup, which says what memory is used: run it on Linux"
        )
    steps = [] if settings.steps is None else ["--steps", str(settings.steps)]
    with tempfile.TemporaryDirectory() as folder:
        runs, log = Path(folder, "runs"), Path(folder, "log")
        command = [
            *shoal_command(), "train", "--recipe", "tiny", "--name", "bench", *steps,
            "--runs-dir", str(runs), "--data-dir", str(Path(folder, "data")),
        ]  # fmt: skip
        settings.say("preparing data, then training tiny on two ranks")
        preparing, training = Peak(), Peak()
        with started(command, log) as process:
            while process.poll() is None:
                phase = training if runs.exists() else preparing
                phase.take(sample(process.pid))
                time.sleep(EVERY)
        if process.returncode:
            # the log goes with the folder: its last line is all that a person will see
            raise TrainingFailed(failure(command, process.returncode, log.read_text(errors="replace")))
    return rows(preparing, training)


class Peak:
    """The largest of many samples, as a sum and for each process."""

    def __init__(self) -> None:
        self.total, self.samples = 0.0, 0
        self.at_peak: Sample = {}

    def take(self, found: Sample) -> None:
        """Looks at one sample."""
        self.samples += 1
        if sum(found.values()) > self.total:
            self.total, self.at_peak = sum(found.values()), found


def rows(preparing: Peak, training: Peak) -> list[Row]:
    """The peak beside the limit, the peak of each phase, and the largest processes at the peak."""
    highest = max(preparing, training, key=lambda peak: peak.total)
    named = sorted(highest.at_peak.items(), key=lambda item: -item[1])
    rest = sum(gb for _, gb in named[LARGEST:])
    return [
        value_row(
            "peak of the sum of PSS", highest.total, "GB", "limit", LIMIT_GB, 1.0,
            processes=len(highest.at_peak), samples=preparing.samples + training.samples, every_s=EVERY,
        ),
        value_row("peak while data is prepared", preparing.total, "GB"),
        value_row("peak while training", training.total, "GB"),
        *(value_row(f"at the peak: {name}", gb, "GB") for name, gb in named[:LARGEST]),
        *([value_row(f"at the peak: {len(named) - LARGEST} more processes", rest, "GB")] if rest else []),
    ]  # fmt: skip


def sample(root: int) -> Sample:
    """GB (10^9 bytes) of PSS of a process and its descendants, by ``name [n]`` where a name comes more than once."""
    found: Sample = {}
    seen: dict[str, int] = defaultdict(int)
    for pid in sorted(descendants(root, parents())):
        with contextlib.suppress(OSError):  # it ended while we looked
            size, name = _pss(pid), _name(pid)
            seen[name] += 1
            found[name if seen[name] == 1 else f"{name} [{seen[name]}]"] = size
    return found


def parents() -> dict[int, int]:
    """The parent of every process there is."""
    found = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # the name, in brackets, may hold anything: what counts comes after the last bracket
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def descendants(root: int, parent_of: Mapping[int, int]) -> set[int]:
    """``root`` and all processes below it."""
    children: dict[int, list[int]] = defaultdict(list)
    for pid, parent in parent_of.items():
        children[parent].append(pid)
    found: set[int] = set()
    todo = [root]
    while todo:
        pid = todo.pop()
        found.add(pid)
        todo += children[pid]
    return found


def _pss(pid: int) -> float:
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def _name(pid: int) -> str:
    """What a person would call the process: ``ray::RankActor.run``, ``raylet``, ``python dashboard/agent.py``."""
    words = [w for w in (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0") if w]
    if not words:
        return (PROC / str(pid) / "comm").read_text().strip()
    if words[0].startswith("ray"):
        return words[0].split()[0]
    program = Path(words[0]).name
    script: Callable[[str], bool] = lambda w: w.endswith(".py") or w.endswith("shoal")  # noqa: E731
    inner = next((w for w in words[1:4] if script(w)), "")
    return f"{program} {'/'.join(Path(inner).parts[-2:])}" if inner and program.startswith("python") else program
