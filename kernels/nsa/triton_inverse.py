"""Which queries chose a block: the selection turned around on the device, without a read by the host."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.nsa.triton_tables import Tables


@dataclass(frozen=True)
class Inverse:
    """Work items of a selection: an item is a block and at most ``size`` queries that chose it.

    Items are sorted by KV head, then chunk of ``chunk`` queries, then block. item_blocks: ``[items]`` int32, blocks
    of the pack. item_pairs: ``[items, size]`` int32, ``t * n + i`` for the query t whose i-th choice it is, -1 after
    the last. first_items: ``[KV * chunks + 1]`` int32, where the items of each head's chunk begin, and their end. What
    lies beyond the last item is undefined.
    """

    chunk: int
    chunks: int
    size: int
    item_blocks: Tensor
    item_pairs: Tensor
    first_items: Tensor


def invert(blocks: Tensor, tables: Tables, chunk: int, size: int) -> Inverse:
    """Sort the pairs (query, choice) of ``blocks [T, KV, n]`` by block, within chunks of queries.

    The order of an item's pairs differs from run to run (atomic counters give it), which changes no result: what a
    pair computes does not depend on its place.
    """
    tokens, kv, n = blocks.shape
    chunks, bins = -(-tokens // chunk), tables.blocks
    counts = blocks.new_zeros(kv * chunks * bins)
    ranks = blocks.new_empty(kv, tokens, n)
    tile = 64
    grid = (-(-tokens // tile), kv)
    shape = {"N": n, "NP": triton.next_power_of_2(n), "TILE": tile}
    args = (tables.block_base, ranks, counts, tokens, chunk, chunks, bins, blocks.stride(0), blocks.stride(1))
    _count_kernel[grid](blocks, *args, **shape)
    ends = ((counts + (size - 1)) // size).cumsum(0, dtype=torch.int32)
    first = torch.nn.functional.pad(ends, (1, 0))  # of each counter, and behind the last one the number of all items
    most = tokens * kv * n // size + min(kv * chunks * bins, tokens * kv * n)
    item_blocks = blocks.new_empty(most)
    item_pairs = blocks.new_full((most, size), -1)
    _fill_kernel[grid](blocks, *args, first, item_blocks, item_pairs, SIZE=size, **shape)
    return Inverse(chunk, chunks, size, item_blocks, item_pairs, first[::bins].contiguous())


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


def lists_by_block(blocks: Tensor, tables: Tables, chunk: int) -> tuple[Tensor, Tensor, int]:
    """The choices of ``blocks [T, KV, n]`` that fell on each block, chunk by chunk of queries, in the queries' order.

    Returns pairs ``[KV * T * n]`` int32, ``t * n + i`` for the i-th choice of query t, sorted by KV head, chunk, block
    of the pack; where each such list begins, ``[KV * chunks * B + 1]`` int32; and the number of chunks. What lies
    beyond the last list is undefined. By a sort, which takes longer than the counting of :func:`invert`, and whose
    order is the same in every run.
    """
    tokens, kv, n = blocks.shape
    chunks = -(-tokens // chunk)
    lists = kv * chunks * tables.blocks
    t = torch.arange(tokens, device=blocks.device)
    head = torch.arange(kv, device=blocks.device)[:, None, None]
    by_head = blocks.transpose(0, 1)
    list_of = (head * chunks + (t // chunk)[:, None]) * tables.blocks + tables.block_base[:, None] + by_head
    sorted_lists, order = torch.sort(torch.where(by_head >= 0, list_of, lists).flatten(), stable=True)
    first = torch.searchsorted(sorted_lists, torch.arange(lists + 1, device=blocks.device))
    return (order % (tokens * n)).to(torch.int32), first.to(torch.int32), chunks


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


@triton.jit(do_not_specialize=["tokens", "chunk", "chunks", "bins"])
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
    tl.store(item_pairs + item * SIZE + rank % SIZE, (t[:, None] * N + i[None, :]).to(tl.int32), mask=there)
