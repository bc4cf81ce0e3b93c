"""Runs ``shoal`` as a person does, in a process of its own, and reads what it left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shoal.jobs.report.journal import Record, read_records
from shoal.workers.errors import TrainingFailed

FINISH_SECONDS = 120.0  # a run that was asked to stop writes a checkpoint first
# Settings of the caller's shell that change what is measured: every process starts without them.
UNSET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAY_ADDRESS", "SHOAL_RUNS", "PYTHONPROFILEIMPORTTIME")


def shoal_command() -> list[str]:
    """The installed ``shoal`` of this interpreter."""
    script = Path(sys.executable).with_name("shoal")
    return [str(script)] if script.exists() else [sys.executable, "-m", "shoal.jobs.cli.main"]


def environment() -> dict[str, str]:
    """This process's environment, without what would change the figures."""
    return {key: value for key, value in os.environ.items() if key not in UNSET}


def output_of(command: Sequence[str]) -> str:
    """Runs a command to its end; its standard output. Raises TrainingFailed with its last line when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    if result.returncode:
        raise TrainingFailed(failure(command, result.returncode, result.stderr or result.stdout))
    return result.stdout


@contextmanager
def started(command: Sequence[str], log: Path, finish: float | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, its output in ``log``; asked to stop at the end of the block, and ended if it has not within
    ``finish`` seconds, ``FINISH_SECONDS`` unless given."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(), start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(FINISH_SECONDS if finish is None else finish)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_step(process: subprocess.Popen[bytes], metrics: Path, log: Path) -> float:
    """Waits for the first training record in ``metrics``; returns the time (seconds since 1970) it was seen.

    Raises TrainingFailed when the process ends before it.
    """
    while True:
        ended = process.poll() is not None
        if train_records(metrics):
            return time.time()
        if ended:
            raise TrainingFailed(failure(process.args, process.returncode, log.read_text(errors="replace")))  # type: ignore[arg-type]
        time.sleep(0.01)


def train_records(metrics: Path) -> list[Record]:
    """The records of training steps, in order."""
    return [record for record in read_records(metrics) if record.get("kind") == "train"]


def prepared(data_dir: Path, recipe: str = "tiny") -> Path:
    """The folder of a recipe's corpus, made now if it is not there: no benchmark of training measures that."""
    from shoal.jobs.data.corpus import ensure_corpus
    from shoal.jobs.recipe import load_recipe

    checked = load_recipe(recipe)
    return ensure_corpus(checked.data.corpus, checked.model.vocab, data_dir)


def failure(command: Sequence[str], code: int, said: str) -> str:
    """One sentence on a command that ended with ``code``, with the last line of what it said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "no word"
    return f"`{' '.join(map(str, command))}` ended with {code} ({last}): run it to see why"
