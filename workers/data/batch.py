"""A packed batch: what the loader yields and the model reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.host import sent_to
from shoal.kernels.nsa.rows import Rows

IGNORE = -100


@dataclass(frozen=True)
class PackedBatch:
    """Documents laid end to end; none of them attends to another.

    tokens: ``[T]`` int64. targets: ``[T]`` int64, the next token of the same document, ``IGNORE`` where there is none.
    positions: ``[T]`` int64, from 0 in each document. cu_seqlens: N+1 offsets on the host, ``0 … T``.
    T may be 0: a rank without tokens takes part in every collective all the same. rows: where several ranks share the
    batch, which of its tokens these are; ``cu_seqlens`` is then of the whole batch. None: all of them.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: tuple[int, ...]
    rows: Rows | None = None

    @property
    def targets_count(self) -> int:
        """How many tokens are predicted."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on ``device``; itself where they are there already, on any one of a kind if
        ``device`` has no number. Else it has to be on the host."""
        there, here = torch.device(device), self.tokens.device
        if here.type == there.type and there.index in (None, here.index):
            return self
        tokens, targets, positions = (sent_to(there, x) for x in (self.tokens, self.targets, self.positions))
        return PackedBatch(tokens, targets, positions, self.cu_seqlens, self.rows)

    def pinned(self) -> PackedBatch:
        """The same batch in pinned memory of the host."""
        tokens, targets, positions = (x.pin_memory() for x in (self.tokens, self.targets, self.positions))
        return PackedBatch(tokens, targets, positions, self.cu_seqlens, self.rows)

    def part(self, rows: Rows) -> PackedBatch:
        """Of a whole batch the tokens that one of several ranks computes."""

        def of(x: Tensor) -> Tensor:
            # slices: picking by index wakes all threads, which takes long where other ranks want the cores as well
            return torch.cat([x[:0], *(x[start:stop] for start, stop in rows.ranges)])

        return PackedBatch(of(self.tokens), of(self.targets), of(self.positions), self.cu_seqlens, rows)


def empty_batch() -> PackedBatch:
    """A batch of no tokens, for a rank that hosts experts only."""
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(none, none, none, (0,))
