"""Ranks die in the middle of saving, at every step they take in the file system; a whole checkpoint is always there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import start_ranks

from shoal.workers import checkpoint_files as files
from shoal.workers.checkpoint import Checkpointer

STEPS_OF_A_SAVE = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


def _tensors(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((1000,), float(step)), "b": torch.arange(10) + step}


def _die_at(point: int, folder: Path) -> None:
    """SIGKILL for this process just before its ``point``-th step in the file system. Python reports every one."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        # removing a folder names its files relative to it
        if event in STEPS_OF_A_SAVE and (event in ("os.remove", "os.rmdir") or str(folder) in str(arguments[0])):
            seen += 1
            if seen > point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _save_and_die(folder: Path, step: int, point: int) -> None:
    torch.set_num_threads(1)
    checkpointer = Checkpointer(folder, keep=1, group=None, rank=0, world=1)
    _die_at(point, folder)
    checkpointer.save(step, _tensors(step), {"step": step})
    checkpointer.wait()


def _assert_recovers(folder: Path, possible: tuple[int, ...]) -> None:
    """What stands is whole; the next start tidies up and goes on."""
    Checkpointer(folder, keep=3, group=None, rank=0, world=1)
    good, damaged = files.last_good(folder)
    assert damaged == []
    assert good is not None
    assert good.step in possible
    assert all(path.name.startswith("step-") for path in folder.iterdir())
    into = {name: torch.zeros_like(tensor) for name, tensor in _tensors(0).items()}
    checkpointer = Checkpointer(folder, keep=1, group=None, rank=0, world=1)
    assert checkpointer.load(good.step, into)["step"] == good.step
    assert all(torch.equal(into[name], tensor) for name, tensor in _tensors(good.step).items())
    checkpointer.save(9, _tensors(9), {"step": 9})
    checkpointer.wait()
    assert [path.name for path in folder.iterdir()] == ["step-9"]


@pytest.mark.parametrize("step", [pytest.param(2, id="next step", marks=pytest.mark.slow), pytest.param(1, id="again")])
def test_killed_at_every_step_of_a_save(tmp_path: Path, step: int) -> None:
    context = multiprocessing.get_context("forkserver")
    code: int | None = -signal.SIGKILL
    point = 0
    while code == -signal.SIGKILL:
        folder = tmp_path / str(point)
        first = Checkpointer(folder, keep=1, group=None, rank=0, world=1)
        first.save(1, _tensors(1), {"step": 1})
        first.wait()
        process = context.Process(target=_save_and_die, args=(folder, step, point))
        process.start()
        process.join()
        code = process.exitcode
        _assert_recovers(folder, (1, step))
        point += 1
    assert code == 0  # the last one had fewer steps than that, and lived
    assert point > 10


def _save_together(rank: int, world: int, folder: Path, victim: int, point: int) -> str:
    checkpointer = Checkpointer(folder, 3, dist.new_group(backend="gloo"), rank, world)
    checkpointer.save(1, _tensors(1), {"step": 1})
    checkpointer.wait()
    if rank == victim:
        _die_at(point, folder)
    checkpointer.save(2, _tensors(2), {"step": 2})
    try:
        checkpointer.wait()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def _kill_one_of_two(folder: Path, victim: int, point: int) -> tuple[bool, str]:
    """Whether the victim died, and what the other rank said of its save."""
    with start_ranks(2, _save_together, folder, victim, point) as (context, results):
        for process in context.processes:
            process.join()
        said = pickle.loads((results / str(1 - victim)).read_bytes())
        return context.processes[victim].exitcode == -signal.SIGKILL, said


def test_the_other_rank_hears_of_it_and_removes_what_was_begun(tmp_path: Path) -> None:
    died, said = _kill_one_of_two(tmp_path, victim=1, point=0)
    assert died
    assert said.startswith(f"ShoalError: checkpoint {tmp_path / 'step-2'} could not be written (")
    assert said.endswith("earlier ones are untouched (step-1): resume the run from the last checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    _assert_recovers(tmp_path, (1,))


def test_the_rank_that_publishes_dies(tmp_path: Path) -> None:
    died, said = _kill_one_of_two(tmp_path, victim=0, point=4)
    assert died
    assert said.startswith(f"ShoalError: checkpoint {tmp_path / 'step-2'} could not be written (")
    _assert_recovers(tmp_path, (1,))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_ranks_killed_at_every_step(tmp_path: Path, victim: int) -> None:
    died, point = True, 0
    while died:
        folder = tmp_path / str(point)
        died, said = _kill_one_of_two(folder, victim, point)
        # a publisher that dies while it removes old ones has published
        assert said == "saved" or "could not be written" in said
        _assert_recovers(folder, (1, 2) if victim == 0 or not died else (1,))
        point += 1
    assert said == "saved"


def _save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    checkpointer = Checkpointer(folder, keep=1, group=None, rank=0, world=1, file_bytes=1 << 20)
    step = 1 + max((info.step for info in files.list_checkpoints(folder)), default=0)
    while True:
        checkpointer.save(step, {**_tensors(step), "large": torch.full((1 << 20,), float(step))}, {"step": step})
        step += 1


@pytest.mark.slow
def test_killed_at_any_time(tmp_path: Path) -> None:
    """Between two steps in the file system too: half-written files."""
    context = multiprocessing.get_context("forkserver")
    moments = random.Random(0)
    last = 0
    for _ in range(60):
        process = context.Process(target=_save_for_ever, args=(tmp_path,))
        process.start()
        while not files.list_checkpoints(tmp_path):
            assert process.is_alive()
        process.join(moments.uniform(0.05, 0.5))
        process.kill()
        process.join()
        Checkpointer(tmp_path, keep=1, group=None, rank=0, world=1)
        good, damaged = files.last_good(tmp_path)
        assert damaged == []
        assert good is not None
        assert good.step >= last
        last = good.step
    assert last > 10
