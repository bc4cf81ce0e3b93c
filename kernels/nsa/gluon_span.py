"""Attention over a contiguous span of keys per query for Hopper, in Gluon: products run under the softmax.

The twin of :func:`shoal.kernels.nsa.triton_span.span_attention` for long spans that rise with the queries, as those of
compressed keys do. A producer warp copies tiles of queries, keys and values with TMA; two warpgroups of consumers
share the keys and values, each for 64 rows (queries times group) of its own, and take turns at the tensor cores.

Tensors of Gluon have powers of two for sizes. Queries and keys of 192 dimensions are pieces of 64 in shared memory,
whose products are added up in the same registers; 96 dimensions are pieces of 32, 64 and 128 are one piece.
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

from shoal.kernels.hopper import descriptor, multiprocessors, on_hopper, split_halves
from shoal.kernels.launches import launch
from shoal.kernels.nsa.triton_select import LOG2E
from shoal.kernels.nsa.triton_tables import Span

ROWS = 64
"""Rows of a warpgroup's matrix products."""


def supported(q: Tensor, k: Tensor, v: Tensor, *, wide: bool = True) -> bool:
    """Whether :func:`gluon_span_attention` is to take these: Hopper, 16 bits, dimensions 64 or 128, groups of 2^i ≤ 64.
    wide: also 96 and 192 dimensions of queries and keys."""
    group, rest = divmod(q.shape[1], k.shape[1])
    return (
        on_hopper(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in ((64, 96, 128, 192) if wide else (64, 128))
        and v.shape[2] in (64, 128)
        and rest == 0
        and 1 <= group <= ROWS
        and group & (group - 1) == 0
    )


def gluon_span_attention(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> tuple[Tensor, Tensor]:
    """Each query's attention over the keys of its span; what ``span_attention`` returns.

    q: ``[T, H, D]``, k: ``[C, KV, D]``, v: ``[C, KV, E]``, contiguous, of one dtype, as :func:`supported` says. Returns
    ``[T, H, E]`` in q's dtype and the log-sum-exp of the scaled scores, ``[T, H]`` float32, -inf over no keys (and
    the output is 0). scale: above 0.
    """
    if not supported(q, k, v):
        raise ValueError(f"not for {q.dtype} {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} on {q.device}")
    tokens, heads, dim = q.shape
    keys, kv, dim_v = v.shape
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if not tokens or not keys:
        return q.new_zeros(tokens, heads, dim_v), lse.fill_(float("-inf"))
    out = q.new_empty(tokens, heads, dim_v)
    group = heads // kv
    tile, block, piece = ROWS // group, 128, gcd(dim, 128)
    # Beside queries and keys of 192 dimensions there is no room for whole outputs.
    width = dim_v if dim <= 128 else 64
    tiles = triton.cdiv(tokens, 2 * tile)
    launch(
        _span_kernel,
        (min(tiles * kv, multiprocessors(q.device)),),
        descriptor(q, tile, group, piece),
        descriptor(k.view(keys, kv * dim), block, piece),
        descriptor(v.view(keys, kv * dim_v), block, dim_v),
        descriptor(out, tile, group, width),
        span.low,
        span.high,
        lse,
        scale * LOG2E,
        tokens,
        tiles,
        KV=kv,
        G=group,
        D=dim,
        TILE=tile,
        BN=block,
        num_warps=4,
    )
    return out, lse


@gluon.jit
def _ring(tensor, SLOTS: gl.constexpr, PIECES: gl.constexpr, READERS: gl.constexpr):
    """Buffers of tiles, in pieces of their columns, each tile with a barrier that says it is filled and one that says
    all readers are done with it."""
    buffers = gl.allocate_shared_memory(
        tensor.dtype,
        [SLOTS * PIECES] + tensor.block_type.shape,  # noqa: RUF005
        tensor.layout,
    )
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return buffers, full, empty


@gluon.jit
def _fetch(tensor, at, column, ring, slot, lap, PIECES: gl.constexpr):
    """Copy a tile of ``tensor``, from a column on, to a slot of a ring that has gone around ``lap`` times."""
    WIDTH: gl.constexpr = tensor.block_type.shape[-1]
    mbarrier.wait(ring[2].index(slot), (lap & 1) ^ 1)
    mbarrier.expect(ring[1].index(slot), PIECES * tensor.block_type.nbytes)
    # lap >> 30 is 0, which the compiler does not know: it would unroll the loop, and the producer has few registers.
    for c in range(PIECES + (lap >> 30 if PIECES > 1 else 0)):
        place = at + (column + c * WIDTH,)  # noqa: RUF005
        tma.async_copy_global_to_shared(tensor, place, ring[1].index(slot), ring[0].index(slot * PIECES + c))


@gluon.jit
def laps(tiles, KV: gl.constexpr):
    """How many tiles this program takes: its own number's, and every one a grid further on."""
    return gl.cdiv(tiles * KV - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _tile(low, high, idx, tokens, tiles, KV: gl.constexpr, TOKENS: gl.constexpr, BN: gl.constexpr):
    """Of tile ``idx``: its first query, head, first key, tiles of keys, at least one, and the keys all queries see."""
    # The last queries of a document have the longest spans of compressed keys: they begin first.
    first, h = (tiles - 1 - idx // KV) * TOKENS, idx % KV
    t = first + gl.arange(0, TOKENS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    inside = (t >= 0) & (t < tokens)
    b_low = gl.load(low + t, mask=inside, other=0)
    b_high = gl.load(high + t, mask=inside, other=0)
    some = b_high > b_low
    end = gl.max(gl.where(some, b_high, 0), 0)
    begin = gl.minimum(gl.min(gl.where(some, b_low, 2147483647), 0), end)
    full_high = gl.min(gl.where(inside, b_high, 2147483647), 0)
    return first, h, begin, gl.maximum(gl.cdiv(end - begin, BN), 1), gl.max(b_low, 0), full_high


@gluon.jit
def _producer(q, k, v, q_ring, k_ring, v_ring, low, high, tokens, tiles, KV, G, D, TILE, BN, STAGES):
    """Fill the rings: of each tile its queries, in two halves, then keys, each with the values before it."""
    E: gl.constexpr = v.block_type.shape[1]
    PIECES: gl.constexpr = D // k.block_type.shape[1]
    i = 0
    for lap in range(laps(tiles, KV)):
        idx = gl.program_id(0) + lap * gl.num_programs(0)
        t, h, key, count, _, _ = _tile(low, high, idx, tokens, tiles, KV, 2 * TILE, BN)
        for c in gl.static_range(2):
            _fetch(q, (t + c * TILE, h * G), 0, q_ring, c, lap, PIECES)
        for n in range(count):
            _fetch(k, (key + n * BN,), h * D, k_ring, i % STAGES, i // STAGES, PIECES)
            _fetch(v, (key + n * BN,), h * E, v_ring, i % STAGES, i // STAGES, 1)
            i += 1


@gluon.jit
def _softmax(s, key, t, m, total, low, high, tokens, full_low, full_high, scale, BN: gl.constexpr, S: gl.constexpr):
    """A step of the online softmax over scores ``[ROWS, BN]``; masks where some query does not see some key."""
    if (key < full_low) | (key + BN > full_high):
        b_low = gl.load(low + t, mask=t < tokens, other=0)
        b_high = gl.load(high + t, mask=t < tokens, other=0)
        keys = key + gl.arange(0, BN, layout=gl.SliceLayout(0, S))
        s = gl.where((keys[None, :] >= b_low[:, None]) & (keys[None, :] < b_high[:, None]), s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    # A row without any key yet has m = -inf; 0 in its place keeps exp2(-inf - m) at 0 instead of NaN.
    base = gl.where(m_new == float("-inf"), 0.0, m_new)
    fade = gl.exp2(m - base)
    p = gl.exp2(s * scale - base[:, None])
    return p, m_new, total * fade + gl.sum(p, 1), fade


@gluon.jit
def _scores(
    q_ring, k_ring, i, turn, C: gl.constexpr, M: gl.constexpr, BN: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr
):
    """Begin the product of queries ``[M, D]`` and the keys of step i, once this consumer's turn has come."""
    PIECES: gl.constexpr = q_ring[0].shape[0] // 2
    WIDTH: gl.constexpr = k_ring[0].shape[2]
    mbarrier.wait(turn.index(C), (i & 1) ^ (1 - C))
    s = gl.zeros([M, BN], gl.float32, S)
    for c in gl.static_range(PIECES):
        q = q_ring[0].index(C * PIECES + c).reshape([M, WIDTH])
        k = k_ring[0].index(i % STAGES * PIECES + c).permute((1, 0))
        s = warpgroup_mma(q, k, s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _put(o, x, at, column, smem):
    """Store a tile ``[M, E]`` of outputs, from a column on, in pieces that the buffer holds."""
    M: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    if o.block_type.shape[2] == WIDTH:
        tma.store_wait(0)
        smem.reshape([M, WIDTH]).store(x)
        fence_async_shared()
        tma.async_copy_shared_to_global(o, at + (column,), smem)  # noqa: RUF005
    else:
        left, right = split_halves(x)
        _put(o, left, at, column, smem)
        _put(o, right, at, column + WIDTH // 2, smem)


@gluon.jit
def _consumer(
    C, q_ring, k_ring, v_ring, o_smem, turn, o, low, high, lse, scale, tokens, tiles, KV, G, TILE, BN, STAGES
):
    """The softmax and products of one half of each tile."""
    E: gl.constexpr = v_ring[0].shape[2]
    M: gl.constexpr = TILE * G
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    r = gl.arange(0, M, layout=gl.SliceLayout(1, S))
    i = 0
    idx = gl.program_id(0)
    first, h, key, count, full_low, full_high = _tile(low, high, idx, tokens, tiles, KV, 2 * TILE, BN)
    for lap in range(laps(tiles, KV)):
        t = first + C * TILE + r // G
        rows = (t.to(gl.int64) * KV + h) * G + r % G
        mbarrier.wait(q_ring[1].index(C), lap & 1)
        mbarrier.wait(k_ring[1].index(i % STAGES), i // STAGES & 1)
        s = _scores(q_ring, k_ring, i, turn, C, M, BN, S, STAGES)
        mbarrier.arrive(turn.index(1 - C))
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_ring[2].index(i % STAGES))
        m = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        total = gl.zeros([M], gl.float32, gl.SliceLayout(1, S))
        p, m, total, _ = _softmax(s, key, t, m, total, low, high, tokens, full_low, full_high, scale, BN, S)
        acc = gl.zeros([M, E], gl.float32, ACC)
        b_p = gl.convert_layout(p.to(o.dtype), P)
        mbarrier.wait(k_ring[1].index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=count > 1)
        for n in range(1, count):
            # The scores of this step and the output of the one before are multiplied in the background.
            s = _scores(q_ring, k_ring, i + 1, turn, C, M, BN, S, STAGES)
            mbarrier.wait(v_ring[1].index(i % STAGES), i // STAGES & 1)
            acc = warpgroup_mma(b_p, v_ring[0].index(i % STAGES), acc, is_async=True)
            mbarrier.arrive(turn.index(1 - C))
            s = warpgroup_mma_wait(1, [s])
            mbarrier.arrive(k_ring[2].index((i + 1) % STAGES))
            key += BN
            p, m, total, fade = _softmax(s, key, t, m, total, low, high, tokens, full_low, full_high, scale, BN, S)
            # A branch has to stand between softmax and wait, else ptxas moves the wait before the softmax.
            mbarrier.wait(k_ring[1].index((i + 2) % STAGES), (i + 2) // STAGES & 1, pred=n + 1 < count)
            acc, p, fade, total = warpgroup_mma_wait(0, [acc, p, fade, total])
            mbarrier.arrive(v_ring[2].index(i % STAGES))
            acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, ACC))[:, None]
            b_p = gl.convert_layout(p.to(o.dtype), P)
            i += 1
        mbarrier.arrive(q_ring[2].index(C))
        mbarrier.wait(v_ring[1].index(i % STAGES), i // STAGES & 1)
        acc = warpgroup_mma(b_p, v_ring[0].index(i % STAGES), acc, is_async=True)
        idx += gl.num_programs(0)
        at = (first + C * TILE, h * G)
        first, h, key, count, full_low, full_high = _tile(low, high, idx, tokens, tiles, KV, 2 * TILE, BN)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_ring[2].index(i % STAGES))
        i += 1
        none = total == 0.0
        gl.store(lse + rows, gl.where(none, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453), mask=t < tokens)
        share = gl.convert_layout(1.0 / gl.where(none, 1.0, total), gl.SliceLayout(1, ACC))
        _put(o, (acc * share[:, None]).to(o.dtype), at, 0, o_smem.index(C))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "tiles"])
def _span_kernel(
    q,
    k,
    v,
    o,
    low,
    high,
    lse,
    scale,
    tokens,
    tiles,
    KV: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    TILE: gl.constexpr,
    BN: gl.constexpr,
):
    """Programs take tiles of 2 · TILE queries and a key head in turn, until there is none left."""
    STAGES: gl.constexpr = 2
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    PIECES: gl.constexpr = D // k.block_type.shape[1]
    q_ring = _ring(q, 2, PIECES, 1)
    k_ring = _ring(k, STAGES, PIECES, 2)
    v_ring = _ring(v, STAGES, 1, 2)
    o_smem = gl.allocate_shared_memory(o.dtype, [2] + o.block_type.shape, o.layout)  # noqa: RUF005
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(turn.index(c), count=1)
    fence_async_shared()
    # Steps through rings and turns are counted from 0 by each of the three on its own; all count alike.
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    FIRST,
                    q_ring,
                    k_ring,
                    v_ring,
                    o_smem,
                    turn,
                    o,
                    low,
                    high,
                    lse,
                    scale,
                    tokens,
                    tiles,
                    KV,
                    G,
                    TILE,
                    BN,
                    STAGES,
                ),
            ),
            (
                _consumer,
                (
                    SECOND,
                    q_ring,
                    k_ring,
                    v_ring,
                    o_smem,
                    turn,
                    o,
                    low,
                    high,
                    lse,
                    scale,
                    tokens,
                    tiles,
                    KV,
                    G,
                    TILE,
                    BN,
                    STAGES,
                ),
            ),
            (_producer, (q, k, v, q_ring, k_ring, v_ring, low, high, tokens, tiles, KV, G, D, TILE, BN, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
