"""Rows sorted by expert, in Triton: what :func:`shoal.kernels.moe.plan.sort` does by chains of operators, in three
launches.

Blocks of tokens count, one kernel adds up what stands before each block, and the next pass over the tokens places them:
no atomics, and nothing depends on the order in which programs run. What words behind rows are aligned to:
:mod:`shoal.kernels.moe.triton_fan`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2, tiles
from shoal.kernels.moe.fan import Fan


def sort(
    slots: Tensor, gates: Tensor, words: Tensor | None, first: int, experts: int, places: int
) -> tuple[Tensor, Fan, Tensor]:
    """As :func:`shoal.kernels.moe.plan.sort`; the order is 0 at places that nobody takes."""
    tokens, choices = slots.shape
    total = tokens + (0 if words is None else words.shape[:-1].numel())
    tile = tile_of(total, experts)
    blocks, columns = tiles(total, tile), max(experts, 1)
    if words is None:
        words, all_gates = slots, gates
    else:
        all_gates = torch.empty(total, choices, dtype=torch.float32, device=gates.device)
    mine, rows = ints(slots, total, choices), ints(slots, total, choices)
    order = ints(slots, min(places, total * choices))
    before, counts, ends = ints(slots, blocks, columns), ints(slots, columns), ints(slots, experts)
    shape = {"N": columns, "NP": padded_columns(columns), "K": choices, "TILE": tile, "num_warps": 4}
    if total:
        launch(
            _count_kernel,
            (blocks,),
            slots,
            gates.contiguous(),
            words,
            all_gates,
            mine,
            before,
            tokens,
            total,
            first,
            experts,
            max(words.shape[-2], 1),
            words.stride(0),  # of no matter for those of one rank, which are all of its tokens
            B=words.stride(-2),
            COPY=all_gates is not gates,
            **shape,
        )
    count_before(before, counts)
    launch(
        _place_kernel, (max(blocks, 1),), mine, before, counts, ends, rows, order, total, len(order), experts, **shape
    )
    return all_gates, Fan(rows, order), ends


def gates_of_rows(values: Tensor, rows: Tensor) -> Tensor:
    """As :func:`shoal.kernels.moe.plan.gates_of_rows`."""
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    if out.numel():
        launch(_gates_kernel, (tiles(out.numel(), 1024),), values.contiguous(), rows, out, out.numel(), TILE=1024)
    return out


def tile_of(tokens: int, columns: int) -> int:
    """Tokens of a program that counts so many columns."""
    return 64 if tokens >= 16384 and columns <= 128 else 16


def padded_columns(columns: int) -> int:
    """The power of two that holds them."""
    return max(16, power_of_2(columns))


def ints(like: Tensor, *shape: int) -> Tensor:
    """Room for int32 on a tensor's device."""
    return torch.empty(shape, dtype=torch.int32, device=like.device)


def count_before(before: Tensor, counts: Tensor) -> None:
    """Of each column of ``before [blocks, N]`` int32 the sum over earlier blocks, in place of a block's own count; and
    the totals, to ``counts [N]``."""
    blocks, columns = before.shape
    launch(_before_kernel, (columns,), before, counts, blocks, N=columns, TILE=1024)


@triton.jit(do_not_specialize=["blocks"])
def _before_kernel(before, counts, blocks, N: tl.constexpr, TILE: tl.constexpr):
    """Of one column: the sum over earlier blocks, in place of the block's own count; and the total."""
    n = tl.program_id(0)
    count = tl.zeros([], tl.int32)
    for start in range(0, blocks, TILE):
        b = start + tl.arange(0, TILE)
        own = tl.load(before + b * N + n, mask=b < blocks, other=0)
        tl.store(before + b * N + n, count + tl.cumsum(own, 0) - own, mask=b < blocks)
        count += tl.sum(own, 0)
    tl.store(counts + n, count)


@triton.jit(
    do_not_specialize=["tokens", "total", "first", "experts", "each", "apart"],
    do_not_specialize_on_alignment=["words"],
)
def _count_kernel(
    slots,
    gates,
    words,
    all_gates,
    mine,
    before,
    tokens,
    total,
    first,
    experts,
    each,
    apart,
    B: tl.constexpr,
    COPY: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of tokens: which of this rank's experts each choice is, -1 for others', and how many chose each. Words of
    tokens that came lie B apart, those of each rank's ``each`` tokens ``apart``."""
    block = tl.program_id(0)
    t = block * TILE + tl.arange(0, TILE)
    e = tl.arange(0, NP)
    own, came = t < tokens, (t >= tokens) & (t < total)
    number = (t - tokens).to(tl.int64)
    behind = words
    if COPY:
        behind = words + number // each * apart + number % each * B
    chose = tl.zeros([TILE, NP], tl.int32)
    for i in tl.static_range(K):
        slot = tl.load(slots + t * K + i, mask=own, other=-1)
        if COPY:
            slot = tl.where(came, tl.load(behind + K + i, mask=came, other=-1), slot)
            gate = tl.load(behind + i, mask=came, other=0).to(tl.float32, bitcast=True)
            gate = tl.where(own, tl.load(gates + t * K + i, mask=own, other=0.0), gate)
            tl.store(all_gates + t * K + i, gate, mask=own | came)
        expert = slot - first
        expert = tl.where((expert >= 0) & (expert < experts), expert, -1)
        tl.store(mine + t * K + i, expert, mask=own | came)
        chose += ((e[None, :] == expert[:, None]) & (own | came)[:, None]).to(tl.int32)
    tl.store(before + block * N + e, tl.sum(chose, 0), mask=e < N)


@triton.jit(do_not_specialize=["total", "places", "experts"])
def _place_kernel(
    mine,
    before,
    counts,
    ends,
    rows,
    order,
    total,
    places,
    experts,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """The row of each choice; and 0 at the places of the order that nobody takes.

    Of a token that chose an expert twice, the copies stand one behind the other.
    """
    block = tl.program_id(0)
    t = block * TILE + tl.arange(0, TILE)
    e = tl.arange(0, NP)
    there = t < total
    b_counts = tl.load(counts + e, mask=e < N, other=0)
    b_ends = tl.cumsum(b_counts, 0)
    tl.store(ends + e, b_ends, mask=(e < experts) & (block == 0))
    chose = tl.zeros([TILE, NP], tl.int32)
    for i in tl.static_range(K):
        expert = tl.load(mine + t * K + i, mask=there, other=-1)
        chose += (e[None, :] == expert[:, None]).to(tl.int32)
    first = b_ends - b_counts + tl.load(before + block * N + e, mask=(e < N) & (block * TILE < total), other=0)
    place = first[None, :] + tl.cumsum(chose, 0) - chose
    taken = tl.sum(b_counts, 0)
    for i in tl.static_range(K):
        expert = tl.load(mine + t * K + i, mask=there, other=-1)
        hit = e[None, :] == expert[:, None]
        row = tl.sum(tl.where(hit, place, 0), 1)
        place += hit.to(tl.int32)
        tl.store(rows + t * K + i, tl.where(expert < 0, -1, row), mask=there)
        tl.store(order + row, t * K + i, mask=there & (expert >= 0) & (row < places))
        free = t * K + i
        tl.store(order + free, free * 0, mask=there & (free >= taken) & (free < places))


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["rows"])
def _gates_kernel(values, rows, out, count, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.load(rows + i, mask=i < count, other=-1)
    tl.store(out + i, tl.load(values + row, mask=row >= 0, other=0.0), mask=i < count)
