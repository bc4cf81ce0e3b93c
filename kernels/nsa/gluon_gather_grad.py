"""Gradients of selected attention for Hopper, in Gluon: the twin of ``triton_gather_grad``'s kernel of blocks.

Items are blocks with some of the queries that chose them. Each multiprocessor works on two at a time, each with a
warpgroup, and a producer warp that copies keys, values and queries with TMA: they share nothing, so that the
products of one run under the exponentials of the other. What an item finds for its queries' gradients is stored as
parts, which ``triton_gather_grad`` sums; what it finds for its keys is added to memory, in any order.

Here are items, copies and buffers; ``gluon_gather_products`` has what the warpgroups compute. Of 192 dimensions, three
pieces of 64 columns, a tile of queries at a time fits shared memory instead of two.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment, misc"
# Tuples of pieces grow in loops that Triton unrolls.

from __future__ import annotations

from math import gcd

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from shoal.kernels.hopper import barrier, descriptor, multiprocessors, take, tell
from shoal.kernels.launches import launch
from shoal.kernels.nsa import gluon_span_grad
from shoal.kernels.nsa.gluon_gather_products import consumer
from shoal.kernels.nsa.triton_inverse import Inverse
from shoal.kernels.nsa.triton_select import LOG2E
from shoal.kernels.nsa.triton_span_grad import Grads
from shoal.kernels.nsa.triton_tables import PackTables


def supported(q: Tensor, v: Tensor, block: int, *, wide: bool = True) -> bool:
    """Whether :func:`block_parts` is to take these: what ``gluon_span_backward`` does, groups from 16 on, blocks of at
    most 64 tokens."""
    return gluon_span_grad.supported(q, v, wide=wide) and q.shape[1] // v.shape[1] >= 16 and block <= 64


def block_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    base: Tensor,
    dots: Tensor,
    part: Tensor,
    inverse: Inverse,
    ends: Tensor,
    taken: Tensor,
    tables: PackTables,
    scale: float,
    grads: Grads,
    index: int,
) -> None:
    """Of the queries of chunk ``index``: the parts of their gradients, ``part [chunk, n, H, D]``, and what they add to
    the gradients of keys and values. ends: of ``ends_by_head``. taken: ``[chunks]`` int32, zeros at first: how many
    items of each chunk of the inverse workers have taken."""
    tokens, heads, dim = q.shape
    keys, kv, dim_v = v.shape
    group, n, piece = heads // kv, part.shape[1], gcd(dim, 128)
    launch(
        _gather_grad_kernel,
        (multiprocessors(q.device),),
        descriptor(q, 1, group, 64),
        descriptor(k.view(keys, kv * dim), 64, piece),
        descriptor(v.view(keys, kv * dim_v), 64, dim_v),
        descriptor(d_out, 1, group, 64),
        part,
        descriptor(grads.d_k.view(keys, kv * dim), 64, 32),
        descriptor(grads.d_v.view(keys, kv * dim_v), 64, 32),
        base,
        dots,
        inverse.item_blocks,
        inverse.item_pairs,
        inverse.first_items,
        ends,
        taken,
        tables.block_first,
        tables.block_last,
        tables.own_rows,
        index - inverse.before,
        inverse.chunks,
        index * inverse.chunk * n,
        scale * LOG2E,
        tokens,
        KV=kv,
        G=group,
        D=dim,
        E=dim_v,
        TILE=64 // group,
        N=n,
        ITEM=inverse.size,
        STAGES=2 if dim <= 128 else 1,
        num_warps=4,
    )


@gluon.jit
def _item_of(idx, first, ends, index, chunks, KV: gl.constexpr):
    """Head and place in the table of the chunk's item ``idx``."""
    h = 0
    before = 0
    for j in gl.static_range(KV - 1):
        end = gl.load(ends + j * chunks + index)
        h = gl.where(idx >= end, j + 1, h)
        before = gl.where(idx >= end, end, before)
    return h, gl.load(first + h * chunks + index) + idx - before


@gluon.jit
def _producer(
    q, k, v, d_out, worker, source, KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr,
    N: gl.constexpr, ITEM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take items; copy the keys and values of each, and its queries and gradients of outputs, tile by tile."""
    q_ring, o_ring, _, _, base_ring, dots_ring, k_smem, v_smem, _, _, places, facts, kv_bars, full, empty = worker
    (
        base, dots, own_rows, items, pairs, first, ends, taken, block_first, block_last, index, chunks,
        begin, tokens,
    ) = source  # fmt: skip
    WIDTH: gl.constexpr = k.block_type.shape[1]
    PIECES: gl.constexpr = D // WIDTH
    E: gl.constexpr = v.block_type.shape[1]
    L: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    r = gl.arange(0, 64, layout=L)
    every_item = gl.load(ends + (KV - 1) * chunks + index)
    idx = take(taken + index)
    i = 0
    lap = 0
    while idx < every_item:
        following = take(taken + index)
        h, item = _item_of(idx, first, ends, index, chunks, KV)
        block = gl.load(items + item)
        p_pairs = pairs + item.to(gl.int64) * ITEM
        every = gl.load(p_pairs + gl.arange(0, ITEM, layout=L))
        key, stop = gl.load(block_first + block), gl.load(block_last + block)
        own_row = gl.load(own_rows + every // N, mask=every >= 0, other=2147483647)
        unclear = (gl.min(own_row, 0) < key + 63) | (stop - key < 64)
        count = gl.sum((every >= 0).to(gl.int32), 0)
        for n in range(gl.cdiv(count, TILE)):
            mine = gl.load(p_pairs + n * TILE + r // G)
            row = ((mine // N).to(gl.int64) * KV + h) * G + r % G
            b_base = gl.load(base + row, mask=mine >= 0, other=float("inf"))
            b_dots = gl.load(dots + row, mask=mine >= 0, other=0.0)
            mates = ()
            for j in gl.static_range(TILE):
                mates = mates + (gl.load(p_pairs + n * TILE + j),)  # noqa: RUF005
            slot = i % STAGES
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
            mbarrier.expect(bar, 64 * (2 * D + 2 * E))
            for j in gl.static_range(TILE):
                # Where there is no query, copies of what lies outside are zeros, whose gradients are zeros.
                t = gl.where(mates[j] >= 0, mates[j] // N, tokens)
                # i >> 30 is 0, which the compiler does not know: unrolled, this takes more registers than there are.
                for c in range(D // 64 + (i >> 30 if PIECES > 1 else 0)):
                    at = (slot * (D // 64) + c) * TILE + j
                    tma.async_copy_global_to_shared(q, [t, h * G, c * 64], bar, q_ring.index(at))
                for c in gl.static_range(E // 64):
                    at = (slot * (E // 64) + c) * TILE + j
                    tma.async_copy_global_to_shared(d_out, [t, h * G, c * 64], bar, o_ring.index(at))
                tell(places, i % (2 * STAGES) * TILE + j, gl.where(mates[j] >= 0, mates[j] - begin, -1))
            base_ring.index(slot).store(b_base)
            dots_ring.index(slot).store(b_dots)
            barrier()
            mbarrier.arrive(bar)
            i += 1
            if n == 0:
                # The item before may still be at work with its keys.
                mbarrier.wait(kv_bars.index(1), (lap & 1) ^ 1)
                mbarrier.expect(kv_bars.index(0), PIECES * k.block_type.nbytes + v.block_type.nbytes)
                for piece in range(PIECES + (i >> 30 if PIECES > 1 else 0)):
                    column = h * D + piece * WIDTH
                    tma.async_copy_global_to_shared(k, [key, column], kv_bars.index(0), k_smem.index(piece))
                tma.async_copy_global_to_shared(v, [key, h * E], kv_bars.index(0), v_smem.index(0))
                tell(facts, 0, h)
                tell(facts, 1, key)
                tell(facts, 2, stop)
                tell(facts, 3, gl.cdiv(count, TILE))
                tell(facts, 4, unclear.to(gl.int32))
                tell(facts, 5, item)
                barrier()
                mbarrier.arrive(kv_bars.index(0))
        idx = following
        lap += 1
    # An item without tiles is the end.
    mbarrier.wait(kv_bars.index(1), (lap & 1) ^ 1)
    tell(facts, 3, 0)
    barrier()
    mbarrier.arrive(kv_bars.index(0), count=2)


@gluon.jit
def _buffers(q, k, v, d_out, D: gl.constexpr, TILE: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """What a worker needs: rings for TMA, the same as matrices, numbers of rows, keys, values, d_s, parts, barriers."""
    WIDTH: gl.constexpr = k.block_type.shape[1]
    PIECES: gl.constexpr = D // WIDTH
    E: gl.constexpr = v.block_type.shape[1]
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tma = gl.allocate_shared_memory(q.dtype, [STAGES * (D // 64) * TILE, 1, G, 64], q.layout)
    o_tma = gl.allocate_shared_memory(q.dtype, [STAGES * (E // 64) * TILE, 1, G, 64], d_out.layout)
    q_ring = q_tma._reinterpret(q.dtype, [STAGES * PIECES, 64, WIDTH], k.layout)
    o_ring = o_tma._reinterpret(q.dtype, [STAGES, 64, E], v.layout)
    base_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 64], NUMBERS)
    dots_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 64], NUMBERS)
    k_smem = gl.allocate_shared_memory(q.dtype, [PIECES] + k.block_type.shape, k.layout)  # noqa: RUF005
    v_smem = gl.allocate_shared_memory(q.dtype, [1] + v.block_type.shape, v.layout)  # noqa: RUF005
    ds_smem = gl.allocate_shared_memory(q.dtype, [1, 64, 64], k.layout)
    part_smem = gl.allocate_shared_memory(q.dtype, [1, 64, 64], k.layout)
    places = gl.allocate_shared_memory(gl.int32, [2 * STAGES * TILE, 1], NUMBERS)
    facts = gl.allocate_shared_memory(gl.int32, [6, 1], NUMBERS)
    kv_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_bars.index(0), count=2)
    mbarrier.init(kv_bars.index(1), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=2)
        mbarrier.init(empty.index(s), count=1)
    return (
        q_tma,
        o_tma,
        q_ring,
        o_ring,
        base_ring,
        dots_ring,
        k_smem,
        v_smem,
        ds_smem,
        part_smem,
        places,
        facts,
        kv_bars,
        full,
        empty,
    )


@gluon.jit(do_not_specialize=["index", "begin"])
def _gather_grad_kernel(
    q, k, v, d_out, part, d_k, d_v, base, dots, items, pairs, first, ends, taken, block_first,
    block_last, own_rows, index, chunks, begin, scale, tokens, KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    E: gl.constexpr, TILE: gl.constexpr, N: gl.constexpr, ITEM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Programs work on two items at a time, until the chunk has no more."""
    one = _buffers(q, k, v, d_out, D, TILE, G, STAGES)
    two = _buffers(q, k, v, d_out, D, TILE, G, STAGES)
    fence_async_shared()
    source = (
        base, dots, own_rows, items, pairs, first, ends, taken, block_first, block_last, index, chunks,
        begin, tokens,
    )  # fmt: skip
    listed = (own_rows, pairs)
    gl.warp_specialize(
        [
            (consumer, (part, d_k, d_v, one, listed, scale, KV, G, D, E, TILE, N, ITEM, STAGES)),
            (consumer, (part, d_k, d_v, two, listed, scale, KV, G, D, E, TILE, N, ITEM, STAGES)),
            (_producer, (q, k, v, d_out, one, source, KV, G, D, TILE, N, ITEM, STAGES)),
            (_producer, (q, k, v, d_out, two, source, KV, G, D, TILE, N, ITEM, STAGES)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
