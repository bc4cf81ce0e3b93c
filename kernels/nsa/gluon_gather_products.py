"""Gradients of selected attention for Hopper, in Gluon: what a warpgroup of ``gluon_gather_grad`` does with its items.

Of 192 dimensions the gradients of keys leave registers for the scores of half a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment, misc"
# Tuples of pieces grow in loops that Triton unrolls.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from shoal.kernels.hopper import barrier, half_rows, pieces, scores, split_halves, told
from shoal.kernels.nsa.gluon_span_products import reduce_add


@gluon.jit
def _put(
    part, x, smem, places, at, h, KV: gl.constexpr, G: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr,
    column: gl.constexpr,
):  # fmt: skip
    """Store ``x [64, 64]`` as columns of the parts of a tile's queries, by way of a buffer that nobody reads any more.

    By the threads, since TMA as Gluon has it cannot say that these lines are not to stay in the cache.
    """
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    smem.store(x.to(smem.dtype))
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    place = r * 0 - 1
    for j in gl.static_range(TILE):
        place = gl.where(r // G == j, told(places, at + j), place)
    row = (place * KV + h) * G + r % G
    p_part = part + row[:, None] * D + (column + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE)))[None, :]
    gl.store(p_part, smem.load(WIDE), mask=place[:, None] >= 0, eviction_policy="evict_first")


@gluon.jit
def _add_keys(x, acc, at, column, one, two):
    """Add ``acc [64, WIDTH]`` to rows of keys, by way of two buffers in turn."""
    WIDTH: gl.constexpr = acc.shape[1]
    if WIDTH == 32:
        tma.store_wait(1)
        barrier()
        buffer = one._reinterpret(gl.float32, [64, 32], x.layout)
        buffer.store(acc)
        fence_async_shared()
        barrier()
        reduce_add(x, [at, column], buffer)
    else:
        left, right = split_halves(acc)
        _add_keys(x, left, at, column, one, two)
        if WIDTH == 64:
            _add_keys(x, right, at, column + WIDTH // 2, two, one)
        else:
            _add_keys(x, right, at, column + WIDTH // 2, one, two)


@gluon.jit
def _masked(
    w, r, L: gl.constexpr, item, n, key, stop, listed, G: gl.constexpr, TILE: gl.constexpr, N: gl.constexpr,
    ITEM: gl.constexpr,
):  # fmt: skip
    """Weights ``[keys, rows r of tile n]`` of keys that are there: of its own block a query sees what stands before."""
    own_rows, pairs = listed
    mine = gl.load(pairs + item.to(gl.int64) * ITEM + n * TILE + r // G)
    t = gl.load(own_rows + mine // N, mask=mine >= 0, other=0)
    o_n = key + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    return gl.where((o_n[:, None] <= t[None, :]) & (o_n < stop)[:, None], w, 0.0)


@gluon.jit
def consumer(
    part, d_k, d_v, worker, listed, scale, KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    TILE: gl.constexpr, N: gl.constexpr, ITEM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The gradients of the items' keys, and the parts of their queries'."""
    (
        _,
        _,
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
    ) = worker
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    WIDTH: gl.constexpr = k_smem.shape[2]
    PIECES: gl.constexpr = D // WIDTH
    ACC_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    ACC_E: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    HALF_ROW: gl.constexpr = gl.SliceLayout(0, HALF)
    zeros = gl.zeros([64, 64], gl.float32, S)
    k_parts = k_smem._reinterpret(k_smem.dtype, [D // 64, 64, 64], k_smem.layout)
    i = 0
    lap = 0
    mbarrier.wait(kv_bars.index(0), 0)
    count = told(facts, 3)
    while count > 0:
        dk = ()
        for _c in gl.static_range(PIECES):
            dk = dk + (gl.zeros([64, WIDTH], gl.float32, ACC_D),)  # noqa: RUF005
        dv = gl.zeros([64, E], gl.float32, ACC_E)
        h, key, stop = told(facts, 0), told(facts, 1), told(facts, 2)
        unclear, item = told(facts, 4), told(facts, 5)
        for n in range(count):
            # i >> 30 is 0, which the compiler does not know: it would keep all addresses in registers.
            slot = i % STAGES + (i >> 30 if STAGES == 1 else 0)
            b_q, b_o = pieces(q_ring, slot, PIECES), o_ring.index(slot)
            b_k, b_v, b_ds = pieces(k_smem, i >> 30, PIECES), v_smem.index(i >> 30), ds_smem.index(i >> 30)
            mbarrier.wait(full.index(slot), i // STAGES & 1)
            if PIECES == 1:
                s = scores(b_k, b_q, PIECES, S)
                dp = warpgroup_mma(b_v, b_o.permute((1, 0)), zeros, use_acc=False, is_async=True)
                b_base = base_ring.index(slot).load(ROW)
                s = warpgroup_mma_wait(1, [s])
                w = gl.exp2(s * scale - b_base[None, :])
                if unclear > 0:
                    w = _masked(w, gl.arange(0, 64, layout=ROW), S, item, n, key, stop, listed, G, TILE, N, ITEM)
                b_w = gl.convert_layout(w.to(k_smem.dtype), gl.DotOperandLayout(0, ACC_E, 2))
                dv = warpgroup_mma(b_w, b_o, dv, is_async=True)
                b_dots = dots_ring.index(slot).load(ROW)
                dp, w = warpgroup_mma_wait(1, [dp, w])
                ds = (w * (dp - b_dots[None, :])).to(k_smem.dtype)
                b_ds.store(ds)
                fence_async_shared()
                barrier()
                b_rows = gl.convert_layout(ds, gl.DotOperandLayout(0, ACC_D, 2))
                dk = (warpgroup_mma(b_rows, b_q[0], dk[0], is_async=True),)
            else:
                both = ()
                for half in gl.static_range(2):
                    h_q, h_o = half_rows(b_q, half, PIECES), b_o.slice(32 * half, 32, 0)
                    s = scores(b_k, h_q, PIECES, HALF)
                    nothing = gl.zeros([64, 32], gl.float32, HALF)
                    dp = warpgroup_mma(b_v, h_o.permute((1, 0)), nothing, use_acc=False, is_async=True)
                    h_base = base_ring.index(slot).slice(32 * half, 32, 0).load(HALF_ROW)
                    s = warpgroup_mma_wait(1, [s])
                    w = gl.exp2(s * scale - h_base[None, :])
                    if unclear > 0:
                        r = 32 * half + gl.arange(0, 32, layout=HALF_ROW)
                        w = _masked(w, r, HALF, item, n, key, stop, listed, G, TILE, N, ITEM)
                    b_w = gl.convert_layout(w.to(k_smem.dtype), gl.DotOperandLayout(0, ACC_E, 2))
                    dv = warpgroup_mma(b_w, h_o, dv, is_async=True)
                    h_dots = dots_ring.index(slot).slice(32 * half, 32, 0).load(HALF_ROW)
                    dp, w = warpgroup_mma_wait(1, [dp, w])
                    ds = (w * (dp - h_dots[None, :])).to(k_smem.dtype)
                    both = both + (ds,)  # noqa: RUF005
                    b_rows = gl.convert_layout(ds, gl.DotOperandLayout(0, ACC_D, 2))
                    one = warpgroup_mma(b_rows, h_q[0], dk[0], is_async=True)
                    two = warpgroup_mma(b_rows, h_q[1], dk[1], is_async=True)
                    three = warpgroup_mma(b_rows, h_q[2], dk[2], is_async=True)
                    dv, one, two, three = warpgroup_mma_wait(0, [dv, one, two, three])
                    dk = (one, two, three)
                ds = gl.join(both[0], both[1]).permute((0, 2, 1)).reshape([64, 64])
                b_ds.store(gl.convert_layout(ds, S, assert_trivial=True))
                fence_async_shared()
                barrier()
            left = warpgroup_mma(b_ds.permute((1, 0)), k_parts.index(i >> 30), zeros, use_acc=False, is_async=True)
            place = i % (2 * STAGES) * TILE
            if PIECES == 1:
                left, last, dv = warpgroup_mma_wait(0, [left, dk[0], dv])
                dk = (last,)
                mbarrier.arrive(empty.index(slot))
                right = warpgroup_mma(
                    b_ds.permute((1, 0)), k_parts.index(1 + (i >> 30)), zeros, use_acc=False, is_async=True
                )
                _put(part, left, part_smem.index(i >> 30), places, place, h, KV, G, TILE, D, 0)
                right = warpgroup_mma_wait(0, [right])
            else:
                left = warpgroup_mma_wait(0, [left])
                mbarrier.arrive(empty.index(slot))
                # While a part is put there are no registers for the next one.
                _put(part, left, part_smem.index(i >> 30), places, place, h, KV, G, TILE, D, 0)
                left = warpgroup_mma(b_ds.permute((1, 0)), k_parts.index(1 + (i >> 30)), zeros, use_acc=False)
                _put(part, left, part_smem.index(i >> 30), places, place, h, KV, G, TILE, D, 64)
                right = warpgroup_mma(b_ds.permute((1, 0)), k_parts.index(2 + (i >> 30)), zeros, use_acc=False)
            _put(part, right, b_ds, places, place, h, KV, G, TILE, D, D - 64)
            i += 1
        mbarrier.arrive(kv_bars.index(1))
        for c in gl.static_range(PIECES):
            _add_keys(d_k, dk[c], key, h * D + c * WIDTH, part_smem.index(0), ds_smem.index(0))
        _add_keys(d_v, dv, key, h * E, part_smem.index(0), ds_smem.index(0))
        tma.store_wait(0)
        barrier()
        lap += 1
        mbarrier.wait(kv_bars.index(0), lap & 1)
        count = told(facts, 3)
