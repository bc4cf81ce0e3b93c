"""What the Triton kernels read about a packed batch: per token and per block, on the device, built once for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from shoal.kernels.nsa.layout import BlockSizes, Layout


@dataclass(frozen=True)
class Span:
    """Contiguous keys of each query, ``low ≤ key < high``: two ``[T]`` int32 tensors; empty where ``high ≤ low``."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Index tables of a forward pass, all int32: of a packed batch, or of some queries of one sequence.

    starts: ``[T]``, first token of each token's document. block_base: ``[T]``, selection blocks of the documents
    before it, so that ``block_base[t] + j`` numbers the blocks of the pack. block_first: ``[B]``, first token of each
    selection block of the pack. window, local, initial, cmp: the spans of each query; ``initial`` ends where
    ``local``, the forced blocks that end with the query's own, begins; ``cmp`` counts compression blocks of the pack.
    before: tokens of the sequence that stand before its queries; ``starts`` is ``-before`` then, and rows of keys are
    counted from the start of the sequence.
    """

    cu_seqlens: tuple[int, ...]
    sizes: BlockSizes
    starts: Tensor
    block_base: Tensor
    block_first: Tensor
    window: Span
    local: Span
    initial: Span
    cmp: Span
    before: int = 0

    @property
    def tokens(self) -> int:
        """T, the tokens of the pack."""
        return self.cu_seqlens[-1]

    @property
    def blocks(self) -> int:
        """B, the selection blocks of the pack."""
        return self.block_first.numel()

    def blocks_within(self, start: int, stop: int) -> int:
        """How many blocks queries ``start … stop - 1`` may see, all together."""
        return sum(self._seen(start, stop))

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """First and last block of the pack, the last not included, that queries ``start … stop - 1`` may see."""
        before, seen = 0, 0
        for low, high in pairwise(self.cu_seqlens):
            if high <= start:
                before += self.sizes.slc_blocks(high - low)
            elif low < stop:
                seen += self.sizes.slc_blocks(min(high, stop) - low)
        return before, before + seen

    def longest_within(self, start: int, stop: int) -> int:
        """How many blocks one of the queries ``start … stop - 1`` may see at most."""
        return max(self._seen(start, stop), default=0)

    def _seen(self, start: int, stop: int) -> list[int]:
        """Of each document that has queries in ``start … stop - 1``: its blocks before ``stop``."""
        return [
            self.sizes.slc_blocks(min(high, stop) - low + self.before)
            for low, high in pairwise(self.cu_seqlens)
            if low < stop and high > start
        ]


@dataclass(frozen=True, kw_only=True)
class PackTables(Tables):
    """Those of a packed batch; turned around for the backward pass, the queries that see each key, and each compression
    block."""

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
        cu_seqlens=(0, count),
        sizes=sizes,
        starts=nothing - position,
        block_base=nothing,
        block_first=torch.arange(blocks, dtype=torch.int32, device=device) * sizes.slc_block,
        window=Span((t - sizes.window + 1).clamp(min=0) - near_first, t + 1 - near_first),
        local=Span(local, t + 1),
        initial=Span(nothing, local.clamp(max=sizes.slc_initial * sizes.slc_block)),
        cmp=Span(nothing, ended),
        before=position,
    )


def make_tables(layout: Layout) -> PackTables:
    """The tables of a layout; the last few are remembered."""
    return _make_tables(layout.cu_seqlens, layout.sizes, layout.device)


@lru_cache(maxsize=8)
def _make_tables(cu_seqlens: tuple[int, ...], sizes: BlockSizes, device: torch.device) -> PackTables:
    lengths = torch.tensor([stop - start for start, stop in pairwise(cu_seqlens)], dtype=torch.int64)
    slc = torch.tensor([sizes.slc_blocks(n) for n in lengths.tolist()], dtype=torch.int64)
    cmp = torch.tensor([sizes.cmp_blocks(n) for n in lengths.tolist()], dtype=torch.int64)
    firsts = torch.tensor(cu_seqlens[:-1], dtype=torch.int64)
    starts = torch.repeat_interleave(firsts, lengths)
    block_base = torch.repeat_interleave(slc.cumsum(0) - slc, lengths)
    cmp_base = torch.repeat_interleave(cmp.cumsum(0) - cmp, lengths)
    block = torch.arange(int(slc.sum())) - torch.repeat_interleave(slc.cumsum(0) - slc, slc)
    token = torch.arange(cu_seqlens[-1])
    position = token - starts
    own = position // sizes.slc_block
    local = starts + (own - sizes.slc_local + 1).clamp(min=0) * sizes.slc_block
    initial = torch.minimum(starts + sizes.slc_initial * sizes.slc_block, local)
    ended = ((position + 1 - sizes.cmp_block).div(sizes.cmp_stride, rounding_mode="floor") + 1).clamp(min=0)

    ends = starts + torch.repeat_interleave(lengths, lengths)
    cmp_first = torch.repeat_interleave(firsts, cmp)
    cmp_index = torch.arange(int(cmp.sum())) - torch.repeat_interleave(cmp.cumsum(0) - cmp, cmp)
    cmp_last = cmp_first + cmp_index * sizes.cmp_stride + sizes.cmp_block - 1

    def put(x: Tensor) -> Tensor:
        return x.to(torch.int32).to(device)

    return PackTables(
        cu_seqlens=cu_seqlens,
        sizes=sizes,
        starts=put(starts),
        block_base=put(block_base),
        block_first=put(torch.repeat_interleave(firsts, slc) + block * sizes.slc_block),
        window=Span(put(torch.maximum(starts, token + 1 - sizes.window)), put(token + 1)),
        local=Span(put(local), put(token + 1)),
        initial=Span(put(starts), put(initial)),
        cmp=Span(put(cmp_base), put(cmp_base + ended)),
        window_seen=Span(put(token), put(torch.minimum(token + sizes.window, ends))),
        cmp_seen=Span(put(cmp_last), put(torch.repeat_interleave(firsts + lengths, cmp))),
    )
