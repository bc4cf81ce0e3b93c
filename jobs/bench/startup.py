"""From the command to the first step: ``shoal train --recipe tiny`` with its data prepared, and where the time goes."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shoal.jobs.bench.cli import wall_ms
from shoal.jobs.bench.command import prepared, shoal_command, started, wait_for_step
from shoal.jobs.bench.registry import Settings
from shoal.jobs.bench.result import Row, time_row

LIMIT_MS = 15_000.0
REPEATS, PROBED = 5, 3
FIRST_STEP, REST = "first step, until its record is written", "Python, the driver's own imports, recipe, run folder"
IMPORTS = ("torch", "ray")
Interval = dict[str, Any]


def run(settings: Settings) -> Iterator[Row]:
    """Medians over whole runs, each stopped at its first step. Parts are those of further runs, with timers."""
    repeats = settings.repeats or REPEATS
    prepared(settings.data_dir)
    totals = []
    for repeat in range(repeats):
        totals.append(first_step(shoal_command(), settings.data_dir)[0])
        settings.say(f"{repeat + 1}/{repeats} first step after {totals[-1] / 1e3:.1f} s")
    middle = statistics.median(totals)
    yield time_row("command to first step", middle, "limit", LIMIT_MS, 1.0, repeats=repeats, all_ms=totals)
    yield from part_rows([_probed(settings.data_dir) for _ in range(min(repeats, PROBED))])
    for name in IMPORTS:
        yield _import_row(name, repeats)


def first_step(command: Sequence[str], data_dir: Path) -> tuple[float, float, float]:
    """Runs until the first record. Returns the ms it took, and when it began and ended (seconds since 1970)."""
    with tempfile.TemporaryDirectory() as folder:
        log, runs = Path(folder, "log"), Path(folder, "runs")
        train = ["train", "--recipe", "tiny", "--name", "bench", "--runs-dir", str(runs), "--data-dir", str(data_dir)]
        begin = time.time()
        with started([*command, *train], log) as process:
            end = wait_for_step(process, runs / "bench" / "metrics.jsonl", log)
    return (end - begin) * 1e3, begin, end


def part_rows(probed: Sequence[dict[str, float]]) -> list[Row]:
    """Medians of each part (ms) over runs with timers, the largest first."""
    middle = {part: statistics.median(run[part] for run in probed) for part in probed[0]}
    largest = sorted(middle.items(), key=lambda item: -item[1])
    return [time_row(f"part: {part}", ms, repeats=len(probed)) for part, ms in largest]


def parts_of(intervals: Sequence[Interval], begin: float, end: float) -> dict[str, float]:
    """Milliseconds of each part of ``[begin, end]``; the first step follows the last, the rest is in none of them."""
    parts = {i["part"]: (i["end"] - i["start"]) * 1e3 for i in intervals}
    ready = max(i["end"] for i in intervals)
    covered, reached = 0.0, begin
    for interval in sorted(intervals, key=lambda i: i["start"]):
        covered += max(0.0, interval["end"] - max(reached, interval["start"]))
        reached = max(reached, interval["end"])
    return parts | {FIRST_STEP: (end - ready) * 1e3, REST: (ready - begin - covered) * 1e3}


def _probed(data_dir: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "parts.jsonl")
        probe = [sys.executable, "-m", "shoal.jobs.bench.probe", str(file)]
        _, begin, end = first_step(probe, data_dir)
        intervals = [json.loads(line) for line in file.read_text().splitlines()]
    return parts_of(intervals, begin, end)


def _import_row(name: str, repeats: int) -> Row:
    times = [wall_ms([sys.executable, "-c", f"import {name}"]) for _ in range(repeats)]
    return time_row(f"for comparison: python -c 'import {name}'", statistics.median(times), repeats=repeats)
