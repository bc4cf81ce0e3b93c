"""Tensors made of pieces of two others: some rows of one, some of the other, added up where pieces overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from shoal.kernels.host import numbers_on

Piece = tuple[slice, slice, bool]
"""Rows of what is made, the rows that they are made of, as many, and whether those came from elsewhere."""


class Pieces:
    """``count`` rows, each the sum of the rows that its pieces name, in their order; zeros where there is no piece."""

    def __init__(self, count: int, pieces: Iterable[Piece]) -> None:
        self.count, self.pieces = count, tuple(pieces)
        self._tables: dict[torch.device, Tensor] = {}

    @cached_property
    def plain(self) -> bool:
        """Whether there is one piece for each row, so that nothing is added up."""
        ends = [0]
        for to, _, _ in sorted(self.pieces, key=lambda piece: piece[0].start):
            if to.start != ends[-1]:
                return False
            ends.append(to.stop)
        return ends[-1] == self.count

    def table(self, device: torch.device) -> Tensor:
        """``[pieces, 4]`` int32: first and last row made, what to add to find the row that is read, and from where."""
        if device not in self._tables:
            rows = [(to.start, to.stop, of.start - to.start, int(came)) for to, of, came in self.pieces]
            self._tables[device] = numbers_on(device, rows or [(0, 0, 0, 0)], torch.int32)
        return self._tables[device]


def letters(own: Sequence[Tensor], rows: int) -> Tensor:
    """``[rows, W]``, for rows of all of ``own [R, …]``, side by side."""
    return own[0].new_empty(rows, sum(prod(x.shape[1:]) for x in own))


def columns(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Of :func:`letters` those of each tensor, ``[rows, W]`` each, views."""
    return list(buffer.split([prod(x.shape[1:]) for x in like], 1))


def put_together(pieces: Pieces, own: Sequence[Tensor], came: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Makes each of ``out [count, …]`` of one of ``own [R, …]`` and of ``came [C, …]``, of as many numbers a row.

    Sums are those of float32 at least, rounded once. Rows are contiguous, but may lie apart. Two tensors at most.
    """
    if not pieces.count:
        return
    if out[0].is_cuda and out[0].dtype != torch.float64:
        # Imported here: Triton is not there on every system, and this is of no use without a GPU.
        from shoal.kernels.triton_pieces import put_together as by_triton

        by_triton(pieces, own, came, out)
        return
    for mine, theirs, made in zip(own, came, out, strict=True):
        _put_together(pieces, mine.flatten(1), theirs.flatten(1), made.view(pieces.count, -1))


def _put_together(pieces: Pieces, own: Tensor, came: Tensor, out: Tensor) -> None:
    if pieces.plain:
        for to, of, elsewhere in pieces.pieces:
            out[to] = (came if elsewhere else own)[of]
        return
    total = torch.zeros(out.shape, dtype=torch.promote_types(own.dtype, torch.float32), device=out.device)
    for to, of, elsewhere in pieces.pieces:
        total[to] += (came if elsewhere else own)[of]
    out.copy_(total)
