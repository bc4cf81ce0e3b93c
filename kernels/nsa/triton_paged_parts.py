"""Partial outputs of decode over a paged cache, in Triton: of compressed rows, and of chosen and window pages."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.nsa.triton_select import load_keys, load_rows, query_keys


@triton.jit
def _scores(
    b_q,
    b_q2,
    k,
    v,
    place,
    seen,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores ``[rows, GP]`` of keys with a group's queries ``[D1, GP]`` and ``[D2, GP]``, and values ``[rows, EP]``.

    Rows come first in all that is computed, as a tensor core takes 64 of them and as few as 8 of the queries.
    """
    o_e = tl.arange(0, EP)
    b_k, b_k2 = load_rows(k, place, seen, D, D1, D2)
    b_v = tl.load(v + place[:, None] * E + o_e[None, :], mask=seen[:, None] & (o_e < E)[None, :], other=0.0)
    s = query_keys(b_k, b_k2, b_q, b_q2, D2, PRECISION) * scale
    return tl.where(seen[:, None], s, float("-inf")), b_v


@triton.jit
def _fold(s, b_v, m, total, acc, PRECISION: tl.constexpr):
    """Take scores and values into maxima, sums of weights and outputs ``[EP, GP]`` of the rows before; and the weights,
    with what they are relative to."""
    m_new = tl.maximum(m, tl.max(s, 0))
    # A query without any row yet has m = -inf; 0 in its place keeps exp2(-inf - m) at 0 instead of NaN.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[None, :])
    fade = tl.exp2(m - base)
    total = total * fade + tl.sum(p, 0)
    acc = tl.dot(tl.trans(b_v), p.to(b_v.dtype), acc * fade[None, :], input_precision=PRECISION)
    return m_new, base, total, acc, p


@triton.jit
def _shared_keys(p, lag: tl.constexpr, PER: tl.constexpr, PER_P: tl.constexpr, SKIPPED: tl.constexpr):
    """Weights of pages' rows ``[pages, PER_P, GP]``, summed by how many strides of keys each shares with the block of
    its page, or with the one before (lag 1). Row c ends with key ``(c + 1) · d - 1``."""
    i = lag * PER + tl.arange(0, PER_P)
    shared = tl.maximum(tl.minimum(tl.minimum(SKIPPED + 1, i + 1), PER + SKIPPED - i), 0)
    shared = tl.where(tl.arange(0, PER_P) < PER, shared, 0).to(tl.float32)
    return tl.sum(p * shared[None, :, None], 1)


@triton.jit
def _put_part(part, tops, totals, at, m, total, acc, G: tl.constexpr, GP: tl.constexpr, E: tl.constexpr, EP):
    """Store one partial output ``[EP, GP]``, not divided by its sum of weights, with maximum and sum."""
    o_g, o_e = tl.arange(0, GP), tl.arange(0, EP)
    in_g = o_g < G
    tl.store(tops + at * G + o_g, m, mask=in_g)
    tl.store(totals + at * G + o_g, total, mask=in_g)
    inside = in_g[:, None] & (o_e < E)[None, :]
    tl.store(part + (at * G + o_g)[:, None] * E + o_e[None, :], tl.trans(acc), mask=inside)


@triton.jit(do_not_specialize=["pages", "tiles", "parts"])
def compressed_rows_kernel(
    q,
    k,
    v,
    positions,
    far,
    sums,
    edges,
    bases,
    arrivals,
    part,
    tops,
    totals,
    scale,
    pages,
    tiles,
    parts,
    TILE: tl.constexpr,
    PER: tl.constexpr,
    PER_P: tl.constexpr,
    SKIPPED: tl.constexpr,
    STRIDE: tl.constexpr,
    LAGS: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Partial attention over some of the compressed rows, and what their pages give to blocks' importance."""
    # Heads whose rows lie side by side in a page are read at one time.
    at, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_g, o_c, o_p = tl.arange(0, GP), tl.arange(0, TILE * PER_P), tl.arange(0, TILE)
    in_g = o_g < G
    ended = (tl.load(positions + at // KV).to(tl.int32) + 1) // STRIDE
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if split == 0:
        tl.store(arrivals + at, 0)
    b_q, b_q2 = load_keys(q, at * G + o_g, in_g, D, D1, D2)
    m = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([EP, GP], tl.float32)
    first = split * tiles * TILE
    stop = tl.minimum(first + tiles * TILE, tl.minimum(pages, tl.cdiv(ended, PER)))
    for tile in range(first, stop, TILE):
        page = tile + o_c // PER_P
        row = page * PER + o_c % PER_P
        seen = (o_c % PER_P < PER) & (row >= SKIPPED) & (row < ended) & (page < pages)
        place = tl.load(far + at * pages + page, mask=seen, other=0).to(tl.int64) * PER + o_c % PER_P
        s, b_v = _scores(b_q, b_q2, k, v, place, seen, scale, D, D1, D2, E, EP, PRECISION)
        m, base, total, acc, p = _fold(s, b_v, m, total, acc, PRECISION)
        tiled = (at * tl.cdiv(pages, TILE) + tile // TILE) * G + o_g
        tl.store(bases + tiled, base, mask=in_g)
        by_page = tl.reshape(p, [TILE, PER_P, GP])
        sum_ = _shared_keys(by_page, 0, PER, PER_P, SKIPPED)
        if LAGS == 2:
            after = _shared_keys(by_page, 1, PER, PER_P, SKIPPED)
            tl.store(edges + tiled, tl.sum(tl.where((o_p == 0)[:, None], after, 0.0), 0), mask=in_g)
            following = tl.minimum(o_p + 1, TILE - 1)[:, None] + tl.zeros([TILE, GP], tl.int32)
            sum_ += tl.where((o_p < TILE - 1)[:, None], tl.gather(after, following, 0), 0.0)
        out = sums + (at * pages + tile + o_p)[:, None] * G + o_g[None, :]
        tl.store(out, sum_, mask=(tile + o_p < pages)[:, None] & in_g[None, :])
    _put_part(part, tops, totals, at * parts + split, m, total, acc, G, GP, E, EP)


@triton.jit(do_not_specialize=["pages", "windows", "splits", "parts", "each"])
def pages_kernel(
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
    each,
    COUNT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Partial attention over ``each`` of the window's pages, which need not wait for the choice, or of those chosen."""
    at, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = at // KV
    o_g, o_n = tl.arange(0, GP), tl.arange(0, BN)
    t = tl.load(positions + n).to(tl.int32)
    b_q, b_q2 = load_keys(q, at * G + o_g, o_g < G, D, D1, D2)
    near_parts = tl.cdiv(windows, each)
    selected = i >= near_parts
    if selected:
        k, v, table = k_slc, v_slc, far + at * pages
        begin, base, low = (i - near_parts) * each, 0, 0
        stop, to = tl.minimum(begin + each, COUNT), splits + i - near_parts
        if AHEAD:
            tl.extra.cuda.gdc_wait()
    else:
        k, v, table = k_win, v_win, near + at * windows
        begin, base = i * each, tl.load(near_first + n).to(tl.int32)
        low = tl.maximum(t - WINDOW + 1, 0)
        stop, to = tl.minimum(begin + each, windows), splits + tl.cdiv(COUNT, each) + i
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([EP, GP], tl.float32)
    for j in range(begin, stop):
        block = tl.where(selected, tl.load(chosen + at * COUNT + j, mask=selected, other=0), j)
        keys = base + block * BLOCK + o_n
        seen = (block >= 0) & (o_n < BLOCK) & (keys <= t) & (keys >= low)
        place = tl.load(table + block, mask=block >= 0, other=0).to(tl.int64) * BLOCK + o_n
        s, b_v = _scores(b_q, b_q2, k, v, place, seen, scale, D, D1, D2, E, EP, PRECISION)
        m, _, total, acc, _ = _fold(s, b_v, m, total, acc, PRECISION)
    _put_part(part, tops, totals, at * parts + to, m, total, acc, G, GP, E, EP)
