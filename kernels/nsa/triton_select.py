"""Selected attention query by query, in Triton: one program reads the blocks of one query and KV head."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2
from shoal.kernels.nsa.triton_tables import Tables

LOG2E = 1.4426950408889634
"""Scores are taken to base 2, which the hardware's exponential is to."""


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds ``size``; matrix products want 16 at least."""
    return max(least, power_of_2(size))


def halves(dim: int) -> dict[str, int]:
    """Two powers of two that hold ``dim`` keys' elements, the second 0 if one does: 192 is 128 + 64 rather than 256."""
    first = padded(dim)
    if first == dim or dim <= 16:
        return {"D": dim, "D1": first, "D2": 0}
    return {"D": dim, "D1": first // 2, "D2": padded(dim - first // 2)}


def precision(dtype: torch.dtype) -> str:
    """float32 inputs are multiplied as such, not rounded to TensorFloat-32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def selected_by_query(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, tables: Tables, scale: float, warps: int = 2, stages: int = 2
) -> tuple[Tensor, Tensor]:
    """Each query's attention over its own blocks, causal inside them (NSA eq. 11, 12).

    q: ``[T, H, D]``, k: ``[T, KV, D]``, v: ``[T, KV, E]``, contiguous, of one dtype. blocks: ``[T, KV, n]`` int32,
    counted from the start of the query's document; no block twice, none that begins after the query; -1: none. Its
    last dimension is contiguous. Returns ``[T, H, E]`` in q's dtype and the log-sum-exp of the scaled scores,
    ``[T, H]`` float32, -inf where a query has no block (and its output is 0).
    """
    tokens, heads, dim = q.shape
    kv, dim_v = v.shape[1:]
    out = q.new_empty(tokens, heads, dim_v)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if not tokens:
        return out, lse
    launch(
        _by_query_kernel,
        (tokens * kv,),
        q,
        k,
        v,
        blocks,
        tables.starts,
        out,
        lse,
        scale * LOG2E,
        tokens,
        blocks.shape[2],
        blocks.stride(0),
        blocks.stride(1),
        KV=kv,
        G=heads // kv,
        GP=padded(heads // kv),
        E=dim_v,
        EP=padded(dim_v),
        BLOCK=tables.sizes.slc_block,
        BN=padded(tables.sizes.slc_block),
        PRECISION=precision(q.dtype),
        **halves(dim),
        num_warps=warps,
        num_stages=stages,
    )
    return out, lse


@triton.jit
def load_rows(x, rows, there, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """``[rows, D1]`` and ``[rows, D2]`` of x ``[…, D]``, zeros beyond D and where not ``there``; see ``halves``."""
    o_d = tl.arange(0, D1)
    inside = there[:, None] & (o_d < D)[None, :] if D1 > D else there[:, None]
    first = tl.load(x + rows[:, None] * D + o_d[None, :], mask=inside, other=0.0)
    second = first
    if D2 > 0:
        o_d = D1 + tl.arange(0, D2)
        second = tl.load(x + rows[:, None] * D + o_d[None, :], mask=there[:, None] & (o_d < D)[None, :], other=0.0)
    return first, second


@triton.jit
def load_keys(x, rows, there, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """What ``load_rows`` loads, transposed: ``[D1, rows]`` and ``[D2, rows]``."""
    o_d = tl.arange(0, D1)
    inside = there[None, :] & (o_d < D)[:, None] if D1 > D else there[None, :]
    first = tl.load(x + rows[None, :] * D + o_d[:, None], mask=inside, other=0.0)
    second = first
    if D2 > 0:
        o_d = D1 + tl.arange(0, D2)
        second = tl.load(x + rows[None, :] * D + o_d[:, None], mask=there[None, :] & (o_d < D)[:, None], other=0.0)
    return first, second


@triton.jit
def query_keys(b_q, b_q2, b_k, b_k2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """q kᵀ of the two parts of q and k."""
    s = tl.dot(b_q, b_k, input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(b_q2, b_k2, s, input_precision=PRECISION)
    return s


@triton.jit
def _by_query_kernel(
    q,
    k,
    v,
    blocks,
    starts,
    out,
    lse,
    scale,
    tokens,
    count,
    stride_t,
    stride_h,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # All queries of a head follow one another, so that the keys and values of one head at a time fill the L2 cache.
    pid = tl.program_id(0)
    t = (pid % tokens).to(tl.int64)
    h = pid // tokens
    o_g, o_n = tl.arange(0, GP), tl.arange(0, BN)
    o_e = tl.arange(0, EP)
    in_g, in_e = o_g < G, o_e < E
    rows = (t * KV + h) * G + o_g
    start = tl.load(starts + t).to(tl.int64)
    b_q, b_q2 = load_rows(q, rows, in_g, D, D1, D2)
    m = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, EP], tl.float32)
    p_blocks = blocks + t * stride_t + h * stride_h
    for i in range(count):
        block = tl.load(p_blocks + i)
        keys = start + block * BLOCK + o_n
        seen = (block >= 0) & (keys <= t) & (o_n < BLOCK)
        at = keys * KV + h
        b_k, b_k2 = load_keys(k, at, seen, D, D1, D2)
        b_v = tl.load(v + at[:, None] * E + o_e[None, :], mask=seen[:, None] & in_e[None, :], other=0.0)
        s = query_keys(b_q, b_q2, b_k, b_k2, D2, PRECISION) * scale
        s = tl.where(seen[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A query without any key yet has m = -inf; 0 in its place keeps exp2(-inf - m) at 0 instead of NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(m - base)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc * fade[:, None], input_precision=PRECISION)
        m = m_new
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    tl.store(out + rows[:, None] * E + o_e[None, :], acc.to(out.dtype.element_ty), mask=in_g[:, None] & in_e[None, :])
    tl.store(lse + rows, tl.where(none, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453), mask=in_g)
