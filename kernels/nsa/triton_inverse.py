"""Which queries chose a block: the selection turned around on the device, without a read by the host."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2
from shoal.kernels.nsa.triton_tables import Tables

TABLE = 1 << 29
"""Most bytes of a table of items, or of pairs to sort, that exists at a time: queries are turned around in segments of
as many chunks as fit. A block has items of its own in each chunk, so that a table of all chunks would grow with the
square of the length. 128k tokens of 4 KV heads, in groups of 16, are one segment: 126 MB of items, 276 MB to sort."""


@dataclass(frozen=True)
class Inverse:
    """Work items of a selection: an item is a block and at most ``size`` queries that chose it.

    Items are sorted by KV head, then chunk of ``chunk`` queries, then block. item_blocks: ``[items]`` int32, blocks
    of the pack. item_pairs: ``[items, size]`` int32, ``t * n + i`` for the query t whose i-th choice it is, -1 after
    the last. first_items: ``[KV * chunks + 1]`` int32, where the items of each head's chunk begin, and their end. What
    lies beyond the last item is undefined. before: chunks of the pack before the first of these.
    """

    chunk: int
    chunks: int
    size: int
    item_blocks: Tensor
    item_pairs: Tensor
    first_items: Tensor
    before: int = 0


def segments(tokens: int, chunk: int, chunk_bytes: int) -> list[range]:
    """The numbers of the chunks of ``tokens`` queries, as many at a time as ``TABLE`` has room for; at least one."""
    chunks, at_once = -(-tokens // chunk), max(1, TABLE // max(1, chunk_bytes))
    return [range(first, min(first + at_once, chunks)) for first in range(0, chunks, at_once)]


def item_bytes(chunk: int, kv: int, n: int, blocks: int, size: int) -> int:
    """Bytes of the items that ``invert`` makes of a chunk of queries at most, of a pack of so many blocks."""
    return 4 * (size + 1) * _most_items(chunk * kv * n, kv * blocks, size)


def list_bytes(chunk: int, kv: int, n: int, blocks: int) -> int:
    """Bytes of what ``lists_by_block`` sorts of a chunk: keys and places, before and after, and where lists begin."""
    return 32 * chunk * kv * n + 16 * kv * blocks


def heads_within(kv: int, head_bytes: int) -> int:
    """How many of ``kv`` heads at a time ``TABLE`` has room for, in parts of about the same size; at least one."""
    parts = -(-kv // max(1, TABLE // max(1, head_bytes)))
    return -(-kv // parts)


def _most_items(pairs: int, lists: int, size: int) -> int:
    """Of so many pairs in so many lists: full ones, and one of each list that is not."""
    return pairs // size + min(lists, pairs)


def invert(blocks: Tensor, tables: Tables, chunk: int, size: int, segment: range | None = None) -> Inverse:
    """Sort the pairs (query, choice) of ``blocks [T, KV, n]`` by block, within chunks of queries; segment: the numbers
    of those chunks that are turned around, None for all.

    The order of an item's pairs differs from run to run (atomic counters give it), which changes no result: what a
    pair computes does not depend on its place.
    """
    blocks, block_base, segment = _of_segment(blocks, tables, chunk, segment)
    tokens, kv, n = blocks.shape
    chunks, bins = len(segment), tables.blocks
    counts = blocks.new_zeros(kv * chunks * bins)
    ranks = blocks.new_empty(kv, tokens, n)
    tile = 64
    grid = (-(-tokens // tile), kv)
    shape = {"N": n, "NP": power_of_2(n), "TILE": tile}
    args = (block_base, ranks, counts, tokens, chunk, chunks, bins, blocks.stride(0), blocks.stride(1))
    launch(_count_kernel, grid, blocks, *args, **shape)
    ends = ((counts + (size - 1)) // size).cumsum(0, dtype=torch.int32)
    first = torch.nn.functional.pad(ends, (1, 0))  # of each counter, and behind the last one the number of all items
    most = _most_items(tokens * kv * n, kv * chunks * bins, size)
    item_blocks = blocks.new_empty(most)
    item_pairs = blocks.new_full((most, size), -1)
    launch(_fill_kernel, grid, blocks, *args, segment.start * chunk, first, item_blocks, item_pairs, SIZE=size, **shape)
    return Inverse(chunk, chunks, size, item_blocks, item_pairs, first[::bins].contiguous(), segment.start)


def _of_segment(blocks: Tensor, tables: Tables, chunk: int, segment: range | None) -> tuple[Tensor, Tensor, range]:
    """Choices and first blocks of the segment's queries, and the segment."""
    if segment is None:
        segment = range(-(-len(blocks) // chunk))
    rows = slice(segment.start * chunk, segment.stop * chunk)
    return blocks[rows], tables.block_base[rows], segment


def longest_first(inverse: Inverse) -> Inverse:
    """The same items, of each head's chunk those with the most queries first: who takes them one by one ends with short
    ones, and waits for nobody long."""
    lengths = (inverse.item_pairs >= 0).sum(1, dtype=torch.int32)
    places = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
    lists = torch.searchsorted(inverse.first_items, places, right=True, out_int32=True)
    order = torch.argsort(lists * (inverse.size + 1) - lengths, stable=True)
    return replace(inverse, item_blocks=inverse.item_blocks[order], item_pairs=inverse.item_pairs[order])


def ends_by_head(inverse: Inverse, kv: int) -> Tensor:
    """How many items a chunk has up to the end of each head, ``[KV, chunks]`` int32."""
    return inverse.first_items.diff().view(kv, inverse.chunks).cumsum(0, dtype=torch.int32)


def lists_by_block(
    blocks: Tensor, tables: Tables, chunk: int, segment: range | None = None
) -> tuple[Tensor, Tensor, int]:
    """The choices of ``blocks [T, KV, n]`` that fell on each block, chunk by chunk of queries, in the queries' order.

    segment: as in :func:`invert`, the T' queries of some chunks. Returns pairs ``[KV * T' * n]`` int32, ``t * n + i``
    for the i-th choice of query t, sorted by KV head, chunk, block of the pack; where each such list begins,
    ``[KV * chunks * B + 1]`` int32; and the number of chunks. What lies beyond the last list is undefined. By a sort,
    which takes longer than the counting of :func:`invert`, and whose order is the same in every run.
    """
    blocks, block_base, segment = _of_segment(blocks, tables, chunk, segment)
    tokens, kv, n = blocks.shape
    chunks = len(segment)
    lists = kv * chunks * tables.blocks
    t = torch.arange(tokens, device=blocks.device)
    head = torch.arange(kv, device=blocks.device)[:, None, None]
    by_head = blocks.transpose(0, 1)
    list_of = (head * chunks + (t // chunk)[:, None]) * tables.blocks + block_base[:, None] + by_head
    sorted_lists, order = torch.sort(torch.where(by_head >= 0, list_of, lists).flatten(), stable=True)
    first = torch.searchsorted(sorted_lists, torch.arange(lists + 1, device=blocks.device))
    return (order % (tokens * n) + segment.start * chunk * n).to(torch.int32), first.to(torch.int32), chunks


@triton.jit
def _bins(blocks, block_base, tokens, chunk, chunks, bins, stride_t, stride_h, N: tl.constexpr, NP, TILE):
    """Of a tile's pairs ``[TILE, NP]``: query, choice, block of the pack, counter, and whether there is one."""
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    h = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, NP)
    inside = (t < tokens)[:, None] & (i < N)[None, :]
    block = tl.load(blocks + (t * stride_t + h * stride_h)[:, None] + i[None, :], mask=inside, other=-1)
    at = block + tl.load(block_base + t, mask=t < tokens, other=0)[:, None]
    counter = (h * chunks + t // chunk)[:, None] * bins + at
    pair = (h * tokens + t)[:, None] * N + i[None, :]
    return t, i, at, counter, pair, inside & (block >= 0)


@triton.jit(do_not_specialize=["tokens", "chunk", "chunks", "bins"])
def _count_kernel(
    blocks,
    block_base,
    ranks,
    counts,
    tokens,
    chunk,
    chunks,
    bins,
    stride_t,
    stride_h,
    N: tl.constexpr,
    NP: tl.constexpr,
    TILE: tl.constexpr,
):
    _t, _i, _at, counter, pair, there = _bins(
        blocks, block_base, tokens, chunk, chunks, bins, stride_t, stride_h, N, NP, TILE
    )
    rank = tl.atomic_add(counts + counter, 1, mask=there, sem="relaxed")
    tl.store(ranks + pair, rank, mask=there)


@triton.jit(do_not_specialize=["tokens", "chunk", "chunks", "bins", "start"])
def _fill_kernel(
    blocks,
    block_base,
    ranks,
    counts,
    tokens,
    chunk,
    chunks,
    bins,
    stride_t,
    stride_h,
    start,
    first,
    item_blocks,
    item_pairs,
    SIZE: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TILE: tl.constexpr,
):
    t, i, at, counter, pair, there = _bins(
        blocks, block_base, tokens, chunk, chunks, bins, stride_t, stride_h, N, NP, TILE
    )
    rank = tl.load(ranks + pair, mask=there, other=0)
    item = tl.load(first + counter, mask=there, other=0).to(tl.int64) + rank // SIZE
    tl.store(item_blocks + item, at, mask=there & (rank % SIZE == 0))
    choice = ((start + t)[:, None] * N + i[None, :]).to(tl.int32)
    tl.store(item_pairs + item * SIZE + rank % SIZE, choice, mask=there)
