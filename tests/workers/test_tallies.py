"""Counts of all ranks in memory that their hosts share, between processes."""

from __future__ import annotations

import mmap
import os
import pickle
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import run_ranks, start_ranks

from shoal.workers import tallies
from shoal.workers.mesh import Group

CPU = torch.device("cpu")
LONG = timedelta(seconds=60)  # a machine may be busy


def _opened(rank: int, world: int, experts: int) -> tallies.Tallies:
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    return tallies.open_tallies(group, experts, CPU)


def _counts(rank: int, step: int, experts: int) -> list[int]:
    return [1000 * step + 100 * rank + expert for expert in range(experts)]


def _told(rank: int, world: int, experts: int, steps: int) -> int:
    """Passes whose numbers begin again, after each of which ranks hear that all have read, as rows that come home tell
    them."""
    opened = _opened(rank, world, experts)
    wait = random.Random(rank)
    for step in range(steps):
        time.sleep(wait.choice([0, 0, 0, 0.0005, 0.002]))
        opened.tell(torch.tensor(_counts(rank, step, experts), dtype=torch.int32))
        assert opened.read(LONG) == [_counts(other, step, experts) for other in range(world)]
        dist.barrier()
    return steps


@pytest.mark.parametrize(("world", "experts"), [(2, 1), (3, 17), (4, 64)])
def test_hosts_read_what_all_ranks_told(world: int, experts: int) -> None:
    steps = tallies.MARKS + 20
    assert run_ranks(world, _told, experts, steps) == [steps] * world


def _ahead(rank: int, world: int, folder: str) -> float:
    """How long a rank waited for another one that is late by half a second, though numbers of old passes are there."""
    opened = _opened(rank, world, 8)
    for step in range(2):
        opened.tell(torch.full((8,), step, dtype=torch.int32))
        opened.read(LONG)
        dist.barrier()
    if rank == 1:
        time.sleep(0.5)
    began = time.monotonic()
    opened.tell(torch.full((8,), 7, dtype=torch.int32))
    assert opened.read(LONG) == [[7] * 8] * world
    return time.monotonic() - began


def test_counts_of_a_pass_before_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    """Whatever they are: the pass is told with them."""
    early, _ = run_ranks(2, _ahead, str(tmp_path))
    assert early > 0.2


def _killed(rank: int, world: int) -> list[int]:
    """Of three, the last one ends without a word in the second pass."""
    opened = _opened(rank, world, 8)
    for step in range(2):
        if rank == 2 and step:
            os.kill(os.getpid(), signal.SIGKILL)
        opened.tell(torch.full((8,), step, dtype=torch.int32))
        if step:
            with pytest.raises(tallies.Unheard) as raised:
                opened.read(timedelta(seconds=3))
            return raised.value.ranks
        opened.read(LONG)
        dist.barrier()
    return []


def test_a_rank_that_was_killed_is_named() -> None:
    with start_ranks(3, _killed) as (context, folder):
        for process in context.processes[:2]:
            process.join(60)
        assert context.processes[2].exitcode == -signal.SIGKILL
        assert [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)] == [[2], [2]]


def _own_fault() -> None:
    """Exits with 3 where the host hears of its own GPU's fault, with 4 where it waits for others to the end."""
    device = torch.device("cuda", 0)
    memory = torch.zeros(tallies.words_for(2, 8), dtype=torch.int32, pin_memory=True)
    opened = tallies.Tallies(memory, Group((0, 1), 0), 8, device)
    opened.tell(torch.zeros(8, dtype=torch.int32, device=device))
    torch._assert_async(torch.zeros(1, device=device))
    try:
        opened.read(LONG)
    except tallies.Unheard:
        os._exit(4)
    except RuntimeError:
        os._exit(3)  # nothing of CUDA can be taken down in good order


@pytest.mark.gpu
def test_a_rank_whose_own_gpu_fails_does_not_wait_for_others() -> None:
    process = mp.get_context("spawn").Process(target=_own_fault)
    process.start()
    try:
        process.join(2 * LONG.total_seconds())
        assert process.exitcode == 3
    finally:
        process.kill()


def _refused(rank: int, world: int, fault: str) -> str:
    """Why a rank goes without it."""

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(fault)

    if fault == "none is made" and rank == 0:
        os.memfd_create = fails  # type: ignore[assignment]
    if fault == "one rank may not open it" and rank == 1:
        mmap.mmap = fails  # type: ignore[misc, assignment]
    if fault == "one GPU is not told of it" and rank == 1:
        tallies._registered = lambda *_: fault
    if fault == "it may not be so large" and rank == 0:
        os.ftruncate = fails
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    why = ""
    try:  # what is kept of an error keeps what it was raised beside
        tallies.open_tallies(group, 8, CPU)
    except tallies.Unshared as error:
        why = str(error)
    assert not any("shoal-counts" in os.path.realpath(each) for each in Path("/proc/self/fd").iterdir())
    return why


FAULTS = {
    "none is made": "memory to share cannot be made (none is made)",
    "it may not be so large": "memory to share cannot be made (it may not be so large)",
    "one rank may not open it": "a rank cannot open another one's memory (one rank may not open it)",
    "one GPU is not told of it": "one GPU is not told of it",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ranks_go_without_it_alike_and_leave_nothing_open(fault: str) -> None:
    """And all of them know why."""
    assert run_ranks(3, _refused, fault) == [FAULTS[fault]] * 3
