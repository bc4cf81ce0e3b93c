"""Where rows go and where they stand, in Triton: what :mod:`shoal.kernels.moe.plan` does by chains of operators.

Of tokens that travel, four launches plan and pack, and three sort what came, whatever the number of ranks. Blocks of
tokens count, one kernel adds up what stands before each block, and the next pass over the tokens places them: no
atomics, and nothing depends on the order in which programs run.

Words behind rows begin anywhere, and those of no rows at address 0: kernels are not compiled for how they are aligned,
or a rank would compile, and all others wait, when for once nothing comes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.moe import triton_rows
from shoal.kernels.moe.fan import Fan
from shoal.kernels.moe.plan import Plan, Ways


def _shape(ways: Ways) -> dict[str, int]:
    """What kernels are compiled for."""
    slots, world = len(ways.hosts), len(ways.columns)
    wide = {"SP": _wide(slots), "WP": _wide(world)}
    return {"S": slots, "W": world, "D": len(ways.ranks), "OWN": ways.own} | wide


def plan(experts: Tensor, gates: Tensor, ways: Ways, capacity: int = 0) -> Plan:
    """As :func:`shoal.kernels.moe.plan.plan`."""
    tokens, choices = experts.shape
    wide, count = len(ways.hosts) + len(ways.columns), max(tokens, capacity)
    tile = _tile(count, wide)
    blocks = triton.cdiv(count, tile)
    slots, before, counts = _ints(experts, tokens, choices), _ints(experts, blocks, wide), _ints(experts, wide)
    words = _ints(experts, capacity, 2 * choices) if capacity else None
    home = _ints(experts, tokens, len(ways.ranks)) if capacity else None
    if count:
        _plan_kernel[(blocks,)](
            experts.contiguous(),
            gates.contiguous(),
            ways.table,
            ways.table if ways.copies is None else ways.copies,
            ways.hosts,
            ways.ranks,
            slots,
            before,
            slots if words is None else words,
            slots if home is None else home,
            tokens,
            capacity,
            K=choices,
            MOST=1 if ways.copies is None else len(ways.table) // len(ways.copies),
            WORDS=capacity > 0,
            TILE=tile,
            num_warps=4,
            **_shape(ways),
        )
    _before_kernel[(wide,)](before, counts, blocks, N=wide, TILE=1024)
    return Plan(slots, counts, words, home, before=before, tile=tile)


def pack(plan: Plan, x: Tensor, gates: Tensor, ways: Ways, rows: Tensor, words: Tensor) -> Fan:
    """As :func:`shoal.kernels.moe.plan.pack`; the order is undefined at places that nobody takes."""
    assert plan.before is not None
    tokens = len(x)
    home, order = _ints(x, tokens, len(ways.ranks)), _ints(x, len(rows))
    if tokens and len(ways.ranks):
        _pack_kernel[(triton.cdiv(tokens, plan.tile),)](
            gates.contiguous(),
            plan.slots,
            plan.before,
            plan.counts,
            ways.hosts,
            ways.ranks,
            home,
            order,
            words,
            tokens,
            K=plan.slots.shape[1],
            B=words.stride(0),
            TILE=plan.tile,
            num_warps=4,
            **_shape(ways),
        )
        triton_rows.expand(x, home, rows)
    return Fan(home, order)


def sort(
    slots: Tensor, gates: Tensor, words: Tensor | None, first: int, experts: int, places: int
) -> tuple[Tensor, Fan, Tensor]:
    """As :func:`shoal.kernels.moe.plan.sort`; the order is 0 at places that nobody takes."""
    tokens, choices = slots.shape
    total = tokens + (0 if words is None else len(words))
    tile = _tile(total, experts)
    blocks, columns = triton.cdiv(total, tile), max(experts, 1)
    if words is None:
        words, all_gates = slots, gates
    else:
        all_gates = torch.empty(total, choices, dtype=torch.float32, device=gates.device)
    mine, rows = _ints(slots, total, choices), _ints(slots, total, choices)
    order = _ints(slots, min(places, total * choices))
    before, counts, ends = _ints(slots, blocks, columns), _ints(slots, columns), _ints(slots, experts)
    shape = {"N": columns, "NP": _wide(columns), "K": choices, "TILE": tile, "num_warps": 4}
    if total:
        _count_kernel[(blocks,)](
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
            B=words.stride(0),
            COPY=all_gates is not gates,
            **shape,
        )
    _before_kernel[(columns,)](before, counts, blocks, N=columns, TILE=1024)
    _place_kernel[(max(blocks, 1),)](mine, before, counts, ends, rows, order, total, len(order), experts, **shape)
    return all_gates, Fan(rows, order), ends


def gates_of_rows(values: Tensor, rows: Tensor) -> Tensor:
    """As :func:`shoal.kernels.moe.plan.gates_of_rows`."""
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    if out.numel():
        _gates_kernel[(triton.cdiv(out.numel(), 1024),)](values.contiguous(), rows, out, out.numel(), TILE=1024)
    return out


def gates_at_home(own: Tensor, words: Tensor, home: Tensor, slots: Tensor, ways: Ways) -> Tensor:
    """As :func:`shoal.kernels.moe.plan.gates_at_home`."""
    out = torch.empty(own.shape, dtype=torch.float32, device=own.device)
    if out.numel():
        _home_kernel[(triton.cdiv(out.numel(), 1024),)](
            own.contiguous(),
            words,
            home,
            slots,
            ways.hosts,
            ways.columns,
            out,
            out.numel(),
            K=own.shape[1],
            B=words.stride(0),
            D=home.shape[1],
            OWN=ways.own,
            TILE=1024,
            num_warps=4,
        )
    return out


def _ints(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=like.device)


def _wide(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))


def _tile(tokens: int, columns: int) -> int:
    return 64 if tokens >= 16384 and columns <= 128 else 16


@triton.jit
def _needed(slots, hosts, t, there, r, K: tl.constexpr, OWN: tl.constexpr):
    """``[TILE, WP]`` int32: 1 where a token needs a rank other than this one."""
    needed = tl.zeros([t.shape[0], r.shape[0]], tl.int32)
    for i in tl.static_range(K):
        slot = tl.load(slots + t * K + i, mask=there, other=0)
        host = tl.load(hosts + slot, mask=there, other=OWN)
        needed = needed | ((r[None, :] == host[:, None]) & (host != OWN)[:, None]).to(tl.int32)
    return needed


@triton.jit
def slot_of(table, copies, expert, t, there, MOST: tl.constexpr, OWN: tl.constexpr):
    """The slots of experts that tokens t chose: of copies one after another takes its turn."""
    if MOST > 1:
        turn = (t + OWN) % tl.load(copies + expert, mask=there, other=1)
        slot = tl.load(table + expert * MOST + turn, mask=there, other=0)
    else:
        slot = tl.load(table + expert, mask=there, other=0)
    return slot


@triton.jit(do_not_specialize=["tokens", "capacity"])
def _plan_kernel(
    experts,
    gates,
    table,
    copies,
    hosts,
    ranks,
    slots,
    before,
    words,
    home,
    tokens,
    capacity,
    S: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    OWN: tl.constexpr,
    SP: tl.constexpr,
    WP: tl.constexpr,
    K: tl.constexpr,
    MOST: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of tokens: the slot of each choice, how many chose each slot, and how many need each other rank."""
    block = tl.program_id(0)
    t = block * TILE + tl.arange(0, TILE)
    s, r = tl.arange(0, SP), tl.arange(0, WP)
    there = t < tokens
    chose = tl.zeros([TILE, SP], tl.int32)
    needed = tl.zeros([TILE, WP], tl.int32)
    for i in tl.static_range(K):
        expert = tl.load(experts + t * K + i, mask=there, other=0).to(tl.int32)
        slot = slot_of(table, copies, expert, t, there, MOST, OWN)
        host = tl.load(hosts + slot, mask=there, other=OWN)
        tl.store(slots + t * K + i, slot, mask=there)
        chose += ((s[None, :] == slot[:, None]) & there[:, None]).to(tl.int32)
        needed = needed | ((r[None, :] == host[:, None]) & (host != OWN)[:, None]).to(tl.int32)
        if WORDS:
            gate = tl.load(gates + t * K + i, mask=there, other=0.0).to(tl.int32, bitcast=True)
            tl.store(words + t * (2 * K) + i, tl.where(there, gate, -1), mask=t < capacity)
            tl.store(words + t * (2 * K) + K + i, tl.where(there, slot, -1), mask=t < capacity)
    if WORDS:
        for d in range(D):
            rank = tl.load(ranks + d)
            tl.store(home + t * D + d, t + (rank - (rank > OWN).to(tl.int32)) * capacity, mask=there)
    tl.store(before + block * (S + W) + s, tl.sum(chose, 0), mask=s < S)
    tl.store(before + block * (S + W) + S + r, tl.sum(needed, 0), mask=r < W)


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


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["words"])
def _pack_kernel(
    gates,
    slots,
    before,
    counts,
    hosts,
    ranks,
    home,
    order,
    words,
    tokens,
    B: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    OWN: tl.constexpr,
    SP: tl.constexpr,
    WP: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of tokens: their rows among those that travel to each rank, with gates and slots behind them."""
    block = tl.program_id(0)
    t = block * TILE + tl.arange(0, TILE)
    r = tl.arange(0, WP)
    there = t < tokens
    needed = _needed(slots, hosts, t, there, r, K, OWN)
    each = tl.load(counts + S + r, mask=r < W, other=0)
    first = tl.cumsum(each, 0) - each + tl.load(before + block * (S + W) + S + r, mask=r < W, other=0)
    place = first[None, :] + tl.cumsum(needed, 0) - needed
    for d in range(D):
        mine = r[None, :] == tl.load(ranks + d)
        wanted = tl.sum(tl.where(mine, needed, 0), 1) > 0
        row = tl.sum(tl.where(mine, place, 0), 1).to(tl.int64)
        tl.store(home + t * D + d, tl.where(wanted, row, -1).to(tl.int32), mask=there)
        tl.store(order + row, t * D + d, mask=wanted)
        for i in tl.static_range(K):
            gate = tl.load(gates + t * K + i, mask=there, other=0.0).to(tl.int32, bitcast=True)
            slot = tl.load(slots + t * K + i, mask=there, other=0)
            tl.store(words + row * B + i, gate, mask=wanted)
            tl.store(words + row * B + K + i, slot, mask=wanted)


@triton.jit(do_not_specialize=["tokens", "total", "first", "experts"], do_not_specialize_on_alignment=["words"])
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
    B: tl.constexpr,
    COPY: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of tokens: which of this rank's experts each choice is, -1 for others', and how many chose each."""
    block = tl.program_id(0)
    t = block * TILE + tl.arange(0, TILE)
    e = tl.arange(0, NP)
    own, came = t < tokens, (t >= tokens) & (t < total)
    behind = words + (t - tokens).to(tl.int64) * B
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


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["words"])
def _home_kernel(
    own,
    words,
    home,
    slots,
    hosts,
    columns,
    out,
    count,
    K: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = i < count
    host = tl.load(hosts + tl.load(slots + i, mask=there, other=0), mask=there, other=OWN)
    away = there & (host != OWN)
    row = tl.load(home + (i // K) * D + tl.load(columns + host, mask=away, other=0), mask=away, other=-1).to(tl.int64)
    came = tl.load(words + row * B + i % K, mask=away & (row >= 0), other=0).to(tl.float32, bitcast=True)
    mine = tl.load(own + i, mask=there, other=0.0)
    tl.store(out + i, tl.where(away & (row >= 0), came, mine), mask=there)
