"""Selected attention block by block, in Triton: a program holds a block and gathers the queries that chose it.

Query by query, 64k tokens of 4 KV heads move 137 GB of keys and values from the L2 cache, whatever the group. Held
still, a block is read once for some queries at a time; what moves instead are queries and partial outputs, which a
second kernel merges by their log-sum-exp.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.nsa.triton_inverse import invert
from shoal.kernels.nsa.triton_select import LOG2E, halves, load_keys, load_rows, padded, precision, query_keys
from shoal.kernels.nsa.triton_tables import Tables


@dataclass(frozen=True)
class Tuning:
    """chunk: queries whose partial outputs exist at a time. heads: KV heads at a time, 0 for all. rows: of a matrix
    product, queries times padded group. steps: such products an item, between two loads of keys and values; a power of
    two."""

    chunk: int = 8192
    heads: int = 0
    rows: int = 64
    steps: int = 16
    warps: int = 4
    stages: int = 1
    merge_warps: int = 4


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
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``selected_by_query`` returns, from the same arguments.

    own: False promises that ``blocks`` never holds the block of the query itself, so that no key has to be masked.
    beside: output and log-sum-exp of the same queries over other keys (the forced blocks), merged into the result.
    Partial outputs are kept in q's dtype, ``chunk * n`` of them a head, whatever the length of the pack.
    """
    tuning = tuning or Tuning()
    tokens, heads, dim = q.shape
    kv, dim_v = v.shape[1:]
    n, group = blocks.shape[2], heads // kv
    out = q.new_empty(tokens, heads, dim_v)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if not tokens:
        return out, lse
    group_p = padded(group, least=1)
    tile = max(1, tuning.rows // group_p)
    chunk, at_once = min(tuning.chunk, tokens), tuning.heads or kv
    inverse = invert(blocks, tables, chunk, tile * tuning.steps)
    part = q.new_empty(chunk, n, at_once, group, dim_v)
    part_lse = q.new_empty(chunk, n, at_once, group, dtype=torch.float32)
    shape = {"N": n, "KV": kv, "HEADS": at_once, "G": group, "GP": group_p, "E": dim_v, "EP": padded(dim_v)}
    for head in range(0, kv, at_once):
        width = min(at_once, kv - head)
        for index, start in enumerate(range(0, tokens, chunk)):
            stop = min(start + chunk, tokens)
            pairs = (stop - start) * n
            most = min(pairs, tables.blocks_within(start, stop) + pairs // inverse.size)
            _partial_kernel[(most, width)](
                q,
                k,
                v,
                inverse.item_blocks,
                inverse.item_pairs,
                inverse.first_items,
                tables.block_first,
                part,
                part_lse,
                scale * LOG2E,
                tokens,
                head,
                index,
                inverse.chunks,
                start,
                TILE=tile,
                ITEM=inverse.size,
                BLOCK=tables.sizes.slc_block,
                BN=padded(tables.sizes.slc_block),
                OWN=own,
                PRECISION=precision(q.dtype),
                num_warps=tuning.warps,
                num_stages=tuning.stages,
                **halves(dim),
                **shape,
            )
            _merge_kernel[(stop - start, width)](
                part,
                part_lse,
                blocks,
                out if beside is None else beside[0],
                lse if beside is None else beside[1],
                out,
                lse,
                head,
                start,
                blocks.stride(0),
                blocks.stride(1),
                NP=triton.next_power_of_2(n),
                BESIDE=beside is not None,
                num_warps=tuning.merge_warps,
                **shape,
            )
    return out, lse


@triton.jit
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
    tokens,
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
    first_item = first_items + h * chunks + chunk
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
    held = (keys < tokens) & (o_n < BLOCK)
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
def _merge_kernel(
    part,
    part_lse,
    blocks,
    beside,
    beside_lse,
    out,
    lse,
    head,
    start,
    stride_t,
    stride_h,
    NP: tl.constexpr,
    BESIDE: tl.constexpr,
    N: tl.constexpr,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """Weigh the partial outputs of one query and KV head, in the order of its choices: the same bits in every run."""
    t = start + tl.program_id(0).to(tl.int64)
    h = head + tl.program_id(1)
    o_i, o_g, o_e = tl.arange(0, NP), tl.arange(0, GP), tl.arange(0, EP)
    in_g = o_g < G
    inside = in_g[:, None] & (o_e < E)[None, :]
    rows = (t * KV + h) * G + o_g
    slots = tl.program_id(0).to(tl.int64) * N * HEADS + (h - head)
    chosen = blocks + t * stride_t + h * stride_h
    there = tl.load(chosen + o_i, mask=o_i < N, other=-1) >= 0
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
    if BESIDE:
        weight = tl.exp2(b_beside - base)
        total += weight
        acc += weight[:, None] * tl.load(beside + rows[:, None] * E + o_e[None, :], mask=inside, other=0.0)
    for i in tl.static_range(N):
        yes = tl.load(chosen + i) >= 0
        slot = (slots + i * HEADS) * G + o_g
        weight = tl.exp2(tl.load(part_lse + slot, mask=in_g & yes, other=float("-inf")) - base)
        b_part = tl.load(part + slot[:, None] * E + o_e[None, :], mask=inside & yes, other=0.0)
        acc += weight[:, None] * b_part
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    tl.store(out + rows[:, None] * E + o_e[None, :], acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + rows, tl.where(none, float("-inf"), (base + tl.log2(total)) * 0.6931471805599453), mask=in_g)
