"""Where rows go, in Triton: what :mod:`shoal.kernels.moe.plan` does by chains of operators.

Of tokens that travel, four launches plan and pack, and three (:mod:`shoal.kernels.moe.triton_sort`) sort what came,
whatever the number of ranks, all by counting.

Words behind rows begin anywhere, and those of no rows at address 0: kernels are not compiled for how they are aligned,
or a rank would compile, and all others wait, when for once nothing comes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, tiles
from shoal.kernels.moe import triton_rows
from shoal.kernels.moe.fan import Fan
from shoal.kernels.moe.plan import Plan, Ways
from shoal.kernels.moe.triton_sort import count_before, ints, padded_columns, tile_of


def _shape(ways: Ways) -> dict[str, int]:
    """What kernels are compiled for."""
    slots, world = len(ways.hosts), len(ways.columns)
    wide = {"SP": padded_columns(slots), "WP": padded_columns(world)}
    return {"S": slots, "W": world, "D": len(ways.ranks), "OWN": ways.own} | wide


def plan(experts: Tensor, gates: Tensor, ways: Ways, capacity: int = 0, known: Tensor | None = None) -> Plan:
    """As :func:`shoal.kernels.moe.plan.plan`."""
    tokens, choices = experts.shape
    shape = _shape(ways)
    if capacity:
        shape["W"] = 0  # all tokens go to all ranks
    wide, count = shape["S"] + shape["W"], max(tokens, capacity)
    tile = tile_of(count, wide)
    blocks = tiles(count, tile)
    given = known is not None and capacity > 0 and ways.in_order and known.shape[0] == wide
    slots, letter = ints(experts, tokens, choices), ints(experts, wide + capacity * 2 * choices)
    counts, before = letter[:wide], letter if given else ints(experts, blocks, wide)
    home = ints(experts, tokens, shape["D"]) if capacity else None
    if count:
        launch(
            _plan_kernel,
            (blocks,),
            experts.contiguous(),
            gates.contiguous(),
            ways.table,
            ways.table if ways.copies is None else ways.copies,
            ways.hosts,
            ways.ranks,
            slots,
            before,
            slots if known is None else known,
            letter,
            slots if home is None else home,
            tokens,
            capacity,
            K=choices,
            MOST=1 if ways.copies is None else len(ways.table) // len(ways.copies),
            WORDS=capacity > 0,
            GIVEN=given,
            TILE=tile,
            num_warps=4,
            **shape,
        )
    if not given:
        count_before(before, counts)
    return Plan(slots, counts, letter if capacity else None, home, before=before, tile=tile)


def pack(plan: Plan, x: Tensor, gates: Tensor, ways: Ways, rows: Tensor, words: Tensor) -> Fan:
    """As :func:`shoal.kernels.moe.plan.pack`; the order is undefined at places that nobody takes."""
    assert plan.before is not None
    tokens = len(x)
    home, order = ints(x, tokens, len(ways.ranks)), ints(x, len(rows))
    if tokens and len(ways.ranks):
        launch(
            _pack_kernel,
            (tiles(tokens, plan.tile),),
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


def gates_at_home(own: Tensor, words: Tensor, home: Tensor, slots: Tensor, ways: Ways) -> Tensor:
    """As :func:`shoal.kernels.moe.plan.gates_at_home`."""
    out = torch.empty(own.shape, dtype=torch.float32, device=own.device)
    if out.numel():
        launch(
            _home_kernel,
            (tiles(out.numel(), 1024),),
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
    known,
    letter,
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
    GIVEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of tokens: the slot of each choice, how many chose each slot, and how many need each other rank. GIVEN:
    they were counted before."""
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
        if not GIVEN:
            chose += ((s[None, :] == slot[:, None]) & there[:, None]).to(tl.int32)
        if W:
            needed = needed | ((r[None, :] == host[:, None]) & (host != OWN)[:, None]).to(tl.int32)
        if WORDS:
            words = letter + S
            gate = tl.load(gates + t * K + i, mask=there, other=0.0).to(tl.int32, bitcast=True)
            tl.store(words + t * (2 * K) + i, tl.where(there, gate, -1), mask=t < capacity)
            tl.store(words + t * (2 * K) + K + i, tl.where(there, slot, -1), mask=t < capacity)
    if WORDS:
        for d in range(D):
            rank = tl.load(ranks + d)
            tl.store(home + t * D + d, t + (rank - (rank > OWN).to(tl.int32)) * capacity, mask=there)
    if GIVEN:
        tl.store(letter + s, tl.load(known + s, mask=s < S, other=0), mask=(s < S) & (block == 0))
    else:
        tl.store(before + block * (S + W) + s, tl.sum(chose, 0), mask=s < S)
    if W:
        tl.store(before + block * (S + W) + S + r, tl.sum(needed, 0), mask=r < W)


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
