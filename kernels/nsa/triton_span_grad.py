"""Gradients of attention over spans of keys, in Triton: a program holds keys and reads the queries that see them.

With ``w = g · p`` (a gate times an attention weight) and ``r = d_out · out`` of the branch, per row:
``d_v = wᵀ d_out``, ``d_s = w ∘ (d_out vᵀ - r)``, ``d_k = scale · d_sᵀ q``, ``d_q = scale · d_s k``. The gate is part of
the row's log-sum-exp, so that no gradient of a branch's output is ever stored.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, tiles
from shoal.kernels.nsa.triton_select import LOG2E, halves, load_keys, load_rows, padded, precision, query_keys
from shoal.kernels.nsa.triton_span import tile_span
from shoal.kernels.nsa.triton_tables import Span


@dataclass(frozen=True)
class SpanGradTuning:
    """rows: of a tile, queries times padded group. keys: of a tile. chunk: queries of a program, 0 for all that see
    its keys; more programs share a tile of keys then, and add up what they find. lap: the queries of a program's round,
    best as many as see a tile of keys. wide: in Gluon on Hopper for 192 dimensions of queries and keys, too, as it is
    for 128."""

    rows: int = 64
    keys: int = 128
    chunk: int = 0
    lap: int = 1
    warps: int = 8
    stages: int = 2
    wide: bool = True


@dataclass(frozen=True)
class Grads:
    """What gradients are added to, float32 zeros at first: d_q ``[T, H, D]``, d_k ``[C, KV, D]``, d_v ``[C, KV, E]``.

    None of them is multiplied by the scale.
    """

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor

    @classmethod
    def of(cls, d_q: Tensor, k: Tensor, v: Tensor) -> Grads:
        """Zeros for the gradients of keys and values."""
        return cls(d_q, *(torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v)))


def span_backward(
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
    deterministic: bool = False,
    tuning: SpanGradTuning | None = None,
) -> None:
    """Add the gradients of ``span_attention(q, k, v, span, scale)`` times its gates to ``grads``; those of keys and
    values are put there, where no programs share them.

    base: ``[T, H]`` float32, log-sum-exp (base 2) minus log2 of the gate, inf where there is nothing. dots: ``[T, H]``
    float32, ``d_out · out``. seen: of each key the queries that see it, which have to lie side by side.
    Gradients of queries are added with atomic operations, whose order varies, and so are those of keys that several
    programs share; deterministic: a program has its queries, or its keys, for itself, and everything but the values is
    multiplied twice.
    """
    tuning = tuning or SpanGradTuning()
    tokens, (keys, kv, _) = len(q), v.shape
    if not tokens or not keys:
        return
    chunk = tokens if deterministic or not tuning.chunk else tuning.chunk
    args, shape = (q, k, v, d_out, base, dots), _shape(q, v, tuning)
    launch(
        _keys_kernel,
        (tiles(keys, shape["BN"]), tiles(tokens, chunk), kv),
        *args,
        grads.d_q,
        grads.d_k,
        grads.d_v,
        span.low,
        span.high,
        seen.low,
        seen.high,
        scale * LOG2E,
        tokens,
        keys,
        chunk,
        tuning.lap,
        WITH_Q=not deterministic,
        SHARED=chunk < tokens,
        **shape,
    )
    if deterministic:
        launch(
            _queries_kernel,
            (tiles(tokens, shape["TILE"]), kv),
            *(*args, grads.d_q, span.low, span.high, scale * LOG2E, tokens),
            **shape,
        )


def _shape(q: Tensor, v: Tensor, tuning: SpanGradTuning) -> dict[str, Any]:
    """What both kernels are compiled for."""
    (_, heads, dim), (_, kv, dim_v) = q.shape, v.shape
    group_p = padded(heads // kv, least=1)
    # Wider rows leave less shared memory to load ahead into.
    stages, tile_keys = min(tuning.stages, 3 if max(dim, dim_v) <= 128 else 2 if dim_v <= 128 else 1), tuning.keys
    if q.dtype == torch.float32:
        stages, tile_keys = 1, min(tile_keys, 64)
    return {
        "KV": kv,
        "G": heads // kv,
        "GP": group_p,
        "TILE": max(1, tuning.rows // group_p),
        "E": dim_v,
        "EP": padded(dim_v),
        "BN": tile_keys,
        "PRECISION": precision(q.dtype),
        "num_warps": tuning.warps,
        "num_stages": stages,
        **halves(dim),
    }


@triton.jit
def score_weights(b_k, b_k2, b_v, b_q, b_q2, b_do, base, scale, D2: tl.constexpr, PRECISION):
    """The weights of all scores times their gates, and ``v d_outᵀ``, both ``[keys, rows]`` float32."""
    s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(b_k2, tl.trans(b_q2), s, input_precision=PRECISION)
    dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    return tl.exp2(s * scale - base[None, :]), dp


@triton.jit
def add_query_grads(d_q, rows, there, ds, b_k, b_k2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, PRECISION):
    """Add ``d_s k`` of ``ds [keys, rows]`` to the rows of d_q, atomically."""
    d_s = tl.trans(ds)
    o_d = tl.arange(0, D1)
    part = tl.dot(d_s, b_k, input_precision=PRECISION)
    tl.atomic_add(d_q + rows[:, None] * D + o_d[None, :], part, mask=there[:, None] & (o_d < D)[None, :], sem="relaxed")
    if D2 > 0:
        o_d = D1 + tl.arange(0, D2)
        part = tl.dot(d_s, b_k2, input_precision=PRECISION)
        tl.atomic_add(
            d_q + rows[:, None] * D + o_d[None, :], part, mask=there[:, None] & (o_d < D)[None, :], sem="relaxed"
        )


@triton.jit
def put_key_grads(x, at, held, acc, first, D: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr):
    """Put ``acc [keys, WIDTH]`` into columns ``first …`` of x ``[…, D]``; atomically added where x is shared."""
    o_d = first + tl.arange(0, WIDTH)
    inside = held[:, None] & (o_d < D)[None, :]
    if SHARED:
        tl.atomic_add(x + at[:, None] * D + o_d[None, :], acc, mask=inside, sem="relaxed")
    else:
        tl.store(x + at[:, None] * D + o_d[None, :], acc, mask=inside)


@triton.jit
def _keys_kernel(
    q,
    k,
    v,
    d_out,
    base,
    dots,
    d_q,
    d_k,
    d_v,
    low,
    high,
    seen_low,
    seen_high,
    scale,
    tokens,
    keys,
    chunk,
    lap,
    WITH_Q: tl.constexpr,
    SHARED: tl.constexpr,
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
    h = tl.program_id(2)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    held = o_n < keys
    begin = tl.program_id(1) * chunk
    stop = tl.minimum(begin + chunk, tokens)
    b_low = tl.load(seen_low + o_n, mask=held, other=1 << 30)
    b_high = tl.load(seen_high + o_n, mask=held, other=0)
    some = b_high > b_low
    begin = tl.maximum(begin, tl.min(tl.where(some, b_low, 2147483647), 0))
    stop = tl.minimum(stop, tl.max(tl.where(some, b_high, 0), 0))
    if begin >= stop:
        return
    # Queries from clear_low to clear_high see all keys; they need no mask.
    clear_low = tl.max(b_low, 0)  # beyond all queries where the tile has keys that do not exist
    clear_high = tl.min(b_high, 0)
    # All programs go through the queries in step, each from a multiple of a lap: those that share queries meet at them,
    # and what they add to is still in the L2 cache.
    turn = tl.cdiv(begin, lap) * lap
    turn = tl.where(turn < stop, turn, begin)
    before = tl.cdiv(stop - turn, TILE)
    at = o_n.to(tl.int64) * KV + h
    o_e, o_r = tl.arange(0, EP), tl.arange(0, TILE * GP)
    b_k, b_k2 = load_rows(k, at, held, D, D1, D2)
    b_v = tl.load(v + at[:, None] * E + o_e[None, :], mask=held[:, None] & (o_e < E)[None, :], other=0.0)
    dk = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv = tl.zeros([BN, EP], tl.float32)
    for i in range(0, before + tl.cdiv(turn - begin, TILE)):
        first = tl.where(i < before, turn + i * TILE, begin + (i - before) * TILE)
        t = first + o_r // GP
        there = (t < tl.where(i < before, stop, turn)) & (o_r % GP < G)
        rows = (t.to(tl.int64) * KV + h) * G + o_r % GP
        b_q, b_q2 = load_rows(q, rows, there, D, D1, D2)
        b_do = tl.load(d_out + rows[:, None] * E + o_e[None, :], there[:, None] & (o_e < E)[None, :], other=0.0)
        b_base = tl.load(base + rows, mask=there, other=float("inf"))
        b_dots = tl.load(dots + rows, mask=there, other=0.0)
        w, dp = score_weights(b_k, b_k2, b_v, b_q, b_q2, b_do, b_base, scale, D2, PRECISION)
        if (first < clear_low) | (first + TILE > clear_high):
            c_low, c_high = tl.load(low + t, mask=there, other=0), tl.load(high + t, mask=there, other=0)
            w = tl.where((o_n[:, None] >= c_low[None, :]) & (o_n[:, None] < c_high[None, :]), w, 0.0)
        ds = (w * (dp - b_dots[None, :])).to(b_q.dtype)
        dv = tl.dot(w.to(b_do.dtype), b_do, dv, input_precision=PRECISION)
        dk = tl.dot(ds, b_q, dk, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, b_q2, dk2, input_precision=PRECISION)
        if WITH_Q:
            add_query_grads(d_q, rows, there, ds, b_k, b_k2, D, D1, D2, PRECISION)
    put_key_grads(d_v, at, held, dv, 0, E, EP, SHARED)
    put_key_grads(d_k, at, held, dk, 0, D, D1, SHARED)
    if D2 > 0:
        put_key_grads(d_k, at, held, dk2, D1, D, D2, SHARED)


@triton.jit
def _queries_kernel(
    q,
    k,
    v,
    d_out,
    base,
    dots,
    d_q,
    low,
    high,
    scale,
    tokens,
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
    """d_q alone: a program has a tile of queries for itself."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    o_r, o_e, o_d = tl.arange(0, TILE * GP), tl.arange(0, EP), tl.arange(0, D1)
    t = tile * TILE + o_r // GP
    there = (t < tokens) & (o_r % GP < G)
    rows = (t.to(tl.int64) * KV + h) * G + o_r % GP
    b_q, b_q2 = load_rows(q, rows, there, D, D1, D2)
    b_do = tl.load(d_out + rows[:, None] * E + o_e[None, :], there[:, None] & (o_e < E)[None, :], other=0.0)
    b_base = tl.load(base + rows, mask=there, other=float("inf"))
    b_dots = tl.load(dots + rows, mask=there, other=0.0)
    b_low, b_high, first, _, _, end = tile_span(low, high, t, t < tokens)
    dq = tl.load(d_q + rows[:, None] * D + o_d[None, :], mask=there[:, None] & (o_d < D)[None, :], other=0.0)
    o_d2 = D1 + tl.arange(0, D2 if D2 > 0 else 16)
    dq2 = tl.load(d_q + rows[:, None] * D + o_d2[None, :], mask=there[:, None] & (o_d2 < D)[None, :], other=0.0)
    for key in range(first, end, BN):
        o_n = key + tl.arange(0, BN)
        held = o_n < end
        at = o_n.to(tl.int64) * KV + h
        b_k, b_k2 = load_keys(k, at, held, D, D1, D2)
        b_v = tl.load(v + at[None, :] * E + o_e[:, None], mask=held[None, :] & (o_e < E)[:, None], other=0.0)
        s = query_keys(b_q, b_q2, b_k, b_k2, D2, PRECISION)
        dp = tl.dot(b_do, b_v, input_precision=PRECISION)
        w = tl.exp2(s * scale - b_base[:, None])
        w = tl.where((o_n[None, :] >= b_low[:, None]) & (o_n[None, :] < b_high[:, None]), w, 0.0)
        ds = (w * (dp - b_dots[:, None])).to(b_q.dtype)
        dq = tl.dot(ds, tl.trans(b_k), dq, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, tl.trans(b_k2), dq2, input_precision=PRECISION)
    tl.store(d_q + rows[:, None] * D + o_d[None, :], dq, mask=there[:, None] & (o_d < D)[None, :])
    if D2 > 0:
        tl.store(d_q + rows[:, None] * D + o_d2[None, :], dq2, mask=there[:, None] & (o_d2 < D)[None, :])
