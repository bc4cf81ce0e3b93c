"""Which blocks single queries select over a paged cache, in Triton, from what compressed attention left behind."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_up(
    sums,
    edges,
    bases,
    tops,
    totals,
    at,
    first,
    ended,
    pages,
    splits,
    parts,
    SP: tl.constexpr,
    EACH: tl.constexpr,
    TILE: tl.constexpr,
    LAGS: tl.constexpr,
    PER: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
):
    """Importance ``[EACH]`` of blocks (NSA eq. 9), summed over the group (eq. 10)."""
    o_g, o_s, o_t, o_p = tl.arange(0, GP), tl.arange(0, SP), tl.arange(0, EACH // TILE), tl.arange(0, TILE)
    in_g, tiles = (o_g < G)[None, :], tl.cdiv(pages, TILE)
    inside = (o_s < splits)[:, None] & in_g
    each = (at * parts + o_s)[:, None] * G + o_g[None, :]
    b_tops = tl.load(tops + each, mask=inside, other=float("-inf"))
    m = tl.max(b_tops, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp2(b_tops - m[None, :]) * tl.load(totals + each, mask=inside, other=0.0), 0)
    lse = tl.where(total > 0.0, m + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))
    tile = first // TILE + o_t
    page = tile[:, None] * TILE + o_p[None, :]
    seen = (page * PER < ended)[:, :, None] & in_g[None, :, :]
    sum_ = tl.load(sums + ((at * pages + page) * G)[:, :, None] + o_g[None, None, :], mask=seen, other=0.0)
    known = (tile * TILE * PER < ended)[:, None] & in_g
    base = tl.load(bases + (at * tiles + tile)[:, None] * G + o_g[None, :], mask=known, other=0.0)
    if LAGS == 2:
        known = ((tile + 1) * TILE * PER < ended)[:, None] & in_g
        at_next = (at * tiles + tile + 1)[:, None] * G + o_g[None, :]
        edge = tl.load(edges + at_next, mask=known, other=0.0)
        # Both to the higher base, as what one gives to a lower one may be infinite. 1 among equals, which stay so.
        following = tl.load(bases + at_next, mask=known, other=float("-inf"))
        higher = tl.maximum(base, following)
        edge *= tl.exp2(following - higher)
        sum_ *= tl.exp2(base - higher)[:, None, :]
        sum_ += tl.where((o_p == TILE - 1)[None, :, None], edge[:, None, :], 0.0)
        base = higher
    return tl.reshape(tl.sum(sum_ * tl.exp2(base - lse[None, :])[:, None, :], 2), [EACH])


@triton.jit
def _put_best(bits, index, out, step: tl.constexpr, scores: tl.constexpr, count: tl.constexpr):
    """Store the indices of the highest numbers, in order, of equals the lower; -1 where a number is below 0. ``step``
    elements apart, each with its number behind it if ``scores``."""
    for i in range(count):
        best = tl.max(bits, 0)
        first = tl.min(tl.where(bits == best, index, 2147483647), 0)
        tl.store(out + i * step, tl.where(best >= 0, first, -1))
        if scores:
            tl.store(out + i * step + 1, best)
        bits = tl.where(index == first, -1, bits)


@triton.jit(do_not_specialize=["pages", "splits", "parts"])
def choose_kernel(
    sums,
    edges,
    bases,
    tops,
    totals,
    positions,
    best,
    arrivals,
    chosen,
    pages,
    splits,
    parts,
    SP: tl.constexpr,
    EACH: tl.constexpr,
    CP: tl.constexpr,
    TILE: tl.constexpr,
    LAGS: tl.constexpr,
    PER: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The forced blocks, then the most important others, of equals the lower; -1 for each one that does not exist.

    Programs share the blocks; each finds the best of its own, and the last one the best of these. Each is one warp, in
    which a search needs no barrier.
    """
    at, c, programs = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    t = tl.load(positions + at // KV).to(tl.int32)
    own = t // BLOCK
    FREE: tl.constexpr = COUNT - INITIAL - LOCAL
    out = chosen + at * COUNT + INITIAL + LOCAL
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Queries that take all blocks need no importance; nor do blocks that are forced.
    if (own >= COUNT) & (c * EACH <= own - LOCAL):
        block = c * EACH + tl.arange(0, EACH)
        acc = _add_up(
            *(sums, edges, bases, tops, totals, at, c * EACH, (t + 1) // STRIDE, pages, splits, parts),
            *(SP, EACH, TILE, LAGS, PER, G, GP),
        )
        # Numbers that are not negative have the order of their bits, and the largest integer is found at once.
        bits = tl.where((block >= INITIAL) & (block <= own - LOCAL), acc.to(tl.int32, bitcast=True), -1)
        _put_best(bits, block, best + (at * programs + c) * FREE * 2, 2, True, FREE)
    tl.debug_barrier()  # what all threads stored comes before the arrival of one of them
    if tl.atomic_add(arrivals + at, 1) == programs - 1:
        for i in tl.static_range(INITIAL):
            tl.store(chosen + at * COUNT + i, tl.where(i <= own - LOCAL, i, -1))
        for i in tl.static_range(LOCAL):
            tl.store(chosen + at * COUNT + INITIAL + i, tl.maximum(own - LOCAL + 1 + i, -1))
        if own >= COUNT:
            o_c = tl.arange(0, CP)
            there = (o_c < programs * FREE) & (o_c // (FREE if FREE else 1) * EACH <= own - LOCAL)
            # Past the first-level cache, which does not see what other multiprocessors write.
            place = best + (at * programs * FREE + o_c) * 2
            block = tl.load(place, mask=there, other=-1, cache_modifier=".cg")
            bits = tl.load(place + 1, mask=there, other=-1, cache_modifier=".cg")
            _put_best(bits, block, out, 1, False, FREE)
        else:
            for j in range(FREE):
                tl.store(out + j, tl.where(INITIAL + j <= own - LOCAL, INITIAL + j, -1))
