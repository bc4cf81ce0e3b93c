"""Grouped matrix products for Hopper, in Gluon, with SwiGLU and its gradient in their epilogues.

A producer warp copies tiles of rows and weights with TMA; two warpgroups of consumers multiply 64 rows each by the same
256 columns. Programs are persistent and take tiles in an order in which neighbours share rows and weights in L2.
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

from shoal.kernels.hopper import barrier, descriptor, descriptor_of
from shoal.kernels.launches import Descriptor
from shoal.kernels.moe.gluon_common import launch
from shoal.kernels.moe.gluon_epilogues import epilogue_act, epilogue_plain, epilogue_up, fetch_hidden
from shoal.kernels.moe.triton_tiles import Tiles

PLAIN, UP, ACT = 0, 1, 2
"""What follows a product: nothing, SwiGLU, or SwiGLU's gradient."""

ROWS, DEPTH = 128, 64
COLUMNS = {PLAIN: 256, UP: 128, ACT: 128}
"""Of a tile of the output; UP has as many gates and ups. ACT leaves room for hidden, which is on its way meanwhile."""

SHAPES = {PLAIN: (3, 4), UP: (3, 3), ACT: (4, 6)}
"""Depth of the rings, and a consumer's slots of 8 KiB, each of which a tile fills equally often.

More slots are worth more than a deeper ring: what goes to memory need not be waited for before the next tile.
"""

GROUPS = {PLAIN: 8, UP: 8, ACT: 6}
"""Tiles of rows that are taken with all columns before the next ones."""

UNSPECIALIZED = ["order", "gates", "parts", "table", "count", "most", "rows"]


def product(
    mode: int,
    rows: Tensor,
    weight: Tensor,
    tiles: Tiles,
    out: Tensor,
    act: Tensor | None = None,
    hidden: Tensor | None = None,
    gates: Tensor | None = None,
    order: Tensor | None = None,
    parts: Tensor | None = None,
    side: int = 1,
) -> None:
    """weight: ``[E, K, N]`` or ``[K, N]``, either of its last dimensions contiguous. side: so many of ``weight`` are
    one expert, side by side along their columns for UP, along their rows for PLAIN."""
    depth, width = weight.shape[-2:]
    inner = side * width // 2 if mode == UP else width
    depth_of_all = depth if mode == UP else side * depth
    by_column = weight.stride(-1) != 1  # each column's elements are neighbours
    columns = COLUMNS[mode]
    block = [columns, DEPTH] if by_column else [DEPTH, columns]
    halves = 2 if mode != PLAIN else 1
    stages, slots = SHAPES[mode]
    planes = _planes(out, halves)
    arguments = (
        descriptor(rows, ROWS // 2, DEPTH),
        _flat(weight, by_column, *block),
        planes,
        out if act is None else _planes(act, 1),  # a descriptor costs the host time, used or not
        out if hidden is None else _planes(hidden, halves),
        out,
        out if act is None else act,
        order if gates is not None else out,
        gates if gates is not None else out,
        parts if parts is not None else out,
        tiles.table,
        tiles.count,
        tiles.most,
        rows.shape[0],
    )
    launch(
        _gemm_kernel,
        arguments,
        K=depth_of_all,
        N=inner,
        MODE=mode,
        BY_COLUMN=by_column,
        GATES=gates is not None,
        STAGES=stages,
        SLOTS=slots,
        GROUP=GROUPS[mode],
        SIDE=side,
    )


def _flat(weight: Tensor, by_column: bool, *block: int) -> Descriptor:
    """``[E, K, N]`` as ``[E · K, N]``, or as ``[E · N, K]`` where columns are contiguous; a copy where it has to be."""
    rows, width = weight.shape[-2:]
    if by_column:
        rows, width = width, rows
    apart = weight.stride(-1 if by_column else -2)
    if weight.dim() == 2 or weight.stride(0) == rows * apart:
        beside = weight.stride(-2 if by_column else -1)
        return descriptor_of(weight, (weight.numel() // width, width), (apart, beside), *block)
    return descriptor((weight.transpose(-1, -2) if by_column else weight).reshape(-1, width), *block)


def _planes(x: Tensor, halves: int) -> Descriptor:
    """``[R, halves · N]`` as ``[halves, R, N]``, so that a tile ends where its half does."""
    rows, width = x.shape
    inner = width // halves
    return descriptor_of(x, (halves, rows, inner), (inner, *x.stride()), 1, 64, 64)


@gluon.jit
def _laps(count, N: gl.constexpr, BN: gl.constexpr):
    """How many tiles this program takes: its own number's, and every one a grid further on."""
    return gl.cdiv(gl.load(count) * gl.cdiv(N, BN) - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _tile(lap, table, count, most, N: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """Of this program's next tile: the first row, the end of its expert's rows, the expert, the tile's columns."""
    PER: gl.constexpr = GROUP * ((N + BN - 1) // BN)
    idx = gl.program_id(0) + lap * gl.num_programs(0)
    first = idx // PER * GROUP
    size = gl.minimum(gl.load(count) - first, GROUP)
    m = first + idx % PER % size
    row = gl.load(table + m)
    end = gl.load(table + most + m)
    expert = gl.load(table + 2 * most + m)
    return row, end, expert, idx % PER // size


@gluon.jit
def _producer(
    a, b, a_ring, b_ring, full, empty, table, count, most, K, N, MODE, BY_COLUMN, STAGES, GROUP, SIDE, PIECES
):
    """Fill the rings with rows, those of the expert in pieces ``[64, 64]``, and weights ``[64, 256]``."""
    BN: gl.constexpr = 256 if MODE == 0 else 128
    WEIGHTS: gl.constexpr = b.block_type.nbytes * (2 if MODE == 1 else 1)
    i = 0
    for lap in range(_laps(count, N, BN)):
        row, end, expert, n = _tile(lap, table, count, most, N, BN, GROUP)
        taken = gl.minimum(gl.cdiv(end - row, 64), PIECES)
        for k in range(0, K, 64):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
            bar = full.index(slot)
            for p in gl.static_range(PIECES):
                mbarrier.expect(bar, (p + 1) * a.block_type.nbytes + WEIGHTS, pred=taken == p + 1)
            for p in gl.static_range(PIECES):
                at = a_ring.index(PIECES * slot + p)
                tma.async_copy_global_to_shared(a, [row + 64 * p, k], bar, at, pred=p < taken)
            if MODE == 1:
                # Of experts side by side: which one these columns are of, and where its gates and ups begin.
                OWN: gl.constexpr = N // SIDE
                mate = n * BN // OWN
                at = (expert * SIDE + mate) * K + k
                column = n * BN - mate * OWN
                tma.async_copy_global_to_shared(b, [at, column], bar, b_ring.index(2 * slot))
                tma.async_copy_global_to_shared(b, [at, OWN + column], bar, b_ring.index(2 * slot + 1))
            elif BY_COLUMN:
                PART: gl.constexpr = K // (2 * SIDE)
                mate = k // PART % SIDE if SIDE > 1 else 0
                column = k // (K // 2) * PART + k % PART if SIDE > 1 else k
                at = (expert * SIDE + mate) * N + n * BN
                tma.async_copy_global_to_shared(b, [at, column], bar, b_ring.index(slot))
            else:
                tma.async_copy_global_to_shared(b, [expert * K + k, n * BN], bar, b_ring.index(slot))
            i += 1


@gluon.jit
def _consumer(
    C, a_ring, b_ring, full, empty, slots, there, out, act, hidden, out_ptr, act_ptr, order, gates, parts, table, count,
    most, rows, K, N, MODE, BY_COLUMN, GATES, STAGES, SLOTS, GROUP,
):  # fmt: skip
    """Multiply 64 rows of each tile, and do what follows."""
    BN: gl.constexpr = 256 if MODE == 0 else 128
    WIDE: gl.constexpr = 128 if MODE == 2 else 256
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    # The hidden of a tile is asked for when what the tile before left in the slots has surely gone.
    ASK: gl.constexpr = 128 if K > 128 else 0
    STEPS: gl.constexpr = (K + 63) // 64
    done = 0
    for lap in range(_laps(count, N, BN)):
        first, end, _, n = _tile(lap, table, count, most, N, BN, GROUP)
        row = first + C * 64
        column = n * BN
        i = lap * STEPS
        if row < end:
            weight = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, ACC))
            if GATES:
                r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
                weight = gl.load(gates + gl.load(order + r, mask=r < end, other=0))
            acc = gl.zeros([64, WIDE], gl.float32, ACC)
            for k in range(0, K, 64):
                if MODE == 2:  # noqa: SIM102
                    if k == ASK:  # known at run time only
                        tma.store_wait(0)
                        barrier()
                        fetch_hidden(hidden, slots, there, 0, row, column)
                        fetch_hidden(hidden, slots, there, 1, row, column + 64)
                slot = i % STAGES
                mbarrier.wait(full.index(slot), i // STAGES & 1)
                b = b_ring.index(slot)
                if BY_COLUMN:
                    b = b.permute((1, 0))
                acc = warpgroup_mma(a_ring.index(2 * slot + C), b, acc, is_async=True)
                acc = warpgroup_mma_wait(1, [acc])
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=k > 0)
                i += 1
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES))
            if MODE == 0:
                epilogue_plain(acc, slots, SLOTS, out, out_ptr, row, end, column, N)
            elif MODE == 1:
                epilogue_up(acc, slots, SLOTS, out, act, out_ptr, act_ptr, row, end, column, N)
            else:
                epilogue_act(
                    acc, weight, slots, there, done & 1, out, act, out_ptr, act_ptr, parts, row, end, column, rows, N,
                    GATES,
                )  # fmt: skip
            done += 1
        else:
            # None of these rows is the expert's: the other consumer has the tensor cores to itself.
            for _k in range(0, K, 64):
                mbarrier.wait(full.index(i % STAGES), i // STAGES & 1)
                mbarrier.arrive(empty.index(i % STAGES))
                i += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNSPECIALIZED)
def _gemm_kernel(
    a,
    b,
    out,
    act,
    hidden,
    out_ptr,
    act_ptr,
    order,
    gates,
    parts,
    table,
    count,
    most,
    rows,
    K: gl.constexpr,
    N: gl.constexpr,
    MODE: gl.constexpr,
    BY_COLUMN: gl.constexpr,
    GATES: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUP: gl.constexpr,
    SIDE: gl.constexpr,
):
    """``[R, K]`` by ``[E, K, N]``, or by ``[E, K, 2N]`` where SwiGLU follows."""
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    BUFFERS: gl.constexpr = STAGES * (2 if MODE == 1 else 1)
    PIECES: gl.constexpr = 2
    a_ring = gl.allocate_shared_memory(a.dtype, [PIECES * STAGES, 64, 64], a.layout)
    b_tma = gl.allocate_shared_memory(b.dtype, [BUFFERS] + b.block_type.shape, b.layout)  # noqa: RUF005
    b_ring = b_tma
    if MODE == 1:
        b_ring = b_tma._reinterpret(b.dtype, [STAGES, 64, 256], b.layout)
    # Of each consumer: slots for what goes to memory, and where the gradient needs hidden, what comes from there.
    slots_0 = gl.allocate_shared_memory(out.dtype, [SLOTS, 1, 64, 64], out.layout)
    slots_1 = gl.allocate_shared_memory(out.dtype, [SLOTS, 1, 64, 64], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    there_0 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    there_1 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    for s in gl.static_range(2):
        mbarrier.init(there_0.index(s), count=1)
        mbarrier.init(there_1.index(s), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (FIRST, a_ring, b_ring, full, empty, slots_0, there_0, out, act, hidden, out_ptr, act_ptr, order,
                 gates, parts, table, count, most, rows, K, N, MODE, BY_COLUMN, GATES, STAGES, SLOTS, GROUP),
            ),
            (
                _consumer,
                (SECOND, a_ring, b_ring, full, empty, slots_1, there_1, out, act, hidden, out_ptr, act_ptr, order,
                 gates, parts, table, count, most, rows, K, N, MODE, BY_COLUMN, GATES, STAGES, SLOTS, GROUP),
            ),
            (
                _producer,
                (a, b, a_ring, b_tma, full, empty, table, count, most, K, N, MODE, BY_COLUMN, STAGES, GROUP, SIDE,
                 PIECES),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
