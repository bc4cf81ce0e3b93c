"""Some rows of a longer run, such as the tokens of a pack that a rank holds, and which keys queries among them read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.kernels.host import numbers_on

if TYPE_CHECKING:
    from shoal.kernels.nsa.layout import BlockSizes

Range = tuple[int, int]


@dataclass(frozen=True)
class Rows:
    """Ranges ``start ≤ row < stop``, ascending, with gaps between them; a buffer holds their rows one after another."""

    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, ranges: Iterable[Range]) -> Rows:
        """The rows that lie in any of some ranges."""
        merged: list[Range] = []
        for start, stop in sorted(r for r in ranges if r[0] < r[1]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return cls(tuple(merged))

    @property
    def count(self) -> int:
        """How many rows there are."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def firsts(self) -> tuple[int, ...]:
        """Of each range its first place in the buffer."""
        return tuple(accumulate((stop - start for start, stop in self.ranges), initial=0))[:-1]

    def indices(self, device: torch.device | None = None) -> Tensor:
        """``[count]`` int64, on the host unless elsewhere: the row at each place of the buffer."""
        if len(self.ranges) < 2:
            return torch.arange(*(self.ranges or ((0, 0),))[0], device=device)
        starts, firsts = self._edges(device or torch.device("cpu"))
        places = torch.arange(self.count, device=device)
        return places + (starts - firsts)[torch.searchsorted(firsts, places, right=True) - 1]

    def at(self, row: int) -> int:
        """Where a row stands in the buffer. Raises ValueError when it is not among these."""
        for (start, stop), first in zip(self.ranges, self.firsts, strict=True):
            if start <= row < stop:
                return first + row - start
        raise ValueError(f"row {row} is not among {self.ranges}")

    def places(self, rows: Tensor) -> Tensor:
        """Where rows stand in the buffer, int64; what is not among the rows gets a place that means nothing."""
        if len(self.ranges) < 2:
            return (rows - self.ranges[0][0]).clamp(min=0) if self.ranges else torch.zeros_like(rows)
        starts, firsts = self._edges(rows.device)
        index = (torch.searchsorted(starts, rows, right=True) - 1).clamp(min=0)
        return (rows - (starts - firsts)[index]).clamp(min=0)

    def holds(self, rows: Tensor) -> Tensor:
        """Which rows are among these, bool."""
        edges = numbers_on(rows.device, [edge for r in self.ranges for edge in r])
        return torch.searchsorted(edges, rows, right=True) % 2 == 1

    def _edges(self, device: torch.device) -> Tensor:
        """``[2, ranges]`` int64: of each range its first row, and its first place in the buffer."""
        return numbers_on(device, [[start for start, _ in self.ranges], self.firsts])

    def shared(self, other: Rows) -> Iterator[tuple[slice, slice]]:
        """The rows that both have, piece by piece: their places in this buffer and in the other one."""
        for (start, stop), at in zip(self.ranges, self.firsts, strict=True):
            for (low, high), place in zip(other.ranges, other.firsts, strict=True):
                first, last = max(start, low), min(stop, high)
                if first < last:
                    here, there = at + first - start, place + first - low
                    yield slice(here, here + last - first), slice(there, there + last - first)


@dataclass(frozen=True)
class Run:
    """Queries ``start ≤ t < stop`` that follow one another in one document of the pack."""

    document: int
    start: int
    stop: int


def runs(cu_seqlens: tuple[int, ...], queries: Rows) -> tuple[Run, ...]:
    """The queries, document by document and range by range."""
    documents = list(enumerate(pairwise(cu_seqlens)))
    return tuple(
        Run(document, max(start, low), min(stop, high))
        for low, high in queries.ranges
        for document, (start, stop) in documents
        if max(start, low) < min(stop, high)
    )


@dataclass(frozen=True)
class Needs:
    """What queries read of a pack, and what of it they make themselves.

    far: tokens whose selected keys some query may choose. near: tokens within some query's window. cmp: compression
    blocks that some query sees. own: those that end with one of the queries' tokens, which makes them. raw: the tokens
    that these are made of. chunks: the chunks of ``d`` tokens, numbered over the pack, of which they are made.
    """

    far: Rows
    near: Rows
    cmp: Rows
    own: Rows
    raw: Rows
    chunks: Rows


def needs(cu_seqlens: tuple[int, ...], sizes: BlockSizes, queries: Rows) -> Needs:
    """Of queries anywhere in a pack, the keys they read: no document's but their own, none that comes later."""
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
    before = list(accumulate((sizes.cmp_blocks(n) for n in lengths), initial=0))
    chunks_before = list(accumulate((n // sizes.cmp_stride for n in lengths), initial=0))
    parts = sizes.cmp_block // sizes.cmp_stride
    far: list[Range] = []
    near: list[Range] = []
    cmp: list[Range] = []
    own: list[Range] = []
    raw: list[Range] = []
    chunks: list[Range] = []
    for run in runs(cu_seqlens, queries):
        first, base = cu_seqlens[run.document], before[run.document]
        low, high = sizes.cmp_blocks(run.start - first), sizes.cmp_blocks(run.stop - first)
        far.append((first, run.stop))
        near.append((max(first, run.start - sizes.window + 1), run.stop))
        cmp.append((base, base + high))
        if low < high:
            own.append((base + low, base + high))
            raw.append((first + low * sizes.cmp_stride, first + (high - 1) * sizes.cmp_stride + sizes.cmp_block))
            at = chunks_before[run.document]
            chunks.append((at + low, at + high - 1 + parts))
    return Needs(*(Rows.of(x) for x in (far, near, cmp, own, raw, chunks)))
