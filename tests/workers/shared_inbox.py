"""Rows put into the memory of other ranks, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.workers import symmetric
from shoal.workers.symmetric import Inbox


class SharedInbox(Inbox):
    """An inbox in files that processes map into their memory; signals are messages. tallied: whether hosts read counts
    apart from rows."""

    tallied = False

    def __init__(self, folder: str, *sizes: Any) -> None:
        self._folder = folder
        self.said: list[Any] = []
        super().__init__(*sizes)
        if self.tallied:
            self.share_counts(sizes[-2], sizes[-1])
            assert self.tallies is not None, self.untold

    def _share(self, words: int, device: torch.device) -> list[Tensor]:
        path = str(Path(self._folder) / str(self.group.index))
        torch.from_file(path, shared=True, size=words, dtype=torch.int32).fill_(-7)
        dist.barrier()
        ranks = range(self.group.size)
        return [torch.from_file(f"{self._folder}/{r}", shared=True, size=words, dtype=torch.int32) for r in ranks]

    def say(self, part: int, rank: int) -> None:
        self.said.append(dist.isend(torch.zeros(1), rank, tag=part))

    def hear(self, part: int) -> None:
        for rank in self.others:
            work = dist.irecv(torch.zeros(1), rank, tag=part)
            assert work is not None
            work.wait(symmetric.PATIENCE)
