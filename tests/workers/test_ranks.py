"""The test helper itself: ranks talk to each other, and a failing rank is heard."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.multiprocessing import ProcessRaisedException


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
