"""Rows put into the memory of other ranks, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.workers import symmetric
from shoal.workers.slots import BACK, COUNTS, OUT
from shoal.workers.symmetric import Inbox

PARTS = 1 + max(COUNTS, OUT, BACK)
"""That ranks are told of."""


class SharedInbox(Inbox):
    """An inbox in files that processes map into their memory; signals are messages. A GPU keeps no more than one of a
    part and a rank, so none may be sent before the last one was heard. tallied: whether hosts read counts apart from
    rows."""

    tallied = False

    def __init__(self, folder: str, *sizes: Any) -> None:
        self._folder = folder
        self.said: list[Any] = []
        super().__init__(*sizes)
        if self.tallied:
            self.share_counts(sizes[-2], sizes[-1])
            assert self.tallies is not None, self.untold

    def _share(self, words: int, device: torch.device) -> list[Tensor]:
        own, size, ranks = self.group.index, self.group.size, range(self.group.size)
        self._shared(own, words).fill_(-7)
        self._shared(f"{own} unheard", PARTS * size).zero_()
        dist.barrier()
        self._unheard = [self._shared(f"{r} unheard", PARTS * size).view(PARTS, size) for r in ranks]
        return [self._shared(r, words) for r in ranks]

    def _shared(self, name: int | str, words: int) -> Tensor:
        path = str(Path(self._folder) / str(name))
        return torch.from_file(path, shared=True, size=words, dtype=torch.int32)

    def say(self, part: int, rank: int) -> None:
        unheard = self._unheard[rank][part, self.group.index]
        assert not unheard, f"rank {rank} has yet to hear what it was told of part {part} before"
        unheard.fill_(1)
        self.said.append(dist.isend(torch.zeros(1), rank, tag=part))

    def hear(self, part: int) -> None:
        for rank in self.others:
            work = dist.irecv(torch.zeros(1), rank, tag=part)
            assert work is not None
            work.wait(symmetric.PATIENCE)
            self._unheard[self.group.index][part, rank].zero_()
