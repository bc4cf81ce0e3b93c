"""Gradients of selected attention, in Triton: a program holds a block and reads the queries of a chunk that chose it.

A query's gradient comes in parts, one for each of its blocks, which a second kernel sums. Adding them up in memory with
atomic operations takes as long: those run at 2 TB/s in the L2 cache. Chunks are so small that what is gathered of their
queries stays in that cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch
from shoal.kernels.nsa.triton_inverse import (
    ends_by_head,
    invert,
    item_bytes,
    list_bytes,
    lists_by_block,
    longest_first,
    segments,
)
from shoal.kernels.nsa.triton_select import LOG2E, halves, load_rows, padded, precision
from shoal.kernels.nsa.triton_span_grad import Grads, score_weights
from shoal.kernels.nsa.triton_tables import PackTables


@dataclass(frozen=True)
class GatherGradTuning:
    """chunk: queries whose parts exist at a time. item: queries of a program, a power of two. rows: of a tile, queries
    times padded group. hopper: in Gluon where that takes the shapes, whatever item and rows say. wide: also for 192
    dimensions of queries and keys."""

    chunk: int = 3072
    item: int = 64
    rows: int = 64
    warps: int = 4
    stages: int = 2
    merge_warps: int = 4
    hopper: bool = True
    wide: bool = True


def selected_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    base: Tensor,
    dots: Tensor,
    blocks: Tensor,
    tables: PackTables,
    scale: float,
    grads: Grads,
    *,
    alone: bool = False,
    deterministic: bool = False,
    tuning: GatherGradTuning | None = None,
) -> Tensor:
    """Add the gradients of ``selected_by_query(q, k, v, blocks, …)`` times its gates to d_k and d_v of ``grads``.

    base, dots: as in :func:`shoal.kernels.nsa.triton_span_grad.span_backward`. Returns the gradient of the queries,
    ``[T, H, D]`` in q's dtype: this one's and what ``grads.d_q`` holds, times the scale. alone: whatever ``grads.d_q``
    holds is replaced by this gradient, not multiplied by the scale, and that is returned. deterministic: a block sums
    its queries in their order.
    """
    tuning = tuning or GatherGradTuning()
    tokens, heads, dim = q.shape
    kv, n = v.shape[1], blocks.shape[2]
    d_q = grads.d_q if alone else torch.empty_like(q)
    if not tokens:
        return d_q
    chunk = min(tuning.chunk, tokens)
    part = torch.empty(chunk, n, heads, dim, dtype=q.dtype, device=q.device)
    hopper = None if deterministic or not tuning.hopper else for_hopper(q, v, tables, wide=tuning.wide)
    shared = ((q, k, v, d_out, base, dots), part, blocks, tables, scale, grads, tuning)
    of_chunk = (chunk, kv, n, tables.blocks)
    room = list_bytes(*of_chunk) if deterministic else item_bytes(*of_chunk, tuning.item)
    for segment in segments(tokens, chunk, room):
        if hopper:
            find = _parts_on_hopper(hopper, *shared, segment)
        else:
            find = _parts_of_blocks(*shared, segment, deterministic=deterministic)
        for start in range(segment.start * chunk, min(segment.stop * chunk, tokens), chunk):
            stop = min(start + chunk, tokens)
            find(start // chunk, start, stop)
            launch(
                _sum_kernel,
                (stop - start, kv),
                *(grads.d_q, part, blocks, d_q, 1.0 if alone else scale, start, blocks.stride(0), blocks.stride(1)),
                ALONE=alone,
                N=n,
                KV=kv,
                G=heads // kv,
                GP=padded(heads // kv, least=1),
                D=dim,
                DP=padded(dim),
                num_warps=max(tuning.merge_warps, padded(dim) // 32),
            )
        del find  # and what it reads, before there is a next one
    return d_q


def _parts_on_hopper(
    block_parts: Callable[..., None],
    operands: tuple[Tensor, ...],
    part: Tensor,
    blocks: Tensor,
    tables: PackTables,
    scale: float,
    grads: Grads,
    tuning: GatherGradTuning,
    segment: range,
) -> Callable[[int, int, int], None]:
    """What :func:`_parts_of_blocks` returns, of the twin of its kernel in Gluon."""
    inverse = longest_first(invert(blocks, tables, len(part), tuning.item, segment))
    ends, taken = ends_by_head(inverse, blocks.shape[1]), blocks.new_zeros(inverse.chunks)

    def find(index: int, start: int, stop: int) -> None:
        block_parts(*operands, part, inverse, ends, taken, tables, scale, grads, index)

    return find


def _parts_of_blocks(
    operands: tuple[Tensor, ...],
    part: Tensor,
    blocks: Tensor,
    tables: PackTables,
    scale: float,
    grads: Grads,
    tuning: GatherGradTuning,
    segment: range,
    *,
    deterministic: bool,
) -> Callable[[int, int, int], None]:
    """What finds, for the number of a chunk of the segment and its queries' bounds, the parts of their gradients,
    ``part [chunk, n, H, D]``, and adds to the gradients of keys and values."""
    (chunk, n, heads, dim), (kv, dim_v) = part.shape, operands[2].shape[1:]
    if deterministic:
        pairs, first, chunks = lists_by_block(blocks, tables, chunk, segment)
        items, size = pairs, 0
    else:
        inverse = invert(blocks, tables, chunk, tuning.item, segment)
        pairs, first, chunks = inverse.item_pairs, inverse.first_items, inverse.chunks
        items, size = inverse.item_blocks, inverse.size
    group_p = padded(heads // kv, least=1)

    def find(index: int, start: int, stop: int) -> None:
        low, high = tables.reach(start, stop)
        programs = high - low
        if size:
            programs = min((stop - start) * n, programs + (stop - start) * n // size)
        launch(
            _block_kernel,
            (programs, kv),
            *(*operands, grads.d_k, grads.d_v, part, items, pairs, first),
            *(tables.block_first, tables.block_last, tables.own_rows, scale * LOG2E),
            *(start, low, index - segment.start, chunks, tables.blocks),
            ITEM=size,
            N=n,
            KV=kv,
            G=heads // kv,
            GP=group_p,
            TILE=max(1, tuning.rows // group_p),
            E=dim_v,
            EP=padded(dim_v),
            BN=padded(tables.sizes.slc_block),
            PRECISION=precision(part.dtype),
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **halves(dim),
        )

    return find


def for_hopper(q: Tensor, v: Tensor, tables: PackTables, *, wide: bool = True) -> Callable[..., None] | None:
    """The twin of :func:`_block_kernel` in Gluon, where it takes these."""
    if not q.is_cuda:
        return None
    from shoal.kernels.nsa.gluon_gather_grad import block_parts, supported

    return block_parts if supported(q, v, tables.sizes.slc_block, wide=wide) else None


@triton.jit
def _put_part(part, slot, there, ds, b_k, first, D: tl.constexpr, WIDTH: tl.constexpr, PRECISION):
    """Store ``d_s k`` of ``ds [keys, rows]`` as columns ``first …`` of the rows' parts."""
    o_d = first + tl.arange(0, WIDTH)
    dq = tl.dot(tl.trans(ds), b_k, input_precision=PRECISION)
    tl.store(part + slot[:, None] * D + o_d[None, :], dq.to(part.dtype.element_ty), there[:, None] & (o_d < D)[None, :])


@triton.jit
def _add(x, at, held, acc, first, D: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr):
    """Add ``acc [keys, WIDTH]`` to columns ``first …`` of x ``[…, D]``; shared: other programs add to them, too."""
    o_d = first + tl.arange(0, WIDTH)
    inside = held[:, None] & (o_d < D)[None, :]
    p_x = x + at[:, None] * D + o_d[None, :]
    if SHARED:
        tl.atomic_add(p_x, acc, mask=inside, sem="relaxed")
    else:
        tl.store(p_x, tl.load(p_x, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit
def _block_kernel(
    q,
    k,
    v,
    d_out,
    base,
    dots,
    d_k,
    d_v,
    part,
    items,
    pairs,
    first,
    block_first,
    block_last,
    own_rows,
    scale,
    start,
    low,
    chunk,
    chunks,
    blocks,
    ITEM: tl.constexpr,
    N: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h = tl.program_id(1)
    if ITEM:
        # A piece of a block's list: a block that all queries choose would else be one program's.
        item = tl.load(first + h * chunks + chunk) + tl.program_id(0)
        if item >= tl.load(first + h * chunks + chunk + 1):
            return
        block = tl.load(items + item)
        pairs += item.to(tl.int64) * ITEM
        begin, stop = 0, tl.sum((tl.load(pairs + tl.arange(0, ITEM)) >= 0).to(tl.int32), 0)
    else:
        block = low + tl.program_id(0)
        counter = (h * chunks + chunk) * blocks + block
        begin, stop = tl.load(first + counter), tl.load(first + counter + 1)
        if begin >= stop:
            return
    o_n, o_e, o_r = tl.arange(0, BN), tl.arange(0, EP), tl.arange(0, TILE * GP)
    keys = tl.load(block_first + block) + o_n
    # The last block of a document ends with it: what stands behind it is another program's.
    held = keys < tl.load(block_last + block)
    at = keys.to(tl.int64) * KV + h
    b_k, b_k2 = load_rows(k, at, held, D, D1, D2)
    b_v = tl.load(v + at[:, None] * E + o_e[None, :], mask=held[:, None] & (o_e < E)[None, :], other=0.0)
    dk = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv = tl.zeros([BN, EP], tl.float32)
    for step in range(begin, stop, TILE):
        place = step + o_r // GP
        there = (place < stop) & (o_r % GP < G)
        pair = tl.load(pairs + place, mask=place < stop, other=0)
        t = pair // N
        rows = (t.to(tl.int64) * KV + h) * G + o_r % GP
        b_q, b_q2 = load_rows(q, rows, there, D, D1, D2)
        b_do = tl.load(d_out + rows[:, None] * E + o_e[None, :], there[:, None] & (o_e < E)[None, :], other=0.0)
        b_base = tl.load(base + rows, mask=there, other=float("inf"))
        b_dots = tl.load(dots + rows, mask=there, other=0.0)
        w, dp = score_weights(b_k, b_k2, b_v, b_q, b_q2, b_do, b_base, scale, D2, PRECISION)
        # Of its own block a query sees what stands before it, of others all. Keys that do not exist are zeros, whose
        # weight may be infinite.
        own = tl.load(own_rows + t, mask=there, other=0)
        w = tl.where((keys[:, None] <= own[None, :]) & held[:, None], w, 0.0)
        ds = (w * (dp - b_dots[None, :])).to(b_q.dtype)
        dv = tl.dot(w.to(b_do.dtype), b_do, dv, input_precision=PRECISION)
        dk = tl.dot(ds, b_q, dk, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, b_q2, dk2, input_precision=PRECISION)
        slot = ((pair - start * N).to(tl.int64) * KV + h) * G + o_r % GP
        _put_part(part, slot, there, ds, b_k, 0, D, D1, PRECISION)
        if D2 > 0:
            _put_part(part, slot, there, ds, b_k2, D1, D, D2, PRECISION)
    _add(d_v, at, held, dv, 0, E, EP, ITEM > 0)
    _add(d_k, at, held, dk, 0, D, D1, ITEM > 0)
    if D2 > 0:
        _add(d_k, at, held, dk2, D1, D, D2, ITEM > 0)


@triton.jit
def _sum_kernel(
    beside,
    part,
    blocks,
    d_q,
    scale,
    start,
    stride_t,
    stride_h,
    ALONE: tl.constexpr,
    N: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Sum the parts of one query and KV head, in the order of its choices, and, unless alone, what others found."""
    t = start + tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    o_g, o_d = tl.arange(0, GP), tl.arange(0, DP)
    inside = (o_g < G)[:, None] & (o_d < D)[None, :]
    at = ((t * KV + h) * G + o_g)[:, None] * D + o_d[None, :]
    if ALONE:
        acc = tl.zeros([GP, DP], tl.float32)
    else:
        acc = tl.load(beside + at, mask=inside, other=0.0)
    slots = tl.program_id(0).to(tl.int64) * N * KV + h
    for i in tl.static_range(N):
        yes = tl.load(blocks + t * stride_t + h * stride_h + i) >= 0
        slot = (slots + i * KV) * G + o_g
        # Read before it is known whether somebody wrote it: else each part waits for its own choice.
        b_part = tl.load(part + slot[:, None] * D + o_d[None, :], inside, 0.0, eviction_policy="evict_first")
        acc += tl.where(yes, b_part.to(tl.float32), 0.0)
    tl.store(d_q + at, (acc * scale).to(d_q.dtype.element_ty), mask=inside)
