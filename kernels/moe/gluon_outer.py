"""The weight gradients of grouped products for Hopper, in Gluon: of each expert, its rows' outer products, summed.

The twin of :mod:`shoal.kernels.moe.gluon_product`, with the rows as the depth: a producer warp copies 64 rows of both
sides at a time, and two warpgroups multiply 64 columns of the left by the same 256 of the right.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from shoal.kernels.hopper import barrier, descriptor
from shoal.kernels.moe.gluon_common import launch, split_columns

SHAPE = (4, 2)
"""Depth of the rings, and a consumer's slots of 8 KiB."""


def outer_products(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``[R, A], [R, B] -> [E, A, B]`` in bf16; ends: ``[E]`` int32, where each group of rows ends. Zeros for none."""
    a, b, groups = left.shape[1], right.shape[1], len(ends)
    out = left.new_empty(groups, a, b)
    stages, slots = SHAPE
    launch(
        _outer_kernel,
        (descriptor(left, 64, 128), descriptor(right, 64, 256), descriptor(out, 1, 64, 64), ends),
        E=groups,
        A=a,
        B=b,
        STAGES=stages,
        SLOTS=slots,
    )
    return out


@gluon.jit
def _laps(E: gl.constexpr, A: gl.constexpr, B: gl.constexpr):
    TILES: gl.constexpr = E * ((A + 127) // 128) * ((B + 255) // 256)
    return gl.cdiv(TILES - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _tile(lap, ends, A: gl.constexpr, B: gl.constexpr):
    """Of this program's next tile: the group, its first row and their end, the columns of left and right."""
    DOWN: gl.constexpr = (A + 127) // 128
    ACROSS: gl.constexpr = (B + 255) // 256
    idx = gl.program_id(0) + lap * gl.num_programs(0)
    group = idx // (DOWN * ACROSS)
    end = gl.load(ends + group)
    start = gl.load(ends + group - 1, mask=group > 0, other=0)
    return group, start, end, idx % DOWN * 128, idx // DOWN % ACROSS * 256


@gluon.jit
def _producer(left, right, a_ring, b_ring, full, empty, ends, E, A, B, STAGES):
    i = 0
    for lap in range(_laps(E, A, B)):
        _, start, end, a, b = _tile(lap, ends, A, B)
        for row in range(start, end, 64):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), left.block_type.nbytes + right.block_type.nbytes)
            tma.async_copy_global_to_shared(left, [row, a], full.index(slot), a_ring.index(slot))
            tma.async_copy_global_to_shared(right, [row, b], full.index(slot), b_ring.index(slot))
            i += 1


@gluon.jit
def _save(x, slots, i: gl.constexpr, SLOTS: gl.constexpr, out, group, a, b):
    tma.store_wait(SLOTS - 1)
    slots.index(i % SLOTS).reshape([64, 64]).store(x.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [group, a, b], slots.index(i % SLOTS))


@gluon.jit
def _wipe(granule, rows):
    """Zeros below so many of 16 rows ``[16, 64]``."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, 16, layout=gl.SliceLayout(1, L))
    kept = granule.load(L)
    granule.store(gl.where((r < rows)[:, None], kept, gl.zeros_like(kept)))


@gluon.jit
def _rest(acc, rows, a_ring, b_ring, slot, C):
    """The product of the last rows of a group, fewer than 64: by 16, without those of the next group.

    Both consumers write zeros to the right side; they write the same.
    """
    own = a_ring.index(2 * slot + C)
    b = b_ring.index(slot)
    if rows % 16:
        last = rows // 16
        a_parts = a_ring._reinterpret(a_ring.dtype, [4 * a_ring.shape[0], 16, 64], a_ring.layout)
        b_parts = b_ring._reinterpret(b_ring.dtype, [16 * b_ring.shape[0], 16, 64], b_ring.layout)
        _wipe(a_parts.index(4 * (2 * slot + C) + last), rows % 16)
        for c in gl.static_range(4):
            _wipe(b_parts.index(16 * slot + 4 * c + last), rows % 16)
        fence_async_shared()
        barrier()
    for j in gl.static_range(4):
        if 16 * j < rows:
            acc = warpgroup_mma(own.slice(16 * j, 16, 0).permute((1, 0)), b.slice(16 * j, 16, 0), acc)
    return acc


@gluon.jit
def _consumer(C, a_ring, b_ring, full, empty, slots, out, ends, E, A, B, STAGES, SLOTS):
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    i = 0
    for lap in range(_laps(E, A, B)):
        group, start, end, a, b = _tile(lap, ends, A, B)
        acc = gl.zeros([64, 256], gl.float32, ACC)
        whole = start + (end - start) // 64 * 64
        for row in range(start, whole, 64):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), i // STAGES & 1)
            own = a_ring.index(2 * slot + C)
            acc = warpgroup_mma(own.permute((1, 0)), b_ring.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=row > start)
            i += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=whole > start)
        if whole < end:
            slot = i % STAGES
            mbarrier.wait(full.index(slot), i // STAGES & 1)
            acc = _rest(acc, end - whole, a_ring, b_ring, slot, C)
            mbarrier.arrive(empty.index(slot))
            i += 1
        left, right = split_columns(acc)
        q0, q1 = split_columns(left)
        q2, q3 = split_columns(right)
        _save(q0, slots, 0, SLOTS, out, group, a + C * 64, b)
        _save(q1, slots, 1, SLOTS, out, group, a + C * 64, b + 64)
        _save(q2, slots, 2, SLOTS, out, group, a + C * 64, b + 128)
        _save(q3, slots, 3, SLOTS, out, group, a + C * 64, b + 192)
    tma.store_wait(0)


@gluon.jit(do_not_specialize_on_alignment=["ends"])
def _outer_kernel(
    left,
    right,
    out,
    ends,
    E: gl.constexpr,
    A: gl.constexpr,
    B: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    a_tma = gl.allocate_shared_memory(left.dtype, [STAGES, 64, 128], left.layout)
    a_ring = a_tma._reinterpret(left.dtype, [2 * STAGES, 64, 64], left.layout)
    b_ring = gl.allocate_shared_memory(right.dtype, [STAGES, 64, 256], right.layout)
    slots_0 = gl.allocate_shared_memory(out.dtype, [SLOTS, 1, 64, 64], out.layout)
    slots_1 = gl.allocate_shared_memory(out.dtype, [SLOTS, 1, 64, 64], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (FIRST, a_ring, b_ring, full, empty, slots_0, out, ends, E, A, B, STAGES, SLOTS)),
            (_consumer, (SECOND, a_ring, b_ring, full, empty, slots_1, out, ends, E, A, B, STAGES, SLOTS)),
            (_producer, (left, right, a_tma, b_ring, full, empty, ends, E, A, B, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
