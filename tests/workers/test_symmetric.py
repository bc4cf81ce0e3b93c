"""Rows that are put into the memory of other ranks: the layer computes what it does with all experts on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from shared_inbox import SharedInbox
from spread_layers import CASES, HIDDEN, check, on_ranks
from torch import Tensor

from shoal.workers import slots
from shoal.workers.mesh import Group
from shoal.workers.symmetric import Inbox

CPU = torch.device("cpu")


@pytest.mark.parametrize(("room", "tallied"), [(0, False), (0, True), (1 << 40, False)])
@pytest.mark.parametrize("name", ["uneven tokens, and none", "all to one expert", "dispatched shared experts"])
def test_rows_put_into_shared_memory_equal_the_equations(name: str, room: int, tallied: bool, tmp_path: Path) -> None:
    """The way of two GPUs of one node, through memory that processes of this machine share; slots are used again.

    room: whether the host reads how many rows experts get (0), or asks for as many as there may be. tallied: whether
    hosts tell each other.
    """
    case = CASES[name]
    results = run_ranks(len(case.tokens), in_room, (room, tallied), case, torch.float32, False, str(tmp_path), 3)
    check(case, results, 1e-6)


@pytest.mark.parametrize("name", ["a rank without experts", "experts on one rank only"])
def test_rows_put_into_shared_memory_by_triton_equal_the_equations(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    results = run_ranks(len(case.tokens), in_room, (1 << 40, False), case, torch.float32, True, str(tmp_path), 2)
    check(case, results, 1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_at_each_turn_a_rank_is_put_to_by_one_other(ranks: int) -> None:
    boxes = [Unshared(Group(tuple(range(ranks)), rank), 4, HIDDEN, torch.float32, 2, 8, CPU) for rank in range(ranks)]
    assert all(sorted(box.turns) == box.others for box in boxes)
    for turn in zip(*(box.turns for box in boxes), strict=True):
        assert sorted(turn) == list(range(ranks))


class Unshared(Inbox):
    """An inbox that no other rank reaches."""

    def _share(self, words: int, device: torch.device) -> list[Tensor]:
        return [torch.zeros(words, dtype=torch.int32, device=device) for _ in self.group.ranks]


def in_room(rank: int, world: int, how: tuple[int, bool], *rest: Any) -> dict[str, Any]:
    slots.ROOM, SharedInbox.tallied = how
    return on_ranks(rank, world, *rest)
