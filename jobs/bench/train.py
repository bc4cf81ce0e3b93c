"""Tokens/s of ``tiny`` on one rank under Ray, beside the same training without Ray: what Ray costs a step.

Under Ray means ``shoal train`` itself, with its supervision, metrics and TensorBoard events; the others are
``jobs/bench/plain.py``. Each is measured in a fresh process with as many threads (the recipe's, then one a core), in
turns, so that a machine that becomes slower or faster does so for all; Ray's own processes are gone while others run.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from shoal.jobs.bench.command import output_of, prepared, shoal_command, train_records
from shoal.jobs.bench.registry import Settings
from shoal.jobs.bench.result import Row, time_row, value_row
from shoal.jobs.recipe import load_recipe
from shoal.workers.machine import cores

TARGET = 0.97
WARM_UP = 5  # steps; the driver loads TensorBoard during the first ones
REPEATS, STEPS = 5, 20
RAY, TRAINER, LOOP = "shoal train, 1 rank under Ray", "the Trainer without Ray", "a plain PyTorch loop"


def run(settings: Settings) -> Iterator[Row]:
    """Wall time a step after warm-up: its mean over a process, and of those the median."""
    repeats, steps = settings.repeats or REPEATS, settings.steps or STEPS
    corpus = prepared(settings.data_dir)
    own = load_recipe("tiny").parallel.threads
    for threads in dict.fromkeys((own, cores())):
        sides = {
            RAY: partial(under_ray, settings.data_dir, WARM_UP + steps, threads),
            TRAINER: partial(without_ray, "trainer", corpus, WARM_UP + steps, threads),
            LOOP: partial(without_ray, "loop", corpus, WARM_UP + steps, threads),
        }
        measured: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats):
            # there and back again, so that no side is always the one that follows another
            for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
                measured[name].append(ms_a_step(sides[name]()))
                settings.say(f"{repeat + 1}/{repeats} {threads} threads, {name}: {measured[name][-1]:.0f} ms a step")
        yield from rows(measured, steps, threads)


def rows(measured: dict[str, list[float]], steps: int, threads: int = 1) -> list[Row]:
    """Rows from ms a step of each side's processes, in the order in which they took turns."""
    train = load_recipe("tiny").train
    middle = {name: statistics.median(ms) for name, ms in measured.items()}
    facts = {"threads": threads, "steps": steps, "repeats": len(measured[RAY])}

    def beside(baseline: str) -> Row:
        each = [b / a for a, b in zip(measured[RAY], measured[baseline], strict=True)]
        return time_row(
            f"a step: {RAY}", middle[RAY], baseline, middle[baseline], TARGET, **facts, ratios=each,
        )  # fmt: skip

    speeds = [
        value_row(f"speed: {name}", train.batch * train.sequence / ms * 1e3, "tokens/s", threads=threads)
        for name, ms in middle.items()
    ]
    return [beside(TRAINER), beside(LOOP), *speeds]


def ms_a_step(ends: list[float]) -> float:
    """Mean wall time of the steps after warm-up, from when each ended (s); what lies between steps counts."""
    return statistics.fmean(b - a for a, b in pairwise(ends[WARM_UP - 1 :])) * 1e3


def under_ray(data_dir: Path, steps: int, threads: int) -> list[float]:
    """When each step of a ``shoal train`` ended. Its one checkpoint and one short validation come after the last."""
    with tempfile.TemporaryDirectory() as runs:
        output_of(
            [
                *shoal_command(), "train", "--recipe", "tiny", "--name", "bench", "--runs-dir", runs,
                "--data-dir", str(data_dir), "--workers", "1", "--steps", str(steps),
                "--set", f"checkpoint.every={steps}", "--set", "train.eval_every=0", "--set", "train.eval_tokens=1024",
                "--set", f"parallel.threads={threads}",
            ]
        )  # fmt: skip
        return [record["time"] for record in train_records(Path(runs, "bench", "metrics.jsonl"))]


def without_ray(kind: str, corpus: Path, steps: int, threads: int) -> list[float]:
    """When each step of ``jobs/bench/plain.py`` ended."""
    said = output_of([sys.executable, "-m", "shoal.jobs.bench.plain", kind, str(corpus), str(steps), str(threads)])
    return [float(value) for value in json.loads(said.splitlines()[-1])]
