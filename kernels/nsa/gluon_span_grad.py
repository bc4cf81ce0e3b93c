"""Gradients of attention over spans of keys for Hopper, in Gluon: the twin of ``triton_span_grad``'s atomic way.

A program holds 128 keys, 64 for each of two warpgroups, and goes through the queries that see them, 64 rows (queries
times group) at a time, which a producer warp copies with TMA. The gradients of a tile's queries need what both
warpgroups found: they exchange it, each sums half of the columns, and TMA adds them to memory. While it does, the next
scores are multiplied.

Of 192 dimensions, three pieces of 64 columns, d_k and d_v together would take 160 registers of a thread and leave no
room for two products of scores: one launch finds d_v, another one d_q and d_k. The third piece of d_q is found by the
two warpgroups in turn, tile by tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from shoal.kernels.hopper import descriptor, on_hopper
from shoal.kernels.launches import launch, tiles
from shoal.kernels.nsa.gluon_span_products import consumer, next_tile, queries
from shoal.kernels.nsa.triton_select import LOG2E
from shoal.kernels.nsa.triton_span_grad import Grads
from shoal.kernels.nsa.triton_tables import Span

ROWS = 64
"""Rows of a tile, and keys of a warpgroup."""

STAGES = 2
"""Depth of the rings; 3 is no faster."""


def supported(q: Tensor, v: Tensor, *, wide: bool = True) -> bool:
    """Whether :func:`gluon_span_backward` is to take these: Hopper, 16 bits, 128 dimensions of keys and 64 or 128 of
    values, groups of 4 to 64 heads, powers of two. wide: also 192 dimensions of keys."""
    group, rest = divmod(q.shape[1], v.shape[1])
    return (
        on_hopper(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in ((128, 192) if wide else (128,))
        and v.shape[2] in (64, 128)
        and rest == 0
        and group in (4, 8, 16, 32, 64)
    )


def gluon_span_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    base: Tensor,
    dots: Tensor,
    span: Span,
    seen: Span,
    scale: float,
    grads: Grads,
    *,
    chunk: int = 0,
    lap: int = 64,
) -> None:
    """What ``span_backward`` adds to ``grads``, for tensors as :func:`supported` says.

    chunk: queries of a program, a multiple of 64, 0 for all that see its keys. lap: as in ``SpanGradTuning``, a
    multiple of 64.
    """
    tokens, heads, dim = q.shape
    keys, kv, dim_v = v.shape
    if not tokens or not keys:
        return
    group = heads // kv
    tile, chunk, piece = ROWS // group, chunk or tiles(tokens, ROWS) * ROWS, gcd(dim, 128)
    operands = (
        descriptor(q, tile, group, piece),
        descriptor(k.view(keys, kv * dim), ROWS, piece),
        descriptor(v.view(keys, kv * dim_v), ROWS, dim_v),
        descriptor(d_out, tile, group, dim_v),
        descriptor(base, tile, group, rows=True),
        descriptor(dots, tile, group, rows=True),
        descriptor(grads.d_q, tile, group, 64),
        descriptor(grads.d_k.view(keys, kv * dim), ROWS, 64),
        descriptor(grads.d_v.view(keys, kv * dim_v), ROWS, 64),
        span.low,
        span.high,
        seen.low,
        seen.high,
        scale * LOG2E,
        tokens,
        keys,
        chunk,
        lap,
    )
    grid = (tiles(keys, 2 * ROWS), tiles(tokens, chunk), kv)
    for values, others in ((True, True),) if dim == 128 else ((True, False), (False, True)):
        launch(
            _grad_kernel,
            grid,
            *operands,
            KV=kv,
            G=group,
            D=dim,
            TILE=tile,
            STAGES=STAGES,
            VALUES=values,
            OTHERS=others,
            num_warps=4,
        )


@gluon.jit
def _producer(
    q, k, v, d_out, base, dots, q_ring, o_ring, base_ring, dots_ring, k_smem, v_smem, there, q_full, q_empty, o_full,
    o_empty, seen_low, seen_high, tokens, keys, chunk, lap, G, D, TILE, STAGES,
):  # fmt: skip
    """Copy the keys and values, then queries and gradients of outputs, tile by tile."""
    h = gl.program_id(2)
    WIDTH: gl.constexpr = k.block_type.shape[1]
    PIECES: gl.constexpr = D // WIDTH
    E: gl.constexpr = v.block_type.shape[1]
    count, begin, stop, t, _, _ = queries(seen_low, seen_high, tokens, keys, chunk, lap, TILE)
    if count > 0:
        mbarrier.expect(there, 2 * PIECES * k.block_type.nbytes + 2 * v.block_type.nbytes)
        for c in gl.static_range(2):
            at = gl.program_id(0) * 128 + c * 64
            for piece in gl.static_range(PIECES):
                column = h * D + piece * WIDTH
                tma.async_copy_global_to_shared(k, [at, column], there, k_smem.index(c * PIECES + piece))
            tma.async_copy_global_to_shared(v, [at, h * E], there, v_smem.index(c))
    for i in range(count):
        slot, phase = i % STAGES, (i // STAGES & 1) ^ 1
        mbarrier.wait(q_empty.index(slot), phase)
        mbarrier.expect(q_full.index(slot), PIECES * q.block_type.nbytes + base.block_type.nbytes)
        # i >> 30 is 0, which the compiler does not know: it would unroll the loop, and the producer has few registers.
        for piece in range(PIECES + (i >> 30 if PIECES > 1 else 0)):
            at = [t, h * G, piece * WIDTH]
            tma.async_copy_global_to_shared(q, at, q_full.index(slot), q_ring.index(slot * PIECES + piece))
        tma.async_copy_global_to_shared(base, [t, h * G], q_full.index(slot), base_ring.index(slot))
        mbarrier.wait(o_empty.index(slot), phase)
        mbarrier.expect(o_full.index(slot), d_out.block_type.nbytes + dots.block_type.nbytes)
        tma.async_copy_global_to_shared(d_out, [t, h * G, 0], o_full.index(slot), o_ring.index(slot))
        tma.async_copy_global_to_shared(dots, [t, h * G], o_full.index(slot), dots_ring.index(slot))
        t = next_tile(t, begin, stop, TILE)


@gluon.jit
def _grad_kernel(
    q, k, v, d_out, base, dots, d_q, d_k, d_v, low, high, seen_low, seen_high, scale, tokens, keys, chunk, lap,
    KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    VALUES: gl.constexpr, OTHERS: gl.constexpr,
):  # fmt: skip
    """One program for 128 keys, a chunk of queries and a KV head. VALUES: finds d_v; OTHERS: d_q and d_k."""
    PIECES: gl.constexpr = D // k.block_type.shape[1]
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES * PIECES] + q.block_type.shape, q.layout)  # noqa: RUF005
    o_ring = gl.allocate_shared_memory(q.dtype, [STAGES] + d_out.block_type.shape, d_out.layout)  # noqa: RUF005
    k_smem = gl.allocate_shared_memory(q.dtype, [2 * PIECES] + k.block_type.shape, k.layout)  # noqa: RUF005
    v_smem = gl.allocate_shared_memory(q.dtype, [2] + v.block_type.shape, v.layout)  # noqa: RUF005
    ds_smem = gl.allocate_shared_memory(q.dtype, [4, 64, 64], k.layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2] + d_q.block_type.shape, d_q.layout)  # noqa: RUF005
    base_ring = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, G], base.layout)
    dots_ring = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, G], dots.layout)
    bases = base_ring._reinterpret(gl.float32, [STAGES, 64], NUMBERS)
    all_dots = dots_ring._reinterpret(gl.float32, [STAGES, 64], NUMBERS)
    there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    o_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    o_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(there, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_empty.index(s), count=2)
        mbarrier.init(o_full.index(s), count=1)
        mbarrier.init(o_empty.index(s), count=2)
    for s in gl.static_range(2):
        mbarrier.init(ds_full.index(s), count=2)
        mbarrier.init(ds_empty.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consumer,
                (FIRST, q_ring, o_ring, bases, all_dots, k_smem, v_smem, there, q_full, q_empty, o_full, o_empty,
                 ds_smem, ds_full, ds_empty, dq_smem, d_q, d_k, d_v, low, high, seen_low, seen_high, scale, tokens,
                 keys, chunk, lap, G, D, TILE, STAGES, VALUES, OTHERS),
            ),
            (
                consumer,
                (SECOND, q_ring, o_ring, bases, all_dots, k_smem, v_smem, there, q_full, q_empty, o_full, o_empty,
                 ds_smem, ds_full, ds_empty, dq_smem, d_q, d_k, d_v, low, high, seen_low, seen_high, scale, tokens,
                 keys, chunk, lap, G, D, TILE, STAGES, VALUES, OTHERS),
            ),
            (
                _producer,
                (q, k, v, d_out, base, dots, q_ring, o_ring, base_ring, dots_ring, k_smem, v_smem, there, q_full,
                 q_empty, o_full, o_empty, seen_low, seen_high, tokens, keys, chunk, lap, G, D, TILE, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
