"""What follows a grouped product on Hopper, in Gluon: nothing, SwiGLU, or its gradient; and how tiles get to memory.

Accumulators are of 64 rows of a consumer of :mod:`shoal.kernels.moe.gluon_product`. What they become goes by way of its
slots of 8 KiB of shared memory, by TMA where all rows are the expert's.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from shoal.kernels.moe.gluon_common import sigmoid_of, split_columns


@gluon.jit
def _put(x, slot, planes, at, pointer, row, column, end, stride, N: gl.constexpr, DIRECT: gl.constexpr):
    """Write ``[64, 64]``: whole by TMA from a slot that is free, or directly the rows before ``end``."""
    b_x = x.to(planes.dtype)
    if DIRECT:
        L: gl.constexpr = b_x.type.layout
        r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
        c = column + gl.arange(0, 64, layout=gl.SliceLayout(0, L))
        target = pointer + at * N + r.to(gl.int64)[:, None] * stride + c[None, :]
        gl.store(target, b_x, mask=(r[:, None] < end) & (c[None, :] < N))
    else:
        slot.reshape([64, 64]).store(b_x)
        fence_async_shared()
        tma.async_copy_shared_to_global(planes, [at, row, column], slot)


@gluon.jit
def _store(
    x, slots, i: gl.constexpr, SLOTS: gl.constexpr, planes, at, pointer, row, column, end, stride, N: gl.constexpr
):
    """One of a series of writes that take the slots by turns; the whole series takes each of them equally often."""
    if row + 64 <= end:
        tma.store_wait(SLOTS - 1)
        _put(x, slots.index(i % SLOTS), planes, at, pointer, row, column, end, stride, N, False)
    else:
        _put(x, slots.index(i % SLOTS), planes, at, pointer, row, column, end, stride, N, True)


@gluon.jit
def epilogue_plain(acc, slots, SLOTS, out, out_ptr, row, end, column, N):
    left, right = split_columns(acc)
    q0, q1 = split_columns(left)
    q2, q3 = split_columns(right)
    _store(q0, slots, 0, SLOTS, out, 0, out_ptr, row, column, end, N, N)
    _store(q1, slots, 1, SLOTS, out, 0, out_ptr, row, column + 64, end, N, N)
    _store(q2, slots, 2, SLOTS, out, 0, out_ptr, row, column + 128, end, N, N)
    _store(q3, slots, 3, SLOTS, out, 0, out_ptr, row, column + 192, end, N, N)


@gluon.jit
def epilogue_up(acc, slots, SLOTS, out, act, out_ptr, act_ptr, row, end, column, N):
    """hidden = [gate, up], and silu(gate) * up."""
    gate, up = split_columns(acc)
    g0, g1 = split_columns(gate)
    u0, u1 = split_columns(up)
    a0 = g0 * sigmoid_of(g0) * u0
    a1 = g1 * sigmoid_of(g1) * u1
    _store(g0, slots, 0, SLOTS, out, 0, out_ptr, row, column, end, 2 * N, N)
    _store(u0, slots, 1, SLOTS, out, 1, out_ptr, row, column, end, 2 * N, N)
    _store(a0, slots, 2, SLOTS, act, 0, act_ptr, row, column, end, N, N)
    _store(g1, slots, 3, SLOTS, out, 0, out_ptr, row, column + 64, end, 2 * N, N)
    _store(u1, slots, 4, SLOTS, out, 1, out_ptr, row, column + 64, end, 2 * N, N)
    _store(a1, slots, 5, SLOTS, act, 0, act_ptr, row, column + 64, end, N, N)


@gluon.jit
def fetch_hidden(hidden, slots, there, pair: gl.constexpr, row, column):
    """Begin to copy the gates and ups ``[64, 64]`` of some columns to a pair of slots."""
    mbarrier.expect(there.index(pair), 2 * hidden.block_type.nbytes)
    tma.async_copy_global_to_shared(hidden, [0, row, column], there.index(pair), slots.index(2 * pair))
    tma.async_copy_global_to_shared(hidden, [1, row, column], there.index(pair), slots.index(2 * pair + 1))


@gluon.jit
def _act_chunk(
    d, weight, slots, there, phase, pair: gl.constexpr, out, act, out_ptr, act_ptr, row, end, column, N: gl.constexpr
):
    """SwiGLU's gradient of 64 columns, in place of their hidden. Returns their part of the weights' gradient."""
    L: gl.constexpr = d.type.layout
    mbarrier.wait(there.index(pair), phase)
    gate = slots.index(2 * pair).reshape([64, 64]).load(L).to(gl.float32)
    up = slots.index(2 * pair + 1).reshape([64, 64]).load(L).to(gl.float32)
    sigmoid = sigmoid_of(gate)
    silu = gate * sigmoid
    b_act = silu * up
    part = gl.sum(b_act * d, 1)
    w = gl.convert_layout(weight, gl.SliceLayout(1, L))[:, None]
    d = d * w
    d_gate = d * up * (sigmoid + silu * (1.0 - sigmoid))
    d_up = d * silu
    if row + 64 <= end:
        _put(d_gate, slots.index(2 * pair), out, 0, out_ptr, row, column, end, 2 * N, N, False)
        _put(d_up, slots.index(2 * pair + 1), out, 1, out_ptr, row, column, end, 2 * N, N, False)
        _put(b_act * w, slots.index(4 + pair), act, 0, act_ptr, row, column, end, N, N, False)
    else:
        _put(d_gate, slots.index(2 * pair), out, 0, out_ptr, row, column, end, 2 * N, N, True)
        _put(d_up, slots.index(2 * pair + 1), out, 1, out_ptr, row, column, end, 2 * N, N, True)
        _put(b_act * w, slots.index(4 + pair), act, 0, act_ptr, row, column, end, N, N, True)
    return part


@gluon.jit
def epilogue_act(
    acc, weight, slots, there, phase, out, act, out_ptr, act_ptr, parts, row, end, column, rows, N, GATES: gl.constexpr
):
    """d_hidden, the weighted activation, and the part of each row's weight's gradient that these columns have."""
    d0, d1 = split_columns(acc)
    total = _act_chunk(d0, weight, slots, there, phase, 0, out, act, out_ptr, act_ptr, row, end, column, N)
    total += _act_chunk(d1, weight, slots, there, phase, 1, out, act, out_ptr, act_ptr, row, end, column + 64, N)
    if GATES:
        r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, d0.type.layout))
        gl.store(parts + (column // 128).to(gl.int64) * rows + r, total, mask=r < end)
