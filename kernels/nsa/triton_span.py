"""Attention over a contiguous span of keys per query, in Triton: compressed, window and forced keys are such spans."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch
from shoal.kernels.nsa.triton_select import LOG2E, halves, load_keys, load_rows, padded, precision, query_keys
from shoal.kernels.nsa.triton_tables import Span


@dataclass(frozen=True)
class SpanTuning:
    """rows: of a matrix product, queries times padded group. keys: of a tile. wide: in Gluon on Hopper for 96 and 192
    dimensions of queries and keys, too, as it is for 64 and 128."""

    rows: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 3
    wide: bool = True


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    scale: float,
    *,
    also: Span | None = None,
    tuning: SpanTuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Each query's attention over the keys of its span, and of a second one, ``also``, disjoint from it.

    q: ``[T, H, D]``, k: ``[C, KV, D]``, v: ``[C, KV, E]``, contiguous, of one dtype; spans count k's rows. Returns
    ``[T, H, E]`` in q's dtype and the log-sum-exp of the scaled scores, ``[T, H]`` float32, -inf over no keys (and
    the output is 0). A tile of neighbouring queries reads all keys between its lowest and its highest: spans that
    rise with the queries are cheap. scale: above 0.
    """
    tuning = tuning or SpanTuning()
    tokens, heads, dim = q.shape
    kv, dim_v = v.shape[1:]
    out = q.new_empty(tokens, heads, dim_v)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if not tokens:
        return out, lse
    group_p = padded(heads // kv, least=1)
    tile = max(1, tuning.rows // group_p)
    second = also or span
    launch(
        _span_kernel,
        (triton.cdiv(tokens, tile), kv),
        q,
        k,
        v,
        span.low,
        span.high,
        second.low,
        second.high,
        out,
        lse,
        scale * LOG2E,
        tokens,
        KV=kv,
        G=heads // kv,
        GP=group_p,
        TILE=tile,
        E=dim_v,
        EP=padded(dim_v),
        BN=tuning.keys,
        SPANS=1 if also is None else 2,
        PRECISION=precision(q.dtype),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **halves(dim),
    )
    return out, lse


@triton.jit
def tile_span(low, high, t, inside):
    """Of rows of queries t: their bounds, and of the tile: its first key, the keys all rows see, its end."""
    b_low = tl.load(low + t, mask=inside, other=0)
    b_high = tl.load(high + t, mask=inside, other=0)
    some = b_high > b_low
    first = tl.min(tl.where(some, b_low, 2147483647), 0)
    end = tl.max(tl.where(some, b_high, 0), 0)
    full_low = tl.max(b_low, 0)
    full_high = tl.min(tl.where(inside, b_high, 2147483647), 0)
    return b_low, b_high, tl.minimum(first, end), full_low, full_high, end


@triton.jit
def _step(
    b_q,
    b_q2,
    k,
    v,
    key,
    b_low,
    b_high,
    m,
    total,
    acc,
    scale,
    end,
    MASK: tl.constexpr,
    KV,
    D,
    D1,
    D2,
    E,
    EP,
    BN,
    PRECISION,
):
    """One tile of keys of the online softmax; MASK: some row does not see some key of it."""
    o_e = tl.arange(0, EP)
    keys = key + tl.arange(0, BN)
    at = keys.to(tl.int64) * KV
    held = keys < end if MASK else tl.full([BN], 1, tl.int1)
    b_k, b_k2 = load_keys(k, at, held, D, D1, D2)
    inside = held[:, None] & (o_e < E)[None, :] if EP > E else held[:, None]
    b_v = tl.load(v + at[:, None] * E + o_e[None, :], mask=inside, other=0.0)
    s = query_keys(b_q, b_q2, b_k, b_k2, D2, PRECISION)
    if MASK:
        seen = (keys[None, :] >= b_low[:, None]) & (keys[None, :] < b_high[:, None])
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    # A row without any key yet has m = -inf; 0 in its place keeps exp2(-inf - m) at 0 instead of NaN.
    base = tl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
    p = tl.exp2(s * scale - base[:, None])
    fade = tl.exp2(m - base)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * fade[:, None], input_precision=PRECISION)
    return m_new, total, acc


@triton.jit(do_not_specialize=["tokens"])
def _span_kernel(
    q,
    k,
    v,
    low,
    high,
    also_low,
    also_high,
    out,
    lse,
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
    SPANS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last queries of a document have the longest spans of compressed keys: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    o_r = tl.arange(0, TILE * GP)
    o_e = tl.arange(0, EP)
    t = tile * TILE + o_r // GP
    inside = t < tokens
    there = inside & (o_r % GP < G)
    rows = (t.to(tl.int64) * KV + h) * G + o_r % GP
    b_q, b_q2 = load_rows(q, rows, there, D, D1, D2)
    k, v = k + h * D, v + h * E
    m = tl.full([TILE * GP], float("-inf"), tl.float32)
    total = tl.zeros([TILE * GP], tl.float32)
    acc = tl.zeros([TILE * GP, EP], tl.float32)
    b_low, b_high, first, full_low, full_high, end = tile_span(low, high, t, inside)
    # Tiles of keys without masks lie from the first key that every row sees to the last one. They come first.
    middle = first + tl.minimum(tl.cdiv(tl.maximum(full_low - first, 0), BN), tl.cdiv(end - first, BN)) * BN
    last = middle + tl.maximum(tl.minimum(full_high, end) - middle, 0) // BN * BN
    for key in range(middle, last, BN):
        m, total, acc = _step(
            b_q, b_q2, k, v, key, b_low, b_high, m, total, acc, scale, end, False, KV, D, D1, D2, E, EP, BN, PRECISION
        )
    # Then, in one loop, those before, those behind, and those of the other span.
    left = (middle - first) // BN
    masked = left + tl.cdiv(tl.maximum(end - last, 0), BN)
    shift, tiles = last - left * BN, masked
    if SPANS == 2:
        c_low, c_high, also_first, _, _, also_end = tile_span(also_low, also_high, t, inside)
        tiles += tl.cdiv(also_end - also_first, BN)
    for i in range(0, tiles):
        key = tl.where(i < left, first, shift) + i * BN
        a_low, a_high, stop = b_low, b_high, end
        if SPANS == 2:
            other = i >= masked
            key = tl.where(other, also_first + (i - masked) * BN, key)
            stop = tl.where(other, also_end, end)
            a_low, a_high = tl.where(other, c_low, b_low), tl.where(other, c_high, b_high)
        m, total, acc = _step(
            b_q, b_q2, k, v, key, a_low, a_high, m, total, acc, scale, stop, True, KV, D, D1, D2, E, EP, BN, PRECISION
        )
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    inside_e = there[:, None] & (o_e < E)[None, :]
    tl.store(out + rows[:, None] * E + o_e[None, :], acc.to(out.dtype.element_ty), mask=inside_e)
    tl.store(lse + rows, tl.where(none, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453), mask=there)
