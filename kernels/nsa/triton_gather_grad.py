"""Gradients of selected attention, in Triton: a program holds a block and reads the queries of a chunk that chose it.

Queries are taken in chunks so small that what is gathered of them, and the sum of their gradients, stay in the L2 cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.nsa.triton_inverse import lists_by_block
from shoal.kernels.nsa.triton_select import LOG2E, halves, load_keys, load_rows, padded, precision, query_keys
from shoal.kernels.nsa.triton_span_grad import Grads, add_query_grads, put_key_grads, score_weights
from shoal.kernels.nsa.triton_tables import Tables


@dataclass(frozen=True)
class GatherGradTuning:
    """chunk: queries whose gradients are summed at a time. rows: of a tile, queries times padded group."""

    chunk: int = 2048
    rows: int = 32
    warps: int = 4
    stages: int = 2


def selected_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    base: Tensor,
    dots: Tensor,
    blocks: Tensor,
    tables: Tables,
    scale: float,
    grads: Grads,
    *,
    deterministic: bool = False,
    tuning: GatherGradTuning | None = None,
) -> None:
    """Add the gradients of ``selected_by_query(q, k, v, blocks, …)`` times its gates to ``grads``.

    base, dots, deterministic: as in :func:`shoal.kernels.nsa.triton_span_grad.span_backward`.
    """
    tuning = tuning or GatherGradTuning()
    tokens, heads, dim = q.shape
    kv, dim_v = v.shape[1:]
    n = blocks.shape[2]
    if not tokens or not n:
        return
    group_p = padded(heads // kv, least=1)
    tile = max(1, tuning.rows // group_p)
    chunk = tokens if deterministic else min(tuning.chunk, tokens)
    pairs, first, chunks = lists_by_block(blocks, tables, chunk, stable=deterministic)
    shape = {
        "N": n,
        "KV": kv,
        "G": heads // kv,
        "GP": group_p,
        "E": dim_v,
        "EP": padded(dim_v),
        "BLOCK": tables.sizes.slc_block,
        "BN": padded(tables.sizes.slc_block),
        "PRECISION": precision(q.dtype),
        "num_stages": tuning.stages,
        **halves(dim),
    }
    _block_kernel[(kv * chunks * tables.blocks,)](
        q,
        k,
        v,
        d_out,
        base,
        dots,
        grads.d_q,
        grads.d_k,
        grads.d_v,
        pairs,
        first,
        tables.block_first,
        tables.starts,
        scale * LOG2E,
        tokens,
        chunks,
        tables.blocks,
        TILE=tile,
        WITH_Q=not deterministic,
        SHARED=chunks > 1,
        num_warps=tuning.warps,
        **shape,
    )
    if deterministic:
        _query_kernel[(tokens * kv,)](
            q,
            k,
            v,
            d_out,
            base,
            dots,
            grads.d_q,
            blocks,
            tables.starts,
            scale * LOG2E,
            tokens,
            blocks.stride(0),
            blocks.stride(1),
            num_warps=2,
            **{**shape, "GP": padded(heads // kv)},
        )


@triton.jit
def _block_kernel(
    q,
    k,
    v,
    d_out,
    base,
    dots,
    d_q,
    d_k,
    d_v,
    pairs,
    first,
    block_first,
    starts,
    scale,
    tokens,
    chunks,
    blocks,
    WITH_Q: tl.constexpr,
    SHARED: tl.constexpr,
    N: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs follow one another by head, chunk of queries, block."""
    counter = tl.program_id(0)
    begin, stop = tl.load(first + counter).to(tl.int64), tl.load(first + counter + 1).to(tl.int64)
    if begin >= stop:
        return
    h = counter // (chunks * blocks)
    o_n, o_e, o_r = tl.arange(0, BN), tl.arange(0, EP), tl.arange(0, TILE * GP)
    key = tl.load(block_first + counter % blocks)
    keys = key + o_n
    # The last block of a document ends with it: what stands behind it is another program's.
    held = (keys < tokens) & (o_n < BLOCK)
    held = held & (tl.load(starts + keys, mask=held, other=-1) == tl.load(starts + key))
    at = keys.to(tl.int64) * KV + h
    b_k, b_k2 = load_rows(k, at, held, D, D1, D2)
    b_v = tl.load(v + at[:, None] * E + o_e[None, :], mask=held[:, None] & (o_e < E)[None, :], other=0.0)
    dk = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    dv = tl.zeros([BN, EP], tl.float32)
    for step in range(begin, stop, TILE):
        place = step + o_r // GP
        there = (place < stop) & (o_r % GP < G)
        t = tl.load(pairs + place, mask=place < stop, other=2147483647)
        rows = (t.to(tl.int64) * KV + h) * G + o_r % GP
        b_q, b_q2 = load_rows(q, rows, there, D, D1, D2)
        b_do = tl.load(d_out + rows[:, None] * E + o_e[None, :], there[:, None] & (o_e < E)[None, :], other=0.0)
        b_base = tl.load(base + rows, mask=there, other=float("inf"))
        b_dots = tl.load(dots + rows, mask=there, other=0.0)
        w, dp = score_weights(b_k, b_k2, b_v, b_q, b_q2, b_do, b_base, scale, D2, PRECISION)
        # Of its own block a query sees what stands before it, of others all. Keys that do not exist are zeros, whose
        # weight may be infinite.
        w = tl.where((keys[:, None] <= t[None, :]) & held[:, None], w, 0.0)
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
def _query_kernel(
    q,
    k,
    v,
    d_out,
    base,
    dots,
    d_q,
    blocks,
    starts,
    scale,
    tokens,
    stride_t,
    stride_h,
    N: tl.constexpr,
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
    """d_q alone: a program has a query and a KV head for itself."""
    pid = tl.program_id(0)
    t = (pid % tokens).to(tl.int64)
    h = pid // tokens
    o_g, o_n, o_e, o_d = tl.arange(0, GP), tl.arange(0, BN), tl.arange(0, EP), tl.arange(0, D1)
    there = o_g < G
    rows = (t * KV + h) * G + o_g
    start = tl.load(starts + t).to(tl.int64)
    b_q, b_q2 = load_rows(q, rows, there, D, D1, D2)
    b_do = tl.load(d_out + rows[:, None] * E + o_e[None, :], there[:, None] & (o_e < E)[None, :], other=0.0)
    b_base = tl.load(base + rows, mask=there, other=float("inf"))
    b_dots = tl.load(dots + rows, mask=there, other=0.0)
    dq = tl.load(d_q + rows[:, None] * D + o_d[None, :], mask=there[:, None] & (o_d < D)[None, :], other=0.0)
    o_d2 = D1 + tl.arange(0, D2 if D2 > 0 else 16)
    dq2 = tl.load(d_q + rows[:, None] * D + o_d2[None, :], mask=there[:, None] & (o_d2 < D)[None, :], other=0.0)
    for i in range(N):
        block = tl.load(blocks + t * stride_t + h * stride_h + i)
        keys = start + block * BLOCK + o_n
        seen = (block >= 0) & (keys <= t) & (o_n < BLOCK)
        at = keys * KV + h
        b_k, b_k2 = load_keys(k, at, seen, D, D1, D2)
        b_v = tl.load(v + at[None, :] * E + o_e[:, None], mask=seen[None, :] & (o_e < E)[:, None], other=0.0)
        s = query_keys(b_q, b_q2, b_k, b_k2, D2, PRECISION)
        dp = tl.dot(b_do, b_v, input_precision=PRECISION)
        w = tl.where(seen[None, :], tl.exp2(s * scale - b_base[:, None]), 0.0)
        ds = (w * (dp - b_dots[:, None])).to(b_q.dtype)
        dq = tl.dot(ds, tl.trans(b_k), dq, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, tl.trans(b_k2), dq2, input_precision=PRECISION)
    tl.store(d_q + rows[:, None] * D + o_d[None, :], dq, mask=there[:, None] & (o_d < D)[None, :])
    if D2 > 0:
        tl.store(d_q + rows[:, None] * D + o_d2[None, :], dq2, mask=there[:, None] & (o_d2 < D)[None, :])
