"""Importance of blocks for Hopper, in Gluon: the twin of ``triton_choose``'s kernel of scores.

Compressed keys are the rows of the product and queries times heads its columns, in such an order that a thread holds
all heads of a query: the sum over a group runs along its own registers. A producer warp copies queries and keys with
TMA; two warpgroups of consumers, for each half of the keys one, share them. Each begins the products of both halves of
the queries, and computes exponentials of the first while the second is multiplied. (Four warpgroups, for each half of
the queries and of the keys one, would overlap as well, but with half the registers.)

Queries and keys of 192 dimensions are three pieces of 64 columns in shared memory, which then holds the queries of one
tile at a time instead of two.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from math import gcd

import torch
import triton
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

from shoal.kernels.hopper import descriptor, multiprocessors, on_hopper
from shoal.kernels.launches import launch
from shoal.kernels.nsa.gluon_span import laps
from shoal.kernels.nsa.layout import BlockSizes
from shoal.kernels.nsa.triton_select import LOG2E
from shoal.kernels.nsa.triton_tables import Tables

KEYS, COLUMNS = 128, 128
"""Compressed keys of a step, half for each consumer; queries times heads of half a tile."""


def supported(q: Tensor, k_cmp: Tensor, sizes: BlockSizes, *, wide: bool = True) -> bool:
    """Whether :func:`block_scores` is to take these: Hopper, 16 bits, dimensions 64 or 128, groups of 8 to 64 heads,
    blocks of 1, 2, 4 … 64 strides, and as many keys chosen as a tile has queries: of a document that begins in a tile
    none is scored there. wide: also 192 dimensions."""
    group, per = q.shape[1] // k_cmp.shape[1], sizes.slc_block // sizes.cmp_stride
    return (
        on_hopper(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in ((64, 128, 192) if wide else (64, 128))
        and group in (8, 16, 32, 64)
        and per in (1, 2, 4, 8, 16, 32, 64)
        and sizes.slc_count * sizes.slc_block >= 2 * COLUMNS // group
    )


def block_scores(
    q: Tensor, k_cmp: Tensor, lse: Tensor, tables: Tables, scale: float, scores: Tensor, start: int, stop: int
) -> None:
    """Scores of the queries from ``start`` to ``stop``: ``scores[0, h, t - start]`` of each block, ``scores[1]`` what
    the block after it gets. scores: ``[2, KV, chunk, width]`` float32."""
    _, heads, dim = q.shape
    keys, kv = k_cmp.shape[:2]
    sizes, group, piece = tables.sizes, heads // kv, gcd(dim, 128)
    tile = COLUMNS // group
    tiles = triton.cdiv(stop - start, 2 * tile)
    pairs = q.view(len(q), heads // 2, 2, dim).transpose(0, 1)
    launch(
        _importance_kernel,
        (min(tiles * kv, multiprocessors(q.device)),),
        descriptor(pairs, group // 2, tile, 2, 64),
        descriptor(k_cmp.view(keys, kv * dim), KEYS // 2, piece),
        lse,
        tables.starts,
        tables.cmp.low,
        tables.cmp.high,
        scores,
        scale * LOG2E,
        start,
        stop,
        tiles,
        scores.shape[3],
        scores.shape[2],
        KV=kv,
        G=group,
        D=dim,
        TILE=tile,
        STAGES=3 if dim <= 128 else 2,
        SLOTS=2 if dim <= 128 else 1,
        COUNT=sizes.slc_count,
        LOCAL=sizes.slc_local,
        BLOCK=sizes.slc_block,
        PER_CMP=sizes.cmp_block // sizes.cmp_stride,
        PER_SLC=sizes.slc_block // sizes.cmp_stride,
        num_warps=4,
    )


@gluon.jit
def _tile(
    lap, starts, low, high, start, stop, tiles, KV: gl.constexpr, TILE: gl.constexpr, COUNT: gl.constexpr,
    LOCAL: gl.constexpr, BLOCK: gl.constexpr, PER_SLC: gl.constexpr,
):  # fmt: skip
    """Of a tile: its first query, head, document, first key, steps, and the keys that all of its queries see."""
    idx = gl.program_id(0) + lap * gl.num_programs(0)
    # The last queries score the most blocks: they begin first.
    first, h = start + (tiles - 1 - idx // KV) * 2 * TILE, idx % KV
    t = first + gl.arange(0, 2 * TILE, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    origin = gl.load(starts + first)
    mine = (t < stop) & (gl.load(starts + t, mask=t < stop, other=0) == origin)
    own = (gl.max(gl.where(mine, t, 0), 0) - origin) // BLOCK
    fewest = gl.min(gl.where(mine, gl.load(high + t, mask=t < stop, other=0), 2147483647), 0)
    # Where no query has to choose, nothing is scored.
    steps = gl.where(own < COUNT, 0, gl.cdiv((own - LOCAL + 1) * PER_SLC, 128))
    return first, h, origin, gl.load(low + first), steps.to(gl.int32), fewest


@gluon.jit
def _producer(
    q, k, rings, starts, low, high, start, stop, tiles, KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, COUNT: gl.constexpr, LOCAL: gl.constexpr,
    BLOCK: gl.constexpr, PER_SLC: gl.constexpr,
):  # fmt: skip
    """Copy each tile's queries, and its keys step by step, two halves of them."""
    q_tma, _ring, k_ring, q_full, q_empty, k_full, k_empty = rings
    WIDTH: gl.constexpr = k.block_type.shape[1]
    PIECES: gl.constexpr = D // WIDTH
    i = 0
    for lap in range(laps(tiles, KV)):
        first, h, _origin, base, steps, _fewest = _tile(
            lap, starts, low, high, start, stop, tiles, KV, TILE, COUNT, LOCAL, BLOCK, PER_SLC
        )
        slot = lap % SLOTS
        mbarrier.wait(q_empty.index(slot), (lap // SLOTS & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), 2 * q.block_type.nbytes * (D // 64))
        for half in gl.static_range(2):
            for c in gl.static_range(D // 64):
                b_q = q_tma.index((2 * slot + half) * (D // 64) + c)
                at = [h * (G // 2), first + half * TILE, 0, c * 64]
                tma.async_copy_global_to_shared(q, at, q_full.index(slot), b_q)
        for n in range(steps):
            bar = k_full.index(i % STAGES)
            mbarrier.wait(k_empty.index(i % STAGES), (i // STAGES & 1) ^ 1)
            mbarrier.expect(bar, 2 * PIECES * k.block_type.nbytes)
            for c in gl.static_range(2):
                # i >> 30 is 0, which the compiler does not know: unrolled, this takes more registers than there are.
                for piece in range(PIECES + (i >> 30 if PIECES > 1 else 0)):
                    b_k = k_ring.index((2 * (i % STAGES) + c) * PIECES + piece)
                    row, column = base + n * 128 + c * 64, h * D + piece * WIDTH
                    tma.async_copy_global_to_shared(k, [row, column], bar, b_k)
            i += 1


@gluon.jit
def _load_lse(
    smem, lse, starts, first, h, origin, stop, KV: gl.constexpr, G: gl.constexpr, TILE: gl.constexpr,
    COLUMN: gl.constexpr,
):  # fmt: skip
    """Log-sum-exps, base 2, of the columns of half a tile. Registers are short: they wait in shared memory."""
    column = gl.arange(0, 128, layout=COLUMN)
    t, head = first + column // 2 % TILE, column // (2 * TILE) * 2 + column % 2
    there = (t < stop) & (gl.load(starts + t, mask=t < stop, other=0) == origin)
    # Columns that do not count weigh nothing: their log-sum-exp is infinite.
    b_lse = gl.load(lse + (t.to(gl.int64) * KV + h) * G + head, mask=there, other=float("inf")) * 1.4426950408889634
    # Over no keys it is -inf, and of scores that are -inf, too, it would make what is no number.
    smem.store(gl.where(b_lse == float("-inf"), float("inf"), b_lse))


@gluon.jit
def _product(
    q_ring, k_ring, i, lap, half: gl.constexpr, keys: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    """Begin the product of one half of the keys of step i and one half of a tile's queries, ``[64, 128]``."""
    PIECES: gl.constexpr = q_ring.shape[0] // (2 * SLOTS)
    s = gl.zeros([64, 128], gl.float32, S)
    for c in gl.static_range(PIECES):
        b_k = k_ring.index((2 * (i % STAGES) + keys) * PIECES + c)
        same = i >> 30 if PIECES > 1 else 0  # as above: addresses of all pieces would stay in registers
        b_q = q_ring.index((2 * (lap % SLOTS) + half) * PIECES + c + same).permute((1, 0))
        s = warpgroup_mma(b_k, b_q, s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _weights(s, lse_smem, first, key, fewest, high, scale, stop, TILE: gl.constexpr, S: gl.constexpr):
    """Attention weights of scores ``[64, 128]``. Masked are scores, not weights: exponentials and sums are then one run
    of instructions, which interleave."""
    if key + 64 > fewest:  # queries see all keys below that
        t = first + gl.arange(0, 128, layout=gl.SliceLayout(0, S)) // 2 % TILE
        b_high = gl.load(high + t, mask=t < stop, other=0)
        keys = key + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
        s = gl.where(keys[:, None] < b_high[None, :], s, float("-inf"))
    return gl.exp2(s * scale - lse_smem.load(gl.SliceLayout(0, S))[None, :])


@gluon.jit
def _put(
    p, p_rows, first, block, stop, width, above_at, G: gl.constexpr, TILE: gl.constexpr, PER_CMP: gl.constexpr,
    PER_SLC: gl.constexpr,
):  # fmt: skip
    """Sum weights ``[64, 128]`` over the heads of each query and the keys of each block, and store them."""
    BLOCKS: gl.constexpr = 64 // PER_SLC
    total = gl.sum(gl.sum(p.reshape([64, G // 2, TILE, 2]), 3), 1)
    # A compressed key counts once for each piece of d keys that it shares with a block (NSA eq. 9).
    offset = gl.arange(0, 64, layout=gl.SliceLayout(1, total.type.layout)) % PER_SLC
    shared = gl.minimum(PER_CMP, PER_SLC - offset).to(gl.float32)
    above = gl.maximum(PER_CMP - (PER_SLC - offset), 0).to(gl.float32)
    here = gl.sum((total * shared[:, None]).reshape([BLOCKS, PER_SLC, TILE]), 1)
    after = gl.sum((total * above[:, None]).reshape([BLOCKS, PER_SLC, TILE]), 1)
    L: gl.constexpr = here.type.layout
    blocks = block * BLOCKS + gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, L))
    mate = gl.arange(0, TILE, layout=gl.SliceLayout(0, L))
    p_scores = p_rows + (mate * width)[None, :] + blocks[:, None]
    inside = (first + mate < stop)[None, :] & (blocks < width)[:, None]
    gl.store(p_scores, here, mask=inside)
    gl.store(p_scores + above_at, after, mask=inside)


@gluon.jit
def _consumer(
    C, rings, lse_smem, lse, starts, low, high, scores, scale, start, stop, tiles, width, chunk, KV: gl.constexpr,
    G: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, COUNT: gl.constexpr,
    LOCAL: gl.constexpr, BLOCK: gl.constexpr, PER_CMP: gl.constexpr, PER_SLC: gl.constexpr,
):  # fmt: skip
    """Scores of each tile's queries, from 64 of the 128 keys of each step."""
    _tma, q_ring, k_ring, q_full, q_empty, k_full, k_empty = rings
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    i = 0
    for lap in range(laps(tiles, KV)):
        first, h, origin, base, steps, fewest = _tile(
            lap, starts, low, high, start, stop, tiles, KV, TILE, COUNT, LOCAL, BLOCK, PER_SLC
        )
        second = first + TILE
        left_lse, right_lse = lse_smem.index(2 * C), lse_smem.index(2 * C + 1)
        _load_lse(left_lse, lse, starts, first, h, origin, stop, KV, G, TILE, gl.SliceLayout(0, S))
        _load_lse(right_lse, lse, starts, second, h, origin, stop, KV, G, TILE, gl.SliceLayout(0, S))
        mbarrier.wait(q_full.index(lap % SLOTS), lap // SLOTS & 1)
        p_rows = scores + (h * chunk + first - start).to(gl.int64) * width
        above_at = KV * chunk.to(gl.int64) * width
        mbarrier.wait(k_full.index(i % STAGES), i // STAGES & 1, pred=steps > 0)
        for n in range(steps):
            # No product may be under way from one step to the next, or ptxas lets none run beside anything.
            left = _product(q_ring, k_ring, i, lap, 0, C, STAGES, SLOTS, S)
            right = _product(q_ring, k_ring, i, lap, 1, C, STAGES, SLOTS, S)
            left = warpgroup_mma_wait(1, [left])
            key = base + n * 128 + C * 64
            p = _weights(left, left_lse, first, key, fewest, high, scale, stop, TILE, S)
            _put(p, p_rows, first, 2 * n + C, stop, width, above_at, G, TILE, PER_CMP, PER_SLC)
            # A branch has to stand between exponentials and wait, else ptxas moves the wait before the exponentials.
            mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=n + 1 < steps)
            right = warpgroup_mma_wait(0, [right])
            mbarrier.arrive(k_empty.index(i % STAGES))
            p = _weights(right, right_lse, second, key, fewest, high, scale, stop, TILE, S)
            _put(p, p_rows + TILE * width, second, 2 * n + C, stop, width, above_at, G, TILE, PER_CMP, PER_SLC)
            i += 1
        mbarrier.arrive(q_empty.index(lap % SLOTS))


@gluon.jit(do_not_specialize=["start", "stop", "tiles", "width", "chunk"])
def _importance_kernel(
    q, k, lse, starts, low, high, scores, scale, start, stop, tiles, width, chunk, KV: gl.constexpr, G: gl.constexpr,
    D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, COUNT: gl.constexpr,
    LOCAL: gl.constexpr, BLOCK: gl.constexpr, PER_CMP: gl.constexpr, PER_SLC: gl.constexpr,
):  # fmt: skip
    """Programs take tiles of queries and a key head in turn, until there is none left."""
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    WIDTH: gl.constexpr = k.block_type.shape[1]
    PIECES: gl.constexpr = D // WIDTH
    q_tma = gl.allocate_shared_memory(q.dtype, [2 * SLOTS * (D // 64), G // 2, TILE, 2, 64], q.layout)
    q_ring = q_tma._reinterpret(q.dtype, [2 * SLOTS * PIECES, 128, WIDTH], k.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [2 * STAGES * PIECES, 64, WIDTH], k.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(SLOTS):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_empty.index(s), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
    lse_smem = gl.allocate_shared_memory(gl.float32, [4, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()
    rings = (q_tma, q_ring, k_ring, q_full, q_empty, k_full, k_empty)
    # Settings have to stand in each list themselves: in a variable they would not be known any more when compiled.
    gl.warp_specialize(
        [
            (
                _consumer,
                (FIRST, rings, lse_smem, lse, starts, low, high, scores, scale, start, stop, tiles, width, chunk,
                 KV, G, TILE, STAGES, SLOTS, COUNT, LOCAL, BLOCK, PER_CMP, PER_SLC),
            ),
            (
                _consumer,
                (SECOND, rings, lse_smem, lse, starts, low, high, scores, scale, start, stop, tiles, width, chunk,
                 KV, G, TILE, STAGES, SLOTS, COUNT, LOCAL, BLOCK, PER_CMP, PER_SLC),
            ),
            (
                _producer,
                (q, k, rings, starts, low, high, start, stop, tiles, KV, G, D, TILE, STAGES, SLOTS, COUNT, LOCAL,
                 BLOCK, PER_SLC),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
