"""Which tokens go to which ranks and experts, and what goes with them: the same in PyTorch and in Triton.

PyTorch says what is meant, by chains of operators; :mod:`shoal.kernels.moe.triton_fan` and
:mod:`shoal.kernels.moe.triton_sort` do each of these functions in one to three launches, since for few tokens the time
that a host takes to launch is what bounds dispatch. Triton wants gates in float32. Nothing here is read by the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.moe.fan import Fan, by_expert, by_rank, expand


@dataclass(frozen=True)
class Ways:
    """Which rank hosts which expert, as int32 tables. A *slot* is an expert on a rank that hosts it.

    table: ``[N · most]``, the slots of each expert, of which the first ``copies[n]`` count (``copies [N]``; None: one
    each). hosts: ``[S]``, the rank of each slot; numbers: ``[S]``, 0 and so on. ranks: ``[D]``, other ranks that rows
    may go to. columns: ``[world]``, the place of each rank in ``ranks``, 0 for those not among them. own: this rank.
    in_order: whether the slots are the experts, in their order.
    """

    table: Tensor
    copies: Tensor | None
    hosts: Tensor
    numbers: Tensor
    ranks: Tensor
    columns: Tensor
    own: int
    in_order: bool = False

    def slots_of(self, experts: Tensor) -> Tensor:
        """``[T, K]`` int -> int32: where each choice goes. Tokens take turns among the copies of an expert."""
        experts = experts.long()
        if self.copies is None:
            return self.table[experts]
        turns = torch.arange(len(experts), dtype=torch.int32, device=experts.device)[:, None] + self.own
        most = len(self.table) // len(self.copies)
        return self.table[experts * most + turns % self.copies[experts]]


@dataclass(frozen=True)
class Plan:
    """slots: ``[T, K]`` int32, where each choice goes. counts: ``[S + world]`` int32: choices of each slot, then tokens
    that go to each other rank. fan: their places, sorted by rank, then by token; Triton finds it while it packs, by
    ``before [blocks, S + world]``, the counts of the tokens before each block of ``tile``.

    letter: ``[S + capacity · 2K]`` int32, counts of slots, then gates and slots of each token, -1 behind the last;
    counts is a part of it then, without those of ranks. home: ``[T, D]`` int32, the row of each token among those of
    all ranks but this one, of capacity rows each. Both None without a capacity.
    """

    slots: Tensor
    counts: Tensor
    letter: Tensor | None = None
    home: Tensor | None = None
    fan: Fan | None = None
    before: Tensor | None = None
    tile: int = 0


def words_of(numbers: Tensor) -> Tensor:
    """``[T, K]`` of 4 or 8 bytes each -> ``[T, K or 2K]`` int32, the same bits."""
    return numbers.contiguous().view(torch.int32)


def numbers_of(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`words_of`."""
    return words.clone(memory_format=torch.contiguous_format).view(dtype)


def plan(
    experts: Tensor, gates: Tensor, ways: Ways, triton: bool, capacity: int = 0, counts: Tensor | None = None
) -> Plan:
    """experts: ``[T, K]`` int; gates: ``[T, K]`` float32, or float64 without Triton and capacity.

    capacity: rows that each rank has room for, not less than T, where all are sent; 0: those needed are, packed.
    counts: ``[N]`` int32, tokens of each expert, where they are known: they need not be counted again.
    """
    if triton:
        from shoal.kernels.moe import triton_fan

        return triton_fan.plan(experts, gates, ways, capacity, counts)
    slots = ways.slots_of(experts)
    # bincount would wait for the GPU
    of_slots = (slots.reshape(-1, 1) == ways.numbers).sum(0, dtype=torch.int32)
    each, fan = of_slots.new_zeros(len(ways.columns)), None
    if len(ways.ranks):
        fan, to_rank = by_rank(ways.hosts[slots.long()], ways.ranks)
        each.index_copy_(0, ways.ranks.long(), to_rank)
    if not capacity:
        return Plan(slots, torch.cat([of_slots, each]), fan=fan)
    tokens, choices = experts.shape
    words = slots.new_full((capacity, 2 * choices), -1)
    words[:tokens] = torch.cat([words_of(gates), slots], 1)
    first = (ways.ranks - (ways.ranks > ways.own).int()) * capacity
    home = torch.arange(tokens, dtype=torch.int32, device=slots.device)[:, None] + first
    letter = torch.cat([of_slots, words.flatten()])
    return Plan(slots, letter[: len(of_slots)], letter, home)


def pack(plan: Plan, x: Tensor, gates: Tensor, ways: Ways, triton: bool, rows: Tensor, words: Tensor) -> Fan:
    """Each token's row once for each other rank that it needs, sorted by rank, then by token; gates and slots with it.

    x: ``[T, H]``, contiguous; gates: ``[T, K]``. rows: ``[R, H]`` and words: ``[R, 2K or 3K]`` int32, where to write:
    min(K, D)·T rows, of which the first ones are taken; each is contiguous, but they may lie apart.
    """
    if triton:
        from shoal.kernels.moe import triton_fan

        return triton_fan.pack(plan, x, gates, ways, rows, words)
    if plan.fan is None:  # there is no other rank
        return Fan(plan.slots.new_empty(len(x), 0), plan.slots.new_empty(0))
    expand([x], plan.fan, False, rows)
    expand([torch.cat([words_of(gates), plan.slots], 1)], plan.fan, False, words)
    return plan.fan


def address(
    x: Tensor, gates: Tensor, experts: Tensor, live: Tensor, ways: Ways, triton: bool, rows: Tensor, words: Tensor
) -> None:
    """Each token's row, with its gates and slots behind it: of what goes to all ranks alike, whatever tokens choose.

    x: ``[T, H]``, contiguous; gates, experts: ``[T, K]``. live: ``[T]`` int64, 0 for tokens that go to no expert: their
    slots are -1. rows: ``[T, H]`` and words: ``[T, 2K or 3K]`` int32, where to write: as :func:`pack` has them.
    """
    if triton:
        from shoal.kernels.moe import triton_address

        triton_address.address(x, gates, experts, live, ways, rows, words)
        return
    rows.copy_(x)
    words.copy_(torch.cat([words_of(gates), torch.where(live[:, None] > 0, ways.slots_of(experts), -1)], 1))


def sort(
    slots: Tensor, gates: Tensor, words: Tensor | None, first: int, experts: int, places: int, triton: bool
) -> tuple[Tensor, Fan, Tensor]:
    """Copies of a rank's own tokens, then of those that came, sorted by expert, then by token.

    slots: ``[T, K]`` int32 and gates: ``[T, K]`` of own tokens; words: ``[C, 2K or 3K]`` int32, gates and slots of the
    others, or None; their rows may lie apart, and those of several ranks ``[ranks, C, …]`` too. Slots from ``first`` on
    are this rank's ``experts`` ones, other copies go nowhere. Gates ``[T + C, K]``, and what
    :func:`shoal.kernels.moe.fan.by_expert` gives for so many places.
    """
    if triton:
        from shoal.kernels.moe import triton_sort

        return triton_sort.sort(slots, gates, words, first, experts, places)
    if words is not None:
        choices, words = slots.shape[1], words.flatten(0, -2)
        gates = torch.cat([gates, numbers_of(words[:, :-choices], gates.dtype)])
        slots = torch.cat([slots, words[:, -choices:]])
    mine = slots - first
    mine = torch.where((mine >= 0) & (mine < experts), mine, -1)
    return gates, *by_expert(mine, experts, places)


def gates_of_rows(values: Tensor, rows: Tensor, triton: bool) -> Tensor:
    """``[R] -> [T, K]``: what belongs to each copy, 0 for none. values: float32, or float64 without Triton."""
    if triton:
        from shoal.kernels.moe import triton_sort

        return triton_sort.gates_of_rows(values, rows)
    if not len(values):
        return values.new_zeros(rows.shape)
    return values[rows.clamp(min=0).long()].masked_fill_(rows < 0, 0)


def gates_at_home(own: Tensor, words: Tensor, home: Tensor, slots: Tensor, ways: Ways, triton: bool) -> Tensor:
    """``[T, K]``: of choices that other ranks host what came back, of this rank's ones ``own [T, K]``.

    words: ``[R, K or 2K]`` int32, the bits of what came back; rows may lie apart. home: ``[T, D]``, the row of each
    token and rank, -1 for none.
    """
    if not len(words) or not home.shape[1]:
        return own
    if triton:
        from shoal.kernels.moe import triton_fan

        return triton_fan.gates_at_home(own, words, home, slots, ways)
    hosts, choices = ways.hosts[slots.long()], slots.shape[1]
    place = home.gather(1, ways.columns[hosts.long()].long())
    away = (hosts != ways.own) & (place >= 0)
    flat = place.clamp(min=0).long() * choices + torch.arange(choices, device=place.device)
    return torch.where(away, numbers_of(words, own.dtype).flatten()[flat], own)
