"""The choice of blocks in Triton: importance from compressed attention, summed over a group, then exact top-n.

The scores of a chunk of queries exist at a time, ``[KV, chunk, blocks]`` float32; no weight of a compressed key does.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.nsa.triton_select import LOG2E, halves, load_keys, load_rows, padded, precision, query_keys
from shoal.kernels.nsa.triton_tables import Tables


@dataclass(frozen=True)
class ChooseTuning:
    """chunk: queries scored at a time. rows: of a matrix product, queries times padded group. blocks: of a tile."""

    chunk: int = 8192
    rows: int = 128
    blocks: int = 64
    warps: int = 8
    stages: int = 3
    top_warps: int = 1


def choose_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, tables: Tables, scale: float, tuning: ChooseTuning | None = None
) -> Tensor:
    """The blocks each query and KV head attends to (NSA eq. 8-12), as :func:`shoal.kernels.nsa.select.select` chooses.

    q: ``[T, H, D]``, k_cmp: ``[C, KV, D]``, contiguous. lse: ``[T, H]`` float32, log-sum-exp of the scaled compressed
    scores. Returns ``[T, KV, n]`` int32, counted from the start of the document: ``slc_initial`` and then
    ``slc_local`` forced blocks, then the others from the most important one down, of equals the lower; -1 for each
    one that does not exist, or stands further on.
    """
    tuning, sizes = tuning or ChooseTuning(), tables.sizes
    tokens, heads, dim = q.shape
    kv, n = k_cmp.shape[1], sizes.slc_count
    blocks = torch.empty(tokens, kv, n, dtype=torch.int32, device=q.device)
    group_p = padded(heads // kv, least=1)
    # Only the first document of a tile is scored: in one that begins in a tile, the tile's queries take all blocks.
    tile = min(max(1, tuning.rows // group_p), 1 << (n * sizes.slc_block).bit_length() - 1)
    chunk = min(tuning.chunk, tokens)
    longest = tables.longest_within(0, tokens)
    width = triton.cdiv(max(longest, 1), tuning.blocks) * tuning.blocks
    scores = torch.empty(kv, chunk, width, dtype=torch.float32, device=q.device)
    shape = {"KV": kv, "COUNT": n, "INITIAL": sizes.slc_initial, "LOCAL": sizes.slc_local, "BLOCK": sizes.slc_block}
    for start in range(0, tokens, max(chunk, 1)):
        rows = min(chunk, tokens - start)
        seen = padded(tables.longest_within(start, start + rows))
        if longest > n > sizes.slc_initial + sizes.slc_local:
            _importance_kernel[(triton.cdiv(rows, tile), kv)](
                q,
                k_cmp,
                lse,
                tables.starts,
                tables.cmp.low,
                tables.cmp.high,
                scores,
                scale * LOG2E,
                start,
                start + rows,
                width,
                chunk,
                G=heads // kv,
                GP=group_p,
                TILE=tile,
                BJ=tuning.blocks,
                PER_CMP=sizes.cmp_block // sizes.cmp_stride,
                PER_SLC=sizes.slc_block // sizes.cmp_stride,
                PRECISION=precision(q.dtype),
                num_warps=tuning.warps,
                num_stages=tuning.stages,
                **halves(dim),
                **shape,
            )
        _top_kernel[(rows, kv)](
            scores, tables.starts, blocks, start, width, chunk, WIDTH=seen, num_warps=tuning.top_warps, **shape
        )
    return blocks


@triton.jit
def _importance_step(
    b_q,
    b_q2,
    k,
    b_lse,
    base,
    low,
    high,
    block,
    offset,
    scale,
    acc,
    MASK: tl.constexpr,
    h,
    KV,
    D,
    D1,
    D2,
    BJ,
    PER_CMP,
    PER_SLC,
    PRECISION,
):
    """Add the share of one compression block, ``offset`` from the first that begins in each of ``BJ`` blocks."""
    columns = base + (block + tl.arange(0, BJ)) * PER_SLC + offset
    if not MASK:
        columns = tl.maximum(columns, base)  # of block 0 alone, and only where it is forced: its score is not read
    held = (columns >= base) & (columns < tl.max(high, 0)) if MASK else tl.full([BJ], 1, tl.int1)
    b_k, b_k2 = load_keys(k, columns.to(tl.int64) * KV + h, held, D, D1, D2)
    p = tl.exp2(query_keys(b_q, b_q2, b_k, b_k2, D2, PRECISION) * scale - b_lse[:, None])
    if MASK:
        p = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), p, 0.0)
    shared = tl.minimum(tl.minimum(PER_CMP, offset + PER_CMP), PER_SLC - offset)
    return acc + shared.to(tl.float32) * p


@triton.jit
def _importance_kernel(
    q,
    k,
    lse,
    starts,
    low,
    high,
    scores,
    scale,
    start,
    stop,
    width,
    chunk,
    G: tl.constexpr,
    GP: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BJ: tl.constexpr,
    PER_CMP: tl.constexpr,
    PER_SLC: tl.constexpr,
    PRECISION: tl.constexpr,
    KV: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of the blocks up to the forced local ones, for queries that have to choose."""
    # The last queries score the most blocks: they begin first.
    first = start + (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE
    h = tl.program_id(1)
    o_r = tl.arange(0, TILE * GP)
    t = first + o_r // GP
    origin = tl.load(starts + first)
    mine = (t < stop) & (tl.load(starts + t, mask=t < stop, other=-1) == origin)
    there = mine & (o_r % GP < G)
    own = (tl.max(tl.where(mine, t, 0), 0) - origin) // BLOCK
    if own < COUNT:
        return
    rows = (t.to(tl.int64) * KV + h) * G + o_r % GP
    b_q, b_q2 = load_rows(q, rows, there, D, D1, D2)
    # Rows that do not count weigh nothing: their log-sum-exp is infinite.
    b_lse = tl.load(lse + rows, mask=there, other=float("inf")) * 1.4426950408889634
    base = tl.load(low + first)
    b_high = tl.load(high + t, mask=mine, other=0)
    b_low = tl.where(mine, base, 0)
    fewest = tl.min(tl.where(mine, b_high, 2147483647), 0)
    # Tiles of blocks that need no mask: those all rows see; but block 0 begins before the document's first key.
    tiles = tl.cdiv(own - LOCAL + 1, BJ)
    begin = 0 if INITIAL > 0 else 1
    clear = tl.minimum(tl.maximum((fewest - base) // (PER_SLC * BJ), begin), tiles)
    OFFSETS: tl.constexpr = PER_CMP + PER_SLC - 1
    out = scores + (h.to(tl.int64) * chunk + first - start + tl.arange(0, TILE)) * width
    inside = (first + tl.arange(0, TILE)) < stop
    acc = tl.zeros([TILE * GP, BJ], tl.float32)
    for i in range(begin * OFFSETS, clear * OFFSETS):
        block, offset = i // OFFSETS * BJ, i % OFFSETS
        acc = _importance_step(
            b_q,
            b_q2,
            k,
            b_lse,
            base,
            b_low,
            b_high,
            block,
            offset + 1 - PER_CMP,
            scale,
            acc,
            False,
            h,
            KV,
            D,
            D1,
            D2,
            BJ,
            PER_CMP,
            PER_SLC,
            PRECISION,
        )
        if offset == OFFSETS - 1:
            summed = tl.sum(tl.reshape(acc, [TILE, GP, BJ]), 1)
            tl.store(out[:, None] + block + tl.arange(0, BJ)[None, :], summed, mask=inside[:, None])
        acc = tl.where(offset == OFFSETS - 1, 0.0, acc)
    for i in range(0, (tiles - clear + begin) * OFFSETS):
        block, offset = i // OFFSETS, i % OFFSETS
        block = tl.where(block < begin, 0, block + clear - begin) * BJ
        acc = _importance_step(
            b_q,
            b_q2,
            k,
            b_lse,
            base,
            b_low,
            b_high,
            block,
            offset + 1 - PER_CMP,
            scale,
            acc,
            True,
            h,
            KV,
            D,
            D1,
            D2,
            BJ,
            PER_CMP,
            PER_SLC,
            PRECISION,
        )
        if offset == OFFSETS - 1:
            summed = tl.sum(tl.reshape(acc, [TILE, GP, BJ]), 1)
            tl.store(out[:, None] + block + tl.arange(0, BJ)[None, :], summed, mask=inside[:, None])
        acc = tl.where(offset == OFFSETS - 1, 0.0, acc)


@triton.jit
def _top_kernel(
    scores,
    starts,
    blocks,
    start,
    width,
    chunk,
    WIDTH: tl.constexpr,
    KV: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The blocks of one query and KV head: the largest score is taken out, n - forced times."""
    row = tl.program_id(0)
    h = tl.program_id(1)
    t = (start + row).to(tl.int64)
    out = blocks + (t * KV + h) * COUNT
    own = ((t - tl.load(starts + t)) // BLOCK).to(tl.int32)
    for i in tl.static_range(INITIAL):
        tl.store(out + i, tl.where(i <= own - LOCAL, i, -1))
    for i in tl.static_range(LOCAL):
        tl.store(out + INITIAL + i, tl.maximum(own - LOCAL + 1 + i, -1))
    block = tl.arange(0, WIDTH)
    free = (block >= INITIAL) & (block <= own - LOCAL)
    # Queries that take all blocks were not scored.
    score = tl.load(scores + (h.to(tl.int64) * chunk + row) * width + block, mask=free & (own >= COUNT), other=0.0)
    score = tl.where(free, score, -1.0)
    for i in range(INITIAL + LOCAL, COUNT):
        best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(out + i, tl.where(best >= 0.0, index, -1))
        score = tl.where(block == index, -1.0, score)
