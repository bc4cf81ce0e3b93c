"""Selected attention block by block, in Triton: a program holds a block and gathers the queries that chose it.

Query by query, 64k tokens of 4 KV heads move 137 GB of keys and values from the L2 cache, whatever the group. Held
still, a block is read once for some queries at a time; what moves instead are queries and partial outputs, which a
second kernel merges by their log-sum-exp.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2
from shoal.kernels.nsa.triton_inverse import heads_within, invert, item_bytes, segments
from shoal.kernels.nsa.triton_select import LOG2E, halves, load_keys, load_rows, padded, precision, query_keys
from shoal.kernels.nsa.triton_tables import Tables


@dataclass(frozen=True)
class Tuning:
    """chunk: queries whose partial outputs exist at a time. heads: KV heads at a time, 0 for all, or as many as a table
    of items has room for. direct: how many of a query's blocks are read query by query, while the partial outputs of
    the others are merged: the first is bound by the L2 cache, the second by memory; None: 8 for groups of 8 heads and
    more, whose heads share what is read, else 0. rows: of a matrix product, queries times padded group. steps: such
    products an item, between two loads of keys and values; a power of two."""

    chunk: int = 8192
    heads: int = 0
    direct: int | None = None
    rows: int = 64
    steps: int = 16
    warps: int = 4
    stages: int = 1
    merge_warps: int = 2
    merge_stages: int = 2

    def read_directly(self, group: int, count: int) -> int:
        """How many of a query's ``count`` blocks are, by groups of so many heads."""
        direct = self.direct if self.direct is not None else 8 if group >= 8 else 0
        return min(direct, count)


def selected_by_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    tables: Tables,
    scale: float,
    *,
    own: bool = True,
    beside: tuple[Tensor, Tensor] | None = None,
    mix: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``selected_by_query`` returns, from the same arguments.

    own: False promises that ``blocks`` never holds the block of the query itself, so that no key has to be masked; it
    must be False where queries are not all tokens of the keys.
    beside: output and log-sum-exp of the same queries over other keys (the forced blocks), merged into the result; its
    output, contiguous, is overwritten and returned.
    mix: outputs of the compressed and the window branch, gates ``[T, H, 3]``, and where the sum of the three goes.
    Partial outputs are kept in q's dtype, ``chunk * (n - direct)`` of them a head, whatever the length of the pack.
    """
    tuning = tuning or Tuning()
    tokens, heads = q.shape[:2]
    kv, dim_v = v.shape[1:]
    out = q.new_empty(tokens, heads, dim_v) if beside is None else beside[0]
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if not tokens:
        return out, lse
    group = heads // kv
    direct = tuning.read_directly(group, blocks.shape[2])
    parted, n = blocks[..., direct:], blocks.shape[2] - direct
    group_p = padded(group, least=1)
    tile = max(1, tuning.rows // group_p)
    chunk, size = min(tuning.chunk, tokens), tile * tuning.steps
    at_once = tuning.heads or heads_within(kv, item_bytes(chunk, 1, n, tables.blocks, size))
    part = q.new_empty(chunk, n, at_once, group, dim_v)
    part_lse = q.new_empty(chunk, n, at_once, group, dtype=torch.float32)
    shape = {"N": n, "HEADS": at_once, "OWN": own, **_shape(q, v, tables)}
    for head in range(0, kv, at_once):
        width = min(at_once, kv - head)
        for segment in segments(tokens, chunk, item_bytes(chunk, width, n, tables.blocks, size)):
            inverse = invert(parted[:, head : head + width], tables, chunk, size, segment) if n else None
            for start in range(segment.start * chunk, min(segment.stop * chunk, tokens), chunk):
                stop = min(start + chunk, tokens)
                pairs = (stop - start) * n
                if inverse is not None:
                    most = min(pairs, tables.blocks_within(start, stop) + pairs // size)
                    launch(
                        _partial_kernel,
                        (most, width),
                        *(q, k, v, inverse.item_blocks, inverse.item_pairs, inverse.first_items, tables.block_first),
                        *(part, part_lse, scale * LOG2E, k.shape[0], head, start // chunk - inverse.before),
                        *(inverse.chunks, start),
                        TILE=tile,
                        ITEM=size,
                        GP=group_p,
                        num_warps=tuning.warps,
                        num_stages=tuning.stages,
                        **shape,
                    )
                launch(
                    _merge_kernel,
                    (stop - start, width),
                    *(q, k, v, part, part_lse, blocks, tables.starts, tables.key_starts),
                    *(beside if beside is not None else (out, lse)),
                    *(out, lse),
                    *(mix if mix is not None else (out, out, lse, out)),
                    *(scale * LOG2E, head, start, blocks.stride(0), blocks.stride(1)),
                    DIRECT=direct,
                    EARLY=direct > 0 and n * group * dim_v <= 5 * 16 * 128,  # what registers hold
                    GP=padded(group),
                    NP=power_of_2(max(n, 1)),
                    BESIDE=beside is not None,
                    MIX=mix is not None,
                    num_warps=tuning.merge_warps,
                    num_stages=tuning.merge_stages,
                    **shape,
                )
            del inverse  # before there is a next one
    return out, lse


def _shape(q: Tensor, v: Tensor, tables: Tables) -> dict[str, Any]:
    """What both kernels are compiled for, beside how the choices are cut up."""
    (_, heads, dim), (_, kv, dim_v) = q.shape, v.shape
    return {
        "KV": kv,
        "G": heads // kv,
        "E": dim_v,
        "EP": padded(dim_v),
        "BLOCK": tables.sizes.slc_block,
        "BN": padded(tables.sizes.slc_block),
        "PRECISION": precision(q.dtype),
        **halves(dim),
    }


@triton.jit(do_not_specialize=["rows_k", "chunk", "chunks", "start"])
def _partial_kernel(
    q,
    k,
    v,
    item_blocks,
    item_pairs,
    first_items,
    block_first,
    part,
    part_lse,
    scale,
    rows_k,
    head,
    chunk,
    chunks,
    start,
    N: tl.constexpr,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
    ITEM: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs ``[TILE * GP, E]`` and log-sum-exps (base 2) of the queries of one item, over its block alone."""
    h = head + tl.program_id(1)
    first_item = first_items + tl.program_id(1) * chunks + chunk  # of the heads at work alone
    item = (tl.load(first_item) + tl.program_id(0)).to(tl.int64)
    if item >= tl.load(first_item + 1):
        return
    o_n, o_e = tl.arange(0, BN), tl.arange(0, EP)
    o_r = tl.arange(0, TILE * GP)
    in_e = o_e < E
    pairs = item_pairs + item * ITEM
    count = tl.sum((tl.load(pairs + tl.arange(0, ITEM)) >= 0).to(tl.int32), 0)
    keys = tl.load(block_first + tl.load(item_blocks + item)).to(tl.int64) + o_n
    # Keys after the document's end (of its last block) are also after every query that reads the block.
    held = (keys < rows_k) & (o_n < BLOCK)
    at = keys * KV + h
    b_k, b_k2 = load_keys(k, at, held, D, D1, D2)
    b_v = tl.load(v + at[:, None] * E + o_e[None, :], mask=held[:, None] & in_e[None, :], other=0.0)
    for step in range(0, count, TILE):
        pair = tl.load(pairs + step + o_r // GP)
        there = (pair >= 0) & (o_r % GP < G)
        t = pair // N
        rows = (t.to(tl.int64) * KV + h) * G + o_r % GP
        b_q, b_q2 = load_rows(q, rows, there, D, D1, D2)
        s = query_keys(b_q, b_q2, b_k, b_k2, D2, PRECISION) * scale
        if OWN:
            s = tl.where((keys[None, :] <= t[:, None]) & (o_n < BLOCK)[None, :], s, float("-inf"))
        elif BN > BLOCK:
            s = tl.where((o_n < BLOCK)[None, :], s, float("-inf"))
        m = tl.max(s, 1)
        if OWN:
            m = tl.where(there, m, 0.0)  # rows without a query: all their keys may be masked
        p = tl.exp2(s - m[:, None])
        total = tl.sum(p, 1)
        o = tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION) / total[:, None]
        slot = (((t - start) * N + pair % N).to(tl.int64) * HEADS + (h - head)) * G + o_r % GP
        tl.store(part + slot[:, None] * E + o_e[None, :], o.to(part.dtype.element_ty), there[:, None] & in_e[None, :])
        tl.store(part_lse + slot, m + tl.log2(total), mask=there)


@triton.jit
def _attend_blocks(
    q,
    k,
    v,
    rows,
    in_g,
    chosen,
    last,
    h,
    start,
    scale,
    COUNT: tl.constexpr,
    OWN: tl.constexpr,
    KV: tl.constexpr,
    GP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A query's maximum, sum of weights and weighted values over its first ``COUNT`` blocks, ``[GP]``, ``[GP, EP]``."""
    o_n, o_e = tl.arange(0, BN), tl.arange(0, EP)
    b_q, b_q2 = load_rows(q, rows, in_g, D, D1, D2)
    m = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, EP], tl.float32)
    for i in range(COUNT):
        block = tl.load(chosen + i)
        keys = start + block * BLOCK + o_n
        seen = (block >= 0) & (o_n < BLOCK)
        if OWN:
            seen = seen & (keys <= last)
        at = keys * KV + h
        b_k, b_k2 = load_keys(k, at, seen, D, D1, D2)
        b_v = tl.load(v + at[:, None] * E + o_e[None, :], mask=seen[:, None] & (o_e < E)[None, :], other=0.0)
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
    return m, total, acc


@triton.jit(do_not_specialize=["start"])
def _merge_kernel(
    q,
    k,
    v,
    part,
    part_lse,
    blocks,
    starts,
    key_starts,
    beside,
    beside_lse,
    out,
    lse,
    cmp,
    win,
    gates,
    mixed,
    scale,
    head,
    start,
    stride_t,
    stride_h,
    DIRECT: tl.constexpr,
    EARLY: tl.constexpr,
    BESIDE: tl.constexpr,
    MIX: tl.constexpr,
    NP: tl.constexpr,
    N: tl.constexpr,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weigh the partial outputs of one query and KV head, in the order of its choices: the same bits in every run."""
    t = start + tl.program_id(0).to(tl.int64)
    h = head + tl.program_id(1)
    o_i, o_g, o_e = tl.arange(0, NP), tl.arange(0, GP), tl.arange(0, EP)
    in_g = o_g < G
    inside = in_g[:, None] & (o_e < E)[None, :]
    rows = (t * KV + h) * G + o_g
    at = rows[:, None] * E + o_e[None, :]
    slots = tl.program_id(0).to(tl.int64) * N * HEADS + (h - head)
    chosen = blocks + t * stride_t + h * stride_h
    there = tl.load(chosen + DIRECT + o_i, mask=o_i < N, other=-1) >= 0
    each = tl.load(
        part_lse + (slots + o_i * HEADS)[:, None] * G + o_g[None, :],
        mask=there[:, None] & in_g[None, :],
        other=float("-inf"),
    )
    m = tl.max(each, 0)
    if BESIDE:
        b_beside = tl.load(beside_lse + rows, mask=in_g, other=float("-inf")) * 1.4426950408889634
        m = tl.maximum(m, b_beside)
    base = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp2(each - base[None, :]), 0)
    acc = tl.zeros([GP, EP], tl.float32)
    parts = ()
    if EARLY:
        # On their way while blocks are read, and before it is known whether somebody wrote them.
        for i in tl.static_range(N):
            slot = (slots + i * HEADS) * G + o_g
            weight = tl.exp2(tl.load(part_lse + slot, mask=in_g, other=float("-inf")) - base)
            b_part = tl.load(part + slot[:, None] * E + o_e[None, :], inside, 0.0, eviction_policy="evict_first")
            yes = tl.load(chosen + DIRECT + i) >= 0
            parts = parts + ((yes, weight, b_part),)  # type: ignore[assignment]  # noqa: RUF005
    if BESIDE:
        weight = tl.exp2(b_beside - base)
        total += weight
        acc += weight[:, None] * tl.load(beside + at, mask=inside, other=0.0)
    if not EARLY:
        for i in tl.static_range(N):
            yes = tl.load(chosen + DIRECT + i) >= 0
            slot = (slots + i * HEADS) * G + o_g
            weight = tl.exp2(tl.load(part_lse + slot, mask=in_g & yes, other=float("-inf")) - base)
            acc += weight[:, None] * tl.load(
                part + slot[:, None] * E + o_e[None, :], mask=inside & yes, other=0.0, eviction_policy="evict_first"
            )
    if DIRECT > 0:
        first = tl.load(key_starts + t).to(tl.int64)
        last = first + t - tl.load(starts + t)
        m_d, total_d, acc_d = _attend_blocks(
            *(q, k, v, rows, in_g, chosen, last, h, first, scale, DIRECT, OWN),
            *(KV, GP, E, EP, D, D1, D2, BLOCK, BN, PRECISION),
        )
        if EARLY:
            for i in tl.static_range(N):
                yes, weight, b_part = parts[i]
                acc += tl.where(yes, weight[:, None] * b_part, 0.0)
        both = tl.maximum(m, m_d)
        both = tl.where(both == float("-inf"), 0.0, both)
        # total is 0 where m is -inf, whatever base is then.
        fade, fade_d = tl.exp2(m - both), tl.exp2(m_d - both)
        base, total = both, total * fade + total_d * fade_d
        acc = acc * fade[:, None] + acc_d * fade_d[:, None]
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    if BESIDE:
        tl.debug_barrier()  # out is beside: all threads have read it
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + rows, tl.where(none, float("-inf"), (base + tl.log2(total)) * 0.6931471805599453), mask=in_g)
    if MIX:
        acc = acc * tl.load(gates + rows * 3 + 1, mask=in_g, other=0.0).to(tl.float32)[:, None]
        gate = tl.load(gates + rows * 3, mask=in_g, other=0.0).to(tl.float32)
        acc += gate[:, None] * tl.load(cmp + at, mask=inside, other=0.0)
        gate = tl.load(gates + rows * 3 + 2, mask=in_g, other=0.0).to(tl.float32)
        acc += gate[:, None] * tl.load(win + at, mask=inside, other=0.0)
        tl.store(mixed + at, acc.to(mixed.dtype.element_ty), mask=inside)
