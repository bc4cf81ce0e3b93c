"""NSA over a paged cache, in Triton: single queries, as a decode step has them, and chunks of a prompt.

Single queries take five launches, each with work for many programs even when there is one query: scores on compressed
rows and their partial outputs, the blocks' importance, the choice, partial outputs of chosen and window pages, their
sum. Nothing is read by the host and no size depends on how long the sequences are, only on how many pages the tables
have room for: a CUDA graph can hold it. A chunk's keys and values are copied out of their pages and read by the kernels
of training.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.nsa.layout import BlockSizes
from shoal.kernels.nsa.paged import DecodeTables, HiddenGates, PagedCache
from shoal.kernels.nsa.triton_forward import ForwardTuning, attend
from shoal.kernels.nsa.triton_paged_sum import sum_branches
from shoal.kernels.nsa.triton_select import LOG2E, halves, load_keys, load_rows, padded, precision, query_keys
from shoal.kernels.nsa.triton_tables import chunk_tables

IMPORTANT = 32  # blocks whose importance a program adds up


@dataclass(frozen=True)
class PagedTuning:
    """rows: compressed rows of a tile. programs: how many share the compressed rows of all queries, about."""

    rows: int = 64
    programs: int = 512
    warps: int = 4


def triton_paged_decode(
    q: Tensor,
    gates: Tensor | HiddenGates,
    cache: PagedCache,
    tables: DecodeTables,
    sizes: BlockSizes,
    scale: float,
    tuning: PagedTuning | None = None,
) -> Tensor:
    """What :func:`shoal.kernels.nsa.paged.paged_decode` returns, from the same arguments. scale: above 0."""
    tuning = tuning or PagedTuning()
    n, heads, dim = q.shape
    kv, dim_v = cache.v_slc.shape[1], cache.v_slc.shape[3]
    pages, windows = tables.far.shape[-1], tables.near.shape[-1]
    per = sizes.slc_block // sizes.cmp_stride
    out = q.new_empty(n, heads, dim_v)
    if not n:
        return out
    tile = max(1, tuning.rows // per)  # pages of a tile
    tiles = triton.cdiv(pages, tile)
    splits = min(tiles, max(1, triton.cdiv(tuning.programs, n * kv)))
    parts = splits + sizes.slc_count + windows
    group = heads // kv

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(n, kv, *shape, dtype=dtype, device=q.device)

    weights, part = empty(group, pages * per), empty(parts, group, dim_v)
    tops, totals = empty(parts, group), empty(parts, group)
    importance, chosen = empty(pages), empty(sizes.slc_count, dtype=torch.int32)
    # What grows with the sequences is no constant of a kernel: it would be compiled again and again while serving.
    shape = {"G": group, "GP": padded(group), "E": dim_v, "EP": padded(dim_v)}
    rows = {"PER": per, "SKIPPED": sizes.cmp_block // sizes.cmp_stride - 1, "STRIDE": sizes.cmp_stride}
    _compressed_kernel[(n, kv, splits)](
        *(q.contiguous(), cache.k_cmp, cache.v_cmp, tables.positions, tables.far, weights, part, tops, totals),
        *(scale * LOG2E, pages, triton.cdiv(tiles, splits), parts),
        BJ=padded(tile, least=1),
        PER_P=padded(per, least=1),
        PRECISION=precision(q.dtype),
        num_warps=tuning.warps,
        **shape,
        **rows,
        **halves(dim),
    )
    choice = {"COUNT": sizes.slc_count, "INITIAL": sizes.slc_initial, "LOCAL": sizes.slc_local}
    if pages > sizes.slc_count:
        width = min(IMPORTANT, padded(pages, least=1))
        _importance_kernel[(n, kv, triton.cdiv(pages, width))](
            *(weights, tops, totals, tables.positions, importance, pages, splits, parts),
            SP=padded(splits, least=1),
            WIDTH=width,
            BLOCK=sizes.slc_block,
            **shape,
            **rows,
            **choice,
        )
    width = padded(pages)
    _choose_kernel[(n, kv)](
        *(importance, tables.positions, chosen, pages),
        WIDTH=width,
        BLOCK=sizes.slc_block,
        num_warps=min(8, max(1, width // 1024)),  # within one warp a search needs no barrier
        **choice,
    )
    _pages_kernel[(n, kv, sizes.slc_count + windows)](
        *(q.contiguous(), cache.k_slc, cache.v_slc, cache.k_win, cache.v_win, tables.positions, tables.far),
        *(tables.near, tables.near_first, chosen, part, tops, totals, scale * LOG2E, pages, windows, splits, parts),
        COUNT=sizes.slc_count,
        WINDOW=sizes.window,
        BLOCK=sizes.slc_block,
        BN=padded(sizes.slc_block),
        PRECISION=precision(q.dtype),
        num_warps=tuning.warps,
        **shape,
        **halves(dim),
    )
    sum_branches((part, tops, totals), gates, out, (splits, splits + sizes.slc_count), group)
    return out


def triton_paged_prefill(
    q: Tensor,
    gates: Tensor,
    cache: PagedCache,
    position: int,
    far: Tensor,
    near: Tensor,
    near_first: int,
    sizes: BlockSizes,
    scale: float,
    tuning: ForwardTuning | None = None,
) -> Tensor:
    """What :func:`shoal.kernels.nsa.paged.paged_prefill` returns, from the same arguments. scale: above 0."""
    far = far[: sizes.slc_blocks(position + q.shape[0])]
    skipped = sizes.cmp_block // sizes.cmp_stride - 1  # rows that do not exist
    k_cmp, v_cmp = (_rows(x, far)[skipped:] for x in (cache.k_cmp, cache.v_cmp))
    k_slc, v_slc = (_rows(x, far) for x in (cache.k_slc, cache.v_slc))
    k_win, v_win = (_rows(x, near) for x in (cache.k_win, cache.v_win))
    tables = chunk_tables(position, q.shape[0], near_first, sizes, q.device)
    tensors = (q.contiguous(), k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates.contiguous())
    return attend(*tensors, tables, scale, tuning or ForwardTuning()).out


def _rows(cache: Tensor, pages: Tensor) -> Tensor:
    """Rows of a sequence, in order: ``[pages, KV, rows, D]`` at ``pages [P]`` to ``[P · rows, KV, D]``."""
    # A reshape of one page would be a view that is not contiguous.
    return cache[pages].transpose(1, 2).contiguous().view(-1, cache.shape[1], cache.shape[3])


@triton.jit
def _put_part(part, tops, totals, at, m, total, acc, G: tl.constexpr, GP: tl.constexpr, E: tl.constexpr, EP):
    """Store one partial output ``[GP, EP]``, not divided by its sum of weights, with maximum and sum."""
    o_g, o_e = tl.arange(0, GP), tl.arange(0, EP)
    in_g = o_g < G
    tl.store(tops + at * G + o_g, m, mask=in_g)
    tl.store(totals + at * G + o_g, total, mask=in_g)
    inside = in_g[:, None] & (o_e < E)[None, :]
    tl.store(part + (at * G + o_g)[:, None] * E + o_e[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["pages", "tiles", "parts"])
def _compressed_kernel(
    q,
    k,
    v,
    positions,
    far,
    weights,
    part,
    tops,
    totals,
    scale,
    pages,
    tiles,
    parts,
    BJ: tl.constexpr,
    PER: tl.constexpr,
    PER_P: tl.constexpr,
    SKIPPED: tl.constexpr,
    STRIDE: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial attention over some of the compressed rows; their scores, base 2, are kept for the choice."""
    n, h, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at = n * tl.num_programs(1) + h
    o_g, o_e, o_c = tl.arange(0, GP), tl.arange(0, EP), tl.arange(0, BJ * PER_P)
    in_g = o_g < G
    rows = at * G + o_g
    b_q, b_q2 = load_rows(q, rows, in_g, D, D1, D2)
    ended = (tl.load(positions + n).to(tl.int32) + 1) // STRIDE
    m = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, EP], tl.float32)
    first = split * tiles * BJ
    stop = tl.minimum(first + tiles * BJ, tl.minimum(pages, tl.cdiv(ended, PER)))
    for tile in range(first, stop, BJ):
        page = tile + o_c // PER_P
        inside = (o_c % PER_P < PER) & (page < stop)
        row = page * PER + o_c % PER_P
        seen = inside & (row >= SKIPPED) & (row < ended)
        place = tl.load(far + at * pages + page, mask=inside, other=0).to(tl.int64) * PER + o_c % PER_P
        b_k, b_k2 = load_keys(k, place, seen, D, D1, D2)
        b_v = tl.load(v + place[:, None] * E + o_e[None, :], mask=seen[:, None] & (o_e < E)[None, :], other=0.0)
        s = query_keys(b_q, b_q2, b_k, b_k2, D2, PRECISION) * scale
        s = tl.where(seen[None, :], s, float("-inf"))
        tl.store(weights + rows[:, None] * (pages * PER) + row[None, :], s, mask=in_g[:, None] & inside[None, :])
        m_new = tl.maximum(m, tl.max(s, 1))
        # A query without any row yet has m = -inf; 0 in its place keeps exp2(-inf - m) at 0 instead of NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(m - base)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc * fade[:, None], input_precision=PRECISION)
        m = m_new
    _put_part(part, tops, totals, at * parts + split, m, total, acc, G, GP, E, EP)


@triton.jit(do_not_specialize=["pages", "splits", "parts"])
def _importance_kernel(
    weights,
    tops,
    totals,
    positions,
    importance,
    pages,
    splits,
    parts,
    SP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PER: tl.constexpr,
    SKIPPED: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """Importance of ``WIDTH`` blocks (NSA eq. 9), summed over the group (eq. 10), for queries that have to choose."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = n * tl.num_programs(1) + h
    own = tl.load(positions + n).to(tl.int32) // BLOCK
    block = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    if (own < COUNT) | (tl.program_id(2) * WIDTH > own - LOCAL):
        return
    o_g, o_s = tl.arange(0, GP), tl.arange(0, SP)
    inside = (o_s < splits)[:, None] & (o_g < G)[None, :]
    each = (at * parts + o_s)[:, None] * G + o_g[None, :]
    b_tops = tl.load(tops + each, mask=inside, other=float("-inf"))
    m = tl.max(b_tops, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp2(b_tops - m[None, :]) * tl.load(totals + each, mask=inside, other=0.0), 0)
    lse = tl.where(total > 0.0, m + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))
    ended = (tl.load(positions + n).to(tl.int32) + 1) // STRIDE
    acc = tl.zeros([WIDTH], tl.float32)
    for i in tl.static_range(PER + SKIPPED):
        # Row c ends with key (c + 1) · d - 1: a block shares keys with the rows of its page and the next one's first.
        row = block * PER + i
        seen = (row >= SKIPPED) & (row < ended) & (block <= own)
        s = tl.load(
            weights + (at * G + o_g)[:, None] * (pages * PER) + row[None, :],
            mask=(o_g < G)[:, None] & seen[None, :],
            other=float("-inf"),
        )
        shared = min(SKIPPED + 1, i + 1, PER + SKIPPED - i)
        acc += shared * tl.sum(tl.exp2(s - lse[:, None]), 0)
    tl.store(importance + at * pages + block, acc, mask=block < pages)


@triton.jit(do_not_specialize=["pages"])
def _choose_kernel(
    importance,
    positions,
    chosen,
    pages,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """The forced blocks, then the most important others, of equals the lower; -1 for each one that does not exist."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = n * tl.num_programs(1) + h
    own = tl.load(positions + n).to(tl.int32) // BLOCK
    out = chosen + at * COUNT
    for i in tl.static_range(INITIAL):
        tl.store(out + i, tl.where(i <= own - LOCAL, i, -1))
    for i in tl.static_range(LOCAL):
        tl.store(out + INITIAL + i, tl.maximum(own - LOCAL + 1 + i, -1))
    block = tl.arange(0, WIDTH)
    free = (block >= INITIAL) & (block <= own - LOCAL)
    # Queries that take all blocks were not scored.
    score = tl.load(importance + at * pages + block, mask=free & (own >= COUNT) & (block < pages), other=0.0)
    # Numbers that are not negative have the order of their bits, and the largest integer is found in one instruction.
    bits = tl.where(free, score.to(tl.int32, bitcast=True), -1)
    for i in range(INITIAL + LOCAL, COUNT):
        best = tl.max(bits, 0)
        index = tl.min(tl.where(bits == best, block, WIDTH), 0)
        tl.store(out + i, tl.where(best >= 0, index, -1))
        bits = tl.where(block == index, -1, bits)


@triton.jit(do_not_specialize=["pages", "windows", "splits", "parts"])
def _pages_kernel(
    q,
    k_slc,
    v_slc,
    k_win,
    v_win,
    positions,
    far,
    near,
    near_first,
    chosen,
    part,
    tops,
    totals,
    scale,
    pages,
    windows,
    splits,
    parts,
    COUNT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial attention over one page: one of the chosen ones, or one of the window's."""
    n, h, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at = n * tl.num_programs(1) + h
    o_g, o_n, o_e = tl.arange(0, GP), tl.arange(0, BN), tl.arange(0, EP)
    t = tl.load(positions + n).to(tl.int32)
    if i < COUNT:
        block = tl.load(chosen + at * COUNT + i)
        first, low, there = block * BLOCK, 0, block >= 0
        page = tl.load(far + at * pages + block, mask=there, other=0).to(tl.int64)
        k, v = k_slc, v_slc
    else:
        first = tl.load(near_first + n).to(tl.int32) + (i - COUNT) * BLOCK
        low, there = tl.maximum(t - WINDOW + 1, 0), first >= 0
        page = tl.load(near + at * windows + i - COUNT).to(tl.int64)
        k, v = k_win, v_win
    keys = first + o_n
    seen = there & (o_n < BLOCK) & (keys <= t) & (keys >= low)
    b_q, b_q2 = load_rows(q, at * G + o_g, o_g < G, D, D1, D2)
    place = page * BLOCK + o_n
    b_k, b_k2 = load_keys(k, place, seen, D, D1, D2)
    b_v = tl.load(v + place[:, None] * E + o_e[None, :], mask=seen[:, None] & (o_e < E)[None, :], other=0.0)
    s = tl.where(seen[None, :], query_keys(b_q, b_q2, b_k, b_k2, D2, PRECISION) * scale, float("-inf"))
    m = tl.max(s, 1)
    p = tl.exp2(s - tl.where(m == float("-inf"), 0.0, m)[:, None])
    acc = tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
    _put_part(part, tops, totals, at * parts + splits + i, m, tl.sum(p, 1), acc, G, GP, E, EP)
