"""How soon ``shoal --help`` answers, beside the limit, and that it imports neither torch nor Ray."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from shoal.jobs.bench.command import environment, failure, output_of, shoal_command
from shoal.jobs.bench.registry import Settings
from shoal.jobs.bench.result import Row, time_row
from shoal.workers.errors import TrainingFailed

LIMIT_MS = 500.0
REPEATS = 21
HEAVY = ("torch", "ray")


def run(settings: Settings) -> list[Row]:
    """Medians of the wall time of whole processes, after one that fills the disk's cache."""
    repeats = settings.repeats or REPEATS
    imported = heavy_imports(["-m", "shoal.jobs.cli.main", "--help"])
    if imported:
        raise TrainingFailed(f"shoal --help imports {' and '.join(imported)}: import them inside the commands")
    settings.say(f"{repeats} times shoal --help")
    shoal, python = [*shoal_command(), "--help"], [sys.executable, "-c", "pass"]
    output_of(shoal)
    pairs = [(wall_ms(shoal), wall_ms(python)) for _ in range(repeats)]
    help_ms, python_ms = zip(*pairs, strict=True)
    return [
        time_row(
            "shoal --help", statistics.median(help_ms), "limit", LIMIT_MS, 1.0,
            repeats=repeats, slowest_ms=round(max(help_ms), 1), imports="neither torch nor ray",
        ),
        time_row("of it, Python itself (python -c pass)", statistics.median(python_ms), repeats=repeats),
    ]  # fmt: skip


def wall_ms(command: Sequence[str]) -> float:
    """Milliseconds from starting a command to its end."""
    start = time.perf_counter()
    output_of(command)
    return (time.perf_counter() - start) * 1e3


def heavy_imports(arguments: Sequence[str]) -> list[str]:
    """Which of torch and Ray a Python command line imports, by Python's own account (``-X importtime``).

    Raises TrainingFailed with the last line that is not part of that account when the command fails.
    """
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    account, mark = result.stderr.splitlines(), "import time:"
    if result.returncode:
        said = "\n".join(line for line in account if not line.startswith(mark))
        raise TrainingFailed(failure(command, result.returncode, said or result.stdout))
    names = {line.rpartition("|")[2].strip() for line in account if line.startswith(mark)}
    return [name for name in HEAVY if name in names]
