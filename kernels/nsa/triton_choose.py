"""The choice of blocks in Triton: importance from compressed attention, summed over a group, then exact top-n.

The scores of a chunk of queries exist at a time, twice ``[KV, chunk, blocks]`` float32; no weight of a compressed key
does. The second are shares in the next block, of the compressed keys that reach into it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch
from shoal.kernels.nsa.triton_select import LOG2E, halves, load_keys, load_rows, padded, precision
from shoal.kernels.nsa.triton_tables import Tables

SCORES = 1 << 25
"""Most scores of blocks that exist at a time: 256 MB, with what the next blocks get."""


@dataclass(frozen=True)
class ChooseTuning:
    """chunk: queries scored at a time. rows: of a matrix product, queries times padded group. blocks: of a tile. wide:
    in Gluon on Hopper for 192 dimensions of queries and keys, too, as it is for 64 and 128. top_group: blocks of a
    group, a power of two, whose best one is remembered while others are taken; more where there would be more than 16
    groups, each of which is code of its own."""

    chunk: int = 8192
    rows: int = 128
    blocks: int = 16
    warps: int = 4
    stages: int = 2
    top_warps: int = 1
    wide: bool = True
    top_group: int = 128


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
    tokens, heads, _ = q.shape
    kv, n = k_cmp.shape[1], sizes.slc_count
    blocks = torch.empty(tokens, kv, n, dtype=torch.int32, device=q.device)
    # Only the first document of a tile is scored: in one that begins in a tile, the tile's queries take all blocks.
    tile = min(max(1, tuning.rows // padded(heads // kv, least=1)), 1 << (n * sizes.slc_block).bit_length() - 1)
    longest = tables.longest_within(0, tokens)
    width = triton.cdiv(max(longest, 1), tuning.blocks) * tuning.blocks
    chunk = min(tuning.chunk, tokens, max(tile, SCORES // (kv * width)))
    scores = torch.empty(2, kv, chunk, width, dtype=torch.float32, device=q.device)
    score = _for_hopper(q, k_cmp, tables, tuning.wide) or partial(score_blocks, tile=tile, tuning=tuning)
    for start, stop in tables.chunks(tokens, chunk):
        seen = padded(tables.longest_within(start, stop))
        if longest > n > sizes.slc_initial + sizes.slc_local:
            score(q, k_cmp, lse, tables, scale, scores, start, stop)
        warps = max(tuning.top_warps, seen // 2048)  # with more of them, a warp has no registers for all scores
        launch(
            _top_kernel,
            (stop - start, kv),
            *(scores, tables.starts, blocks, start, width, chunk),
            WIDTH=seen,
            GROUP=min(max(tuning.top_group, seen // 16), seen),
            KV=kv,
            COUNT=n,
            INITIAL=sizes.slc_initial,
            LOCAL=sizes.slc_local,
            BLOCK=sizes.slc_block,
            num_warps=warps,
        )
    return blocks


def _for_hopper(q: Tensor, k_cmp: Tensor, tables: Tables, wide: bool) -> Callable[..., None] | None:
    """The twin of :func:`score_blocks` in Gluon, where it takes these."""
    if not q.is_cuda:
        return None
    from shoal.kernels.nsa.gluon_importance import block_scores, supported

    return block_scores if supported(q, k_cmp, tables.sizes, wide=wide) else None


def score_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    tables: Tables,
    scale: float,
    scores: Tensor,
    start: int,
    stop: int,
    tile: int,
    tuning: ChooseTuning,
) -> None:
    """Scores of the queries from ``start`` to ``stop``, ``tile`` of them at a time: ``scores[0, h, t - start]`` of each
    block, ``scores[1]`` what the block after it gets. scores: ``[2, KV, chunk, width]`` float32. Written are those of
    blocks before the local ones, of queries that have to choose."""
    kv, group, sizes = k_cmp.shape[1], q.shape[1] // k_cmp.shape[1], tables.sizes
    per_slc = sizes.slc_block // sizes.cmp_stride
    launch(
        _importance_kernel,
        (triton.cdiv(stop - start, tile), kv),
        *(q, k_cmp, lse, tables.starts, tables.cmp.low, tables.cmp.high, scores, scale * LOG2E),
        *(start, stop, scores.shape[3], scores.shape[2]),
        G=group,
        GP=padded(group, least=1),
        TILE=tile,
        BJ=tuning.blocks,
        PER_CMP=sizes.cmp_block // sizes.cmp_stride,
        PER_SLC=per_slc,
        PER_P=padded(per_slc, least=1),
        PRECISION=precision(q.dtype),
        KV=kv,
        COUNT=sizes.slc_count,
        LOCAL=sizes.slc_local,
        BLOCK=sizes.slc_block,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **halves(q.shape[2]),
    )


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
    scale,
    own,
    carried,
    inside,
    width,
    MASK: tl.constexpr,
    h,
    KV,
    GP,
    TILE,
    D,
    D1,
    D2,
    BJ,
    PER_CMP,
    PER_SLC,
    PER_P,
    PRECISION,
):
    """Scores of ``BJ`` blocks from the compressed keys that begin in them: their own, and what the next block gets.

    Compressed keys are the rows of the product, so that the sum over a group runs along a thread's own registers.
    """
    o_c = tl.arange(0, BJ * PER_P)
    offset = o_c % PER_P
    columns = base + (block + o_c // PER_P) * PER_SLC + offset
    held = offset < PER_SLC
    if MASK:
        held = held & (columns < tl.max(high, 0))
    b_k, b_k2 = load_rows(k, columns.to(tl.int64) * KV + h, held, D, D1, D2)
    s = tl.dot(b_k, b_q, input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(b_k2, b_q2, s, input_precision=PRECISION)
    p = tl.exp2(s * scale - b_lse[None, :])
    if MASK:
        p = tl.where((columns[:, None] >= low[None, :]) & (columns[:, None] < high[None, :]), p, 0.0)
    p = tl.sum(tl.reshape(p, [BJ * PER_P, TILE, GP]), 2)
    # A compressed key counts once for each piece of d keys that it shares with a block (NSA eq. 9).
    shared = tl.where(held, tl.minimum(PER_CMP, PER_SLC - offset), 0)
    above = tl.where(held, tl.maximum(PER_CMP - (PER_SLC - offset), 0), 0)
    here = tl.sum(tl.reshape(p * shared.to(tl.float32)[:, None], [BJ, PER_P, TILE]), 1)
    next_ = tl.sum(tl.reshape(p * above.to(tl.float32)[:, None], [BJ, PER_P, TILE]), 1)
    at = (block + tl.arange(0, BJ))[:, None] + (tl.arange(0, TILE) * width)[None, :]
    tl.store(own + at, here, mask=inside[None, :])
    tl.store(carried + at, next_, mask=inside[None, :])


@triton.jit(do_not_specialize=["start", "stop", "chunk"])
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
    PER_P: tl.constexpr,
    PRECISION: tl.constexpr,
    KV: tl.constexpr,
    COUNT: tl.constexpr,
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
    b_q, b_q2 = load_keys(q, rows, there, D, D1, D2)
    # Rows that do not count weigh nothing: their log-sum-exp is infinite.
    b_lse = tl.load(lse + rows, mask=there, other=float("inf")) * 1.4426950408889634
    base = tl.load(low + first)
    b_high = tl.load(high + t, mask=mine, other=0)
    b_low = tl.where(mine, base, 0)
    fewest = tl.min(tl.where(mine, b_high, 2147483647), 0)
    tiles = tl.cdiv(own - LOCAL + 1, BJ)
    clear = tl.minimum(tl.maximum((fewest - base) // (PER_SLC * BJ), 0), tiles)
    out = scores + (h.to(tl.int64) * chunk + first - start) * width
    carried = scores + ((KV + h.to(tl.int64)) * chunk + first - start) * width
    inside = (first + tl.arange(0, TILE)) < stop
    for i in range(0, clear):
        _importance_step(
            *(b_q, b_q2, k, b_lse, base, b_low, b_high, i * BJ, scale, out, carried, inside, width, False),
            *(h, KV, GP, TILE, D, D1, D2, BJ, PER_CMP, PER_SLC, PER_P, PRECISION),
        )
    for i in range(clear, tiles):
        _importance_step(
            *(b_q, b_q2, k, b_lse, base, b_low, b_high, i * BJ, scale, out, carried, inside, width, True),
            *(h, KV, GP, TILE, D, D1, D2, BJ, PER_CMP, PER_SLC, PER_P, PRECISION),
        )


@triton.jit(do_not_specialize=["start", "chunk"])
def _top_kernel(
    scores,
    starts,
    blocks,
    start,
    width,
    chunk,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    KV: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The blocks of one query and KV head: the largest score is taken out, n - forced times, and looked for again among
    those of its group alone."""
    row = tl.program_id(0)
    h = tl.program_id(1)
    t = (start + row).to(tl.int64)
    out = blocks + (t * KV + h) * COUNT
    own = ((t - tl.load(starts + t)) // BLOCK).to(tl.int32)
    for i in tl.static_range(INITIAL):
        tl.store(out + i, tl.where(i <= own - LOCAL, i, -1))
    for i in tl.static_range(LOCAL):
        tl.store(out + INITIAL + i, tl.maximum(own - LOCAL + 1 + i, -1))
    rows = scores + (h.to(tl.int64) * chunk + row) * width
    carried = scores + ((KV + h.to(tl.int64)) * chunk + row) * width
    if GROUP >= WIDTH:
        score = _free_scores(rows, carried, own, tl.arange(0, WIDTH), COUNT, INITIAL, LOCAL)
        for i in range(INITIAL + LOCAL, COUNT):
            best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            tl.store(out + i, tl.where(best >= 0.0, index, -1))
            score = tl.where(tl.arange(0, WIDTH) == index, -1.0, score)
    else:
        groups = ()
        for j in tl.static_range(WIDTH // GROUP):
            score = _free_scores(rows, carried, own, j * GROUP + tl.arange(0, GROUP), COUNT, INITIAL, LOCAL)
            best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            groups = groups + ((score, best, index),)  # type: ignore[assignment]  # noqa: RUF005
        for i in range(INITIAL + LOCAL, COUNT):
            _score, best, index = groups[0]  # type: ignore[misc]
            winner = 0
            for j in tl.static_range(1, WIDTH // GROUP):
                more = groups[j][1] > best  # of equals the lower
                best = tl.where(more, groups[j][1], best)
                index = tl.where(more, groups[j][2], index)
                winner = tl.where(more, j, winner)
            tl.store(out + i, tl.where(best >= 0.0, winner * GROUP + index, -1))
            rest = ()
            for j in tl.static_range(WIDTH // GROUP):
                rest = rest + (_without(groups[j][0], groups[j][1], groups[j][2], winner == j, GROUP),)  # type: ignore[assignment]  # noqa: RUF005
            groups = rest


@triton.jit
def _free_scores(rows, carried, own, block, COUNT: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Scores of some blocks; -1 of those that are forced, or that a query does not see."""
    free = (block >= INITIAL) & (block <= own - LOCAL)
    # Queries that take all blocks were not scored.
    scored = free & (own >= COUNT)
    score = tl.load(rows + block, mask=scored, other=0.0)
    score += tl.load(carried + block - 1, mask=scored & (block > 0), other=0.0)
    return tl.where(free, score, -1.0)


@triton.jit
def _without(score, best, index, gone, GROUP: tl.constexpr):
    """A group's scores, its best one and where that stands; where ``gone``, without the one that was best."""
    if gone:
        score = tl.where(tl.arange(0, GROUP) == index, -1.0, score)
        best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    return score, best, index
