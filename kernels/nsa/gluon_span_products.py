"""Gradients of attention over spans of keys for Hopper, in Gluon: which queries a program of ``gluon_span_grad`` goes
through, and what a warpgroup does with them."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from shoal.kernels.hopper import barrier, pieces, scores, split_halves


@builtin
def reduce_add(tensor, at, source, _semantic=None):
    """Add a tile in shared memory to ``tensor``, atomically, by TMA; it is waited for as stores are."""
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor.handle, at, source.handle)


@gluon.jit
def queries(seen_low, seen_high, tokens, keys, chunk, lap, TILE: gl.constexpr):
    """This program's tiles of queries: how many, where they begin and end, the one to begin with; and the queries, if
    any, that see all its keys.

    All programs go through the queries in step, each from a multiple of a lap: those that share queries meet at them,
    and what they add to is still in the L2 cache.
    """
    n = gl.program_id(0) * 128 + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    b_low = gl.load(seen_low + n, mask=n < keys, other=1 << 30)
    b_high = gl.load(seen_high + n, mask=n < keys, other=0)
    some = b_high > b_low
    begin = gl.program_id(1) * chunk
    stop = gl.minimum(begin + chunk, tokens)
    begin = gl.maximum(begin, gl.min(gl.where(some, b_low, 2147483647), 0)) // TILE * TILE
    stop = gl.minimum(stop, gl.max(gl.where(some, b_high, 0), 0))
    turn = gl.cdiv(begin, lap) * lap
    turn = gl.where(turn < stop, turn, begin)
    count = gl.where(begin < stop, gl.cdiv(stop - begin, TILE), 0)
    return count, begin, stop, turn, gl.max(b_low, 0), gl.min(b_high, 0)


@gluon.jit
def next_tile(t, begin, stop, TILE: gl.constexpr):
    """First query of the tile after that of t."""
    return gl.where(t + TILE < stop, t + TILE, begin)


@gluon.jit
def _query_grads(column: gl.constexpr, j, ds_smem, k_parts, S: gl.constexpr):
    """Begin 64 of the columns of ``d_sᵀ k`` over both warpgroups' keys, with the j-th d_s, ``[64, 64]``."""
    PARTS: gl.constexpr = k_parts.shape[0] // 2
    zeros = gl.zeros([64, 64], gl.float32, S)
    own = column + (j >> 30)
    dq = warpgroup_mma(
        ds_smem.index(j % 2 * 2).permute((1, 0)), k_parts.index(own), zeros, use_acc=False, is_async=True
    )
    return warpgroup_mma(ds_smem.index(j % 2 * 2 + 1).permute((1, 0)), k_parts.index(PARTS + own), dq, is_async=True)


@gluon.jit
def _put_ds(C: gl.constexpr, j, ds, ds_smem, ds_full, ds_empty):
    """Share the j-th d_s ``[keys, rows]`` with the other warpgroup."""
    mbarrier.wait(ds_empty.index(j % 2), (j // 2 & 1) ^ 1)
    ds_smem.index(j % 2 * 2 + C).store(ds)
    fence_async_shared()
    barrier()
    mbarrier.arrive(ds_full.index(j % 2))


@gluon.jit
def _wait(PIECES: gl.constexpr, dq, dk):
    """Wait for the gradients of queries and of keys, while the next scores, in as many pieces, are multiplied."""
    if PIECES == 1:
        dq, one = warpgroup_mma_wait(1, [dq, dk[0]])
        dk = (one,)
    else:
        dq, one, two, three = warpgroup_mma_wait(3, [dq, dk[0], dk[1], dk[2]])
        dk = (one, two, three)
    return dq, dk


@gluon.jit
def _add_queries(d_q, dq, t, head, column, smem):
    """Add ``dq [64, 64]``, columns of a tile's queries, to memory."""
    tma.store_wait(0)
    smem.reshape([64, 64]).store(dq)
    fence_async_shared()
    reduce_add(d_q, [t, head, column], smem)


@gluon.jit
def _add_keys(x, acc, at, column, smem):
    """Add ``acc [64, 64 or 128]`` to rows of keys."""
    WIDTH: gl.constexpr = acc.shape[1]
    if WIDTH == 64:
        tma.store_wait(0)
        smem.reshape([64, 64]).store(acc)
        fence_async_shared()
        reduce_add(x, [at, column], smem._reinterpret(gl.float32, [64, 64], x.layout))
    else:
        left, right = split_halves(acc)
        _add_keys(x, left, at, column, smem)
        _add_keys(x, right, at, column + 64, smem)


@gluon.jit
def consumer(
    C, q_ring, o_ring, base_ring, dots_ring, k_smem, v_smem, there, q_full, q_empty, o_full, o_empty, ds_smem, ds_full,
    ds_empty, dq_smem, d_q, d_k, d_v, low, high, seen_low, seen_high, scale, tokens, keys, chunk, lap, G, D, TILE,
    STAGES, VALUES, OTHERS,
):  # fmt: skip
    """The gradients of 64 keys and of half the columns of the queries."""
    WIDTH: gl.constexpr = k_smem.shape[2]
    PIECES: gl.constexpr = D // WIDTH
    E: gl.constexpr = v_smem.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ACC_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    ACC_E: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    h = gl.program_id(2)
    count, begin, stop, first, clear_low, clear_high = queries(seen_low, seen_high, tokens, keys, chunk, lap, TILE)
    if count > 0:
        k_parts = k_smem._reinterpret(k_smem.dtype, [D // 32, 64, 64], k_smem.layout)
        n = gl.program_id(0) * 128 + C * 64
        zeros = gl.zeros([64, 64], gl.float32, S)
        dk = ()
        for _c in gl.static_range(PIECES):
            dk = dk + (gl.zeros([64, WIDTH], gl.float32, ACC_D),)  # type: ignore[assignment]  # noqa: RUF005
        dv = gl.zeros([64, E], gl.float32, ACC_E)
        mbarrier.wait(there, 0)
        mbarrier.wait(q_full.index(0), 0)
        b_q = pieces(q_ring, 0, PIECES)
        s = warpgroup_mma_wait(0, [scores(pieces(k_smem, C, PIECES), b_q, PIECES, S)])
        for i in range(count):
            slot, phase = i % STAGES, i // STAGES & 1
            b_q, b_o = pieces(q_ring, slot, PIECES), o_ring.index(slot).reshape([64, E])
            # i >> 30 is 0, which the compiler does not know: it would keep all addresses in registers.
            b_v, b_k = v_smem.index(C + (i >> 30)), pieces(k_smem, C + (i >> 30), PIECES)
            mbarrier.wait(o_full.index(slot), phase)
            if OTHERS:
                dp = warpgroup_mma(b_v, b_o.permute((1, 0)), zeros, use_acc=False, is_async=True)
            b_base = base_ring.index(slot).load(ROW)
            w = gl.exp2(s * scale - b_base[None, :])
            if (first < clear_low) | (first + TILE > clear_high):
                t = first + gl.arange(0, 64, layout=ROW) // G
                b_low = gl.load(low + t, mask=t < tokens, other=0)
                b_high = gl.load(high + t, mask=t < tokens, other=0)
                o_n = n + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
                w = gl.where((o_n[:, None] >= b_low[None, :]) & (o_n[:, None] < b_high[None, :]), w, 0.0)
            if VALUES:
                b_w = gl.convert_layout(w.to(k_smem.dtype), gl.DotOperandLayout(0, ACC_E, 2))
                dv = warpgroup_mma(b_w, b_o, dv, is_async=True)
            if OTHERS:
                b_dots = dots_ring.index(slot).load(ROW)
                dp, w = warpgroup_mma_wait(1 if VALUES else 0, [dp, w])
                if not VALUES:
                    mbarrier.arrive(o_empty.index(slot))
                ds = (w * (dp - b_dots[None, :])).to(k_smem.dtype)
                _put_ds(C, i, ds, ds_smem, ds_full, ds_empty)
                b_ds = gl.convert_layout(ds, gl.DotOperandLayout(0, ACC_D, 2))
                more = ()
                for c in gl.static_range(PIECES):
                    more = more + (warpgroup_mma(b_ds, b_q[c], dk[c], is_async=True),)  # type: ignore[assignment]  # noqa: RUF005
                dk = more
                if VALUES:
                    dv = warpgroup_mma_wait(1, [dv])
                    mbarrier.arrive(o_empty.index(slot))
                mbarrier.wait(ds_full.index(i % 2), i // 2 & 1)
                dq = _query_grads(C, i, ds_smem, k_parts, S)
            # After the last tile old queries are multiplied once more, for nothing.
            mbarrier.wait(q_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < count)
            b_q = pieces(q_ring, (i + 1) % STAGES, PIECES)
            s = scores(b_k, b_q, PIECES, S)
            if OTHERS:
                dq, dk = _wait(PIECES, dq, dk)
            else:
                dv = warpgroup_mma_wait(PIECES, [dv])
                mbarrier.arrive(o_empty.index(slot))
            mbarrier.arrive(q_empty.index(slot))
            if OTHERS:
                if PIECES == 1:
                    mbarrier.arrive(ds_empty.index(i % 2))
                _add_queries(d_q, dq, first, h * G, C * 64, dq_smem.index(C))
            if PIECES == 1:
                first = next_tile(first, begin, stop, TILE)
            s = warpgroup_mma_wait(0, [s])
            if PIECES > 1:
                if OTHERS:
                    if i % 2 == C:
                        dq = warpgroup_mma_wait(0, [_query_grads(2, i, ds_smem, k_parts, S)])
                        _add_queries(d_q, dq, first, h * G, 128, dq_smem.index(C))
                    mbarrier.arrive(ds_empty.index(i % 2))
                first = next_tile(first, begin, stop, TILE)
        if OTHERS:
            for c in gl.static_range(PIECES):
                _add_keys(d_k, dk[c], n, h * D + c * WIDTH, dq_smem.index(C))
        if VALUES:
            _add_keys(d_v, dv, n, h * E, dq_smem.index(C))
        tma.store_wait(0)
