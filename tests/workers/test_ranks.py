"""The test helper itself: ranks talk to each other, and a failing rank is heard."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException


def _sum_of_ranks(rank: int, world: int, offset: int) -> int:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return int(total)


def _second_fails(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("told to fail")
    dist.barrier()


def test_ranks_talk_and_return() -> None:
    assert run_ranks(3, _sum_of_ranks, 10) == [33, 33, 33]


def test_error_of_a_rank_reaches_the_caller_with_its_traceback() -> None:
    with pytest.raises(ProcessRaisedException, match=r"(?s)_second_fails.*told to fail"):
        run_ranks(2, _second_fails)


def _first_waits_for_what_never_comes(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("told to fail")
    time.sleep(60)


def test_who_is_ended_for_it_says_where_it_was() -> None:
    with pytest.raises(ProcessRaisedException) as raised:
        run_ranks(2, _first_waits_for_what_never_comes)
    failed, ended = str(raised.value).split("rank 0 was ended here:")
    assert "rank 1:" in failed and "told to fail" in failed
    assert "_first_waits_for_what_never_comes" in ended


def _second_is_killed(rank: int, world: int) -> None:
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_who_lost_a_killed_rank_is_heard_too() -> None:
    with pytest.raises(ProcessExitedException, match=r"(?s)SIGKILL.*rank 0.*_second_is_killed"):
        run_ranks(2, _second_is_killed)
