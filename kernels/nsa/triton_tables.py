"""What the Triton kernels read about a packed batch: per token and per block, on the device, built once for a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from shoal.kernels.host import numbers_on
from shoal.kernels.nsa.layout import BlockSizes, Layout, in_documents
from shoal.kernels.nsa.rows import Needs, Rows, runs


@dataclass(frozen=True)
class Span:
    """Contiguous keys of each query, ``low ≤ key < high``: two ``[T]`` int32 tensors; empty where ``high ≤ low``."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Stretch:
    """Queries ``start ≤ t < stop``, rows of q, that follow one another in one document, the first at ``position``;
    ``first_block`` is the document's first selection block."""

    start: int
    stop: int
    position: int
    first_block: int


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Index tables of a forward pass, all int32: of a packed batch, or of some queries of one.

    starts: ``[T]``, of each query its row of q less its position in its document. key_starts: ``[T]``, the row of k_slc
    that its document begins with. block_base: ``[T]``, selection blocks of the documents before it, so that
    ``block_base[t] + j`` numbers the blocks of the pack. block_first: ``[B]``, the row of k_slc that each selection
    block of the pack begins with. window, local, initial, cmp: the rows of keys of each query; ``initial`` ends where
    ``local``, the forced blocks that end with the query's own, begins.
    """

    stretches: tuple[Stretch, ...]
    sizes: BlockSizes
    starts: Tensor
    key_starts: Tensor
    block_base: Tensor
    block_first: Tensor
    window: Span
    local: Span
    initial: Span
    cmp: Span

    @property
    def blocks(self) -> int:
        """B, the selection blocks of the pack."""
        return self.block_first.numel()

    def chunks(self, tokens: int, size: int) -> Iterator[tuple[int, int]]:
        """Rows of q cut into ``start ≤ t < stop``, at most ``size`` each, that skip no query of a document."""
        ends = [a.stop for a, b in pairwise(self.stretches) if b.position] + [tokens]
        for low, high in pairwise([0, *ends]):
            for start in range(low, high, max(size, 1)):
                yield start, min(start + size, high)

    def blocks_within(self, start: int, stop: int) -> int:
        """How many blocks queries ``start … stop - 1`` may see, all together."""
        return sum(count for _, count in self._seen(start, stop))

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """First and last block of the pack, the last not included, that queries ``start … stop - 1`` may see."""
        seen = list(self._seen(start, stop))
        return min(first for first, _ in seen), max(first + count for first, count in seen)

    def longest_within(self, start: int, stop: int) -> int:
        """How many blocks one of the queries ``start … stop - 1`` may see at most."""
        return max((count for _, count in self._seen(start, stop)), default=0)

    def _seen(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Of each stretch with queries in ``start … stop - 1``: first block, and how many are seen before ``stop``."""
        for s in self.stretches:
            if s.start < stop and s.stop > start:
                yield s.first_block, self.sizes.slc_blocks(min(s.stop, stop) - s.start + s.position)


@dataclass(frozen=True, kw_only=True)
class PackTables(Tables):
    """Those of a packed batch; turned around for the backward pass, the queries that see each row of k_win and k_cmp.

    firsts: ``[T]``, the token of the pack that each query's document begins with. pages: how many of ``slc_block``
    tokens the pack has. own_rows: ``[T]``, the row of k_slc that stands where each query does. block_last: ``[B]``, the
    row behind the last one of each block.
    """

    firsts: Tensor
    pages: int
    own_rows: Tensor
    block_last: Tensor
    window_seen: Span
    cmp_seen: Span


@lru_cache(maxsize=128)
def chunk_tables(position: int, count: int, near_first: int, sizes: BlockSizes, device: torch.device) -> Tables:
    """Of queries at ``position …`` of one sequence, whose window's keys are counted from token ``near_first`` on, and
    compression blocks from the first; the last few are remembered."""
    t = torch.arange(position, position + count, dtype=torch.int32, device=device)
    nothing = torch.zeros_like(t)
    local = (t // sizes.slc_block - sizes.slc_local + 1).clamp(min=0) * sizes.slc_block
    blocks = sizes.slc_blocks(position + count)
    ended = ((t + 1 - sizes.cmp_block).div(sizes.cmp_stride, rounding_mode="floor") + 1).clamp(min=0)
    return Tables(
        stretches=(Stretch(0, count, position, 0),),
        sizes=sizes,
        starts=nothing - position,
        key_starts=nothing,
        block_base=nothing,
        block_first=torch.arange(blocks, dtype=torch.int32, device=device) * sizes.slc_block,
        window=Span((t - sizes.window + 1).clamp(min=0) - near_first, t + 1 - near_first),
        local=Span(local, t + 1),
        initial=Span(nothing, local.clamp(max=sizes.slc_initial * sizes.slc_block)),
        cmp=Span(nothing, ended),
    )


def make_tables(layout: Layout) -> PackTables:
    """The tables of a layout; the last few are remembered."""
    return _make_tables(layout.cu_seqlens, layout.sizes, layout.device, layout.queries, layout.needs)


@lru_cache(maxsize=8)
def _make_tables(
    cu_seqlens: tuple[int, ...], sizes: BlockSizes, device: torch.device, queries: Rows, needs: Needs
) -> PackTables:
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
    slc, cmp = ([0, *accumulate(map(blocks, lengths))] for blocks in (sizes.slc_blocks, sizes.cmp_blocks))
    # All that travels to a GPU: what follows from it is computed there.
    firsts, slc_before, cmp_before = numbers_on(device, [cu_seqlens, slc, cmp])

    token, near, seen = (x.indices(device) for x in (queries, needs.near, needs.cmp))
    documents, starts = _documents(token, firsts)
    position = token - starts
    local = starts + (position // sizes.slc_block - sizes.slc_local + 1).clamp(min=0) * sizes.slc_block
    initial = torch.minimum(starts + sizes.slc_initial * sizes.slc_block, local)
    ended = ((position + 1 - sizes.cmp_block).div(sizes.cmp_stride, rounding_mode="floor") + 1).clamp(min=0)
    far = needs.far
    own_rows, key_starts, near_rows = far.places(token), far.places(starts), needs.near.places(token)
    cmp_low = needs.cmp.places(cmp_before[documents])
    block_first, block_last = _blocks(firsts, slc_before, slc[-1], far, sizes)
    near_documents, _ = _documents(near, firsts)
    window_end = torch.minimum(near + sizes.window, firsts[near_documents + 1])
    cmp_documents = torch.searchsorted(cmp_before[1:], seen, right=True)
    cmp_last = firsts[cmp_documents] + (seen - cmp_before[cmp_documents]) * sizes.cmp_stride + sizes.cmp_block - 1

    def put(x: Tensor) -> Tensor:
        return x.to(torch.int32)

    def queries_from(low: Tensor, high: Tensor) -> Span:
        """Rows of q among tokens ``low ≤ t < high``."""
        return Span(*(put(torch.searchsorted(token, x)) for x in (low, high)))

    return PackTables(
        stretches=_stretches(cu_seqlens, queries, slc),
        sizes=sizes,
        starts=put(torch.arange(len(token), device=device) - position),
        key_starts=put(key_starts),
        block_base=put(slc_before[documents]),
        block_first=put(block_first),
        window=Span(put(near_rows - (token - torch.maximum(starts, token + 1 - sizes.window))), put(near_rows + 1)),
        local=Span(put(own_rows - (token - local)), put(own_rows + 1)),
        initial=Span(put(key_starts), put(key_starts + initial - starts)),
        cmp=Span(put(cmp_low), put(cmp_low + ended)),
        firsts=put(starts),
        pages=sizes.slc_blocks(cu_seqlens[-1]),
        own_rows=put(own_rows),
        block_last=put(block_last),
        window_seen=queries_from(near, window_end),
        cmp_seen=queries_from(cmp_last, firsts[cmp_documents + 1]),
    )


def _documents(tokens: Tensor, firsts: Tensor) -> tuple[Tensor, Tensor]:
    """The document of each of some tokens of the pack, and its first token. firsts: ``[N + 1]``, of all documents."""
    documents = torch.searchsorted(firsts[1:], tokens, right=True)
    return documents, firsts[documents]


def _blocks(firsts: Tensor, before: Tensor, count: int, far: Rows, sizes: BlockSizes) -> tuple[Tensor, Tensor]:
    """``block_first`` and ``block_last`` of :class:`PackTables`, int64, for rows ``far`` of k_slc.

    before: ``[N + 1]``, the selection blocks before each document; count: all of them.
    """
    tokens = far.indices(firsts.device)
    documents, starts = _documents(tokens, firsts)
    row_blocks = before[documents] + (tokens - starts) // sizes.slc_block
    block_documents, block = in_documents(before, count)
    first = firsts[block_documents] + block * sizes.slc_block
    row = torch.where(far.holds(first), far.places(first), 0)
    # Of a block only what is at hand: it may go on behind the last query.
    every = torch.arange(count, device=firsts.device)
    low, high = (torch.searchsorted(row_blocks, every, right=x) for x in (False, True))
    return row, row + high - low


def _stretches(cu_seqlens: tuple[int, ...], queries: Rows, blocks_before: list[int]) -> tuple[Stretch, ...]:
    found, at = [], 0
    for run in runs(cu_seqlens, queries):
        count = run.stop - run.start
        position = run.start - cu_seqlens[run.document]
        found.append(Stretch(at, at + count, position, blocks_before[run.document]))
        at += count
    return tuple(found)
