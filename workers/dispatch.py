"""Which rank hosts which expert, and how token rows get there and back: the same for every placement.

A token travels once to each other rank that hosts experts of its choice, with all its choices and gates behind it. That
rank fans it out to its experts, weights their results and adds them up, so that one row comes back. A rank without
tokens and a rank without experts run the same code with zero rows. The backward pass goes the same ways: gradients of
the output travel out, those of the tokens and their gates come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.kernels.moe.plan import Ways
from shoal.workers.expert_plan import EMPTY, slots_of
from shoal.workers.flight import Flight, PackedFlight
from shoal.workers.gathered import ApartFlight, GatheredFlight, Live
from shoal.workers.mesh import Group
from shoal.workers.symmetric import Inbox
from shoal.workers.symmetric_flight import SymmetricFlight
from shoal.workers.transfer import HostReads

if TYPE_CHECKING:
    from shoal.workers.clock import Clock


class Dispatcher:
    """Routes rows between the ranks of ``group``; ``owners[e]`` is the place in it of the rank that hosts expert e, or
    the places of several ranks that hold copies of it, among which its tokens take turns.

    A *slot* is an expert on a rank that hosts it, numbered by rank, then by expert. triton: who plans, copies rows and
    adds them up. inbox: where other ranks of this node put rows; without one, they are exchanged by ``all_to_all``.
    sources: places of the ranks that have tokens, where these host no experts; None: all. rooms: slots of each place,
    some of which may be empty, and which all stay when experts are given to others; none: as many as it has experts.
    """

    def __init__(
        self,
        group: Group,
        owners: Sequence[int | tuple[int, ...]],
        device: torch.device,
        triton: bool = False,
        inbox: Inbox | None = None,
        sources: Sequence[int] | None = None,
        rooms: Sequence[int] = (),
    ) -> None:
        self.group, self.device, self.triton, self.inbox = group, device, triton, inbox
        self.sources = tuple(range(group.size) if sources is None else sources)
        self.apart = len(self.sources) < group.size  # those that have tokens host no experts then
        self.reads = HostReads()
        self.clock: Clock | None = None
        self.rooms, self.hosts = tuple(rooms), list[int]()
        self.slots: tuple[tuple[int, ...], ...] = ()
        self._tables: dict[str, Tensor] = {}
        self.assign(owners)

    def assign(self, owners: Sequence[int | tuple[int, ...]]) -> None:
        """Gives the experts to these ranks, from the next flight on. All ranks call it alike, between two flights.

        With ``rooms``, nothing that a CUDA graph has of this changes but what is in tables, which stay where they are.
        """
        places = [(each,) if isinstance(each, int) else each for each in owners]
        self.slots = slots_of(places, self.group.size, self.rooms, self.slots)
        hosted = [(place, expert) for place, own in enumerate(self.slots) for expert in own]
        self.local = self.slots[self.group.index]
        self.first = sum(map(len, self.slots[: self.group.index]))
        self.most_local = max(map(len, self.slots))
        before, self.hosts = self.hosts, [place for place, own in enumerate(self.slots) if own]
        self.others = [place for place in self.hosts if place != self.group.index]
        slots: list[list[int]] = [[] for _ in places]
        for slot, (_, expert) in enumerate(hosted):
            if expert != EMPTY:
                slots[expert].append(slot)
        most = len(self.hosts) if self.rooms else max(map(len, slots))
        columns = [self.others.index(rank) if rank in self.others else 0 for rank in range(self.group.size)]
        self.experts = len(places)
        self.counts_in_order = not self.rooms and all(own == [e] for e, own in enumerate(slots))
        table = [slot for own in slots for slot in own + own[:1] * (most - len(own))]
        self.ways = Ways(
            table=self._table("table", table),
            copies=self._table("copies", [len(own) for own in slots]) if most > 1 else None,
            hosts=self._table("hosts", [place for place, _ in hosted]),
            numbers=self._table("numbers", list(range(len(hosted)))),
            ranks=self._table("ranks", self.others),
            columns=self._table("columns", columns),
            own=self.group.index,
            in_order=self.counts_in_order,
        )
        # nothing goes to an empty slot: it may count as any expert's
        of_slot = [max(0, expert) for _, expert in hosted]
        self.of_slot = self._table("of_slot", of_slot)
        self._of_any_slot = self._table("of_any_slot", [*of_slot, -1])  # -1 has its last element
        if self.hosts != before:
            self._everywhere: dict[int, Tensor] = {}

    def _table(self, name: str, values: list[int]) -> Tensor:
        """int32 on the device; with ``rooms`` in the memory of the last one of this name, which is as long."""
        new, kept = self._ints(values), self._tables.get(name)
        self._tables[name] = kept.copy_(new) if self.rooms and kept is not None else new
        return self._tables[name]

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def by_expert(self, by_slot: Tensor) -> Tensor:
        """``[slots] -> [experts]`` int64: sums of the slots of each expert."""
        if self.counts_in_order:
            return by_slot.long()
        empty = torch.zeros(self.experts, dtype=torch.int64, device=self.device)
        return empty.index_add_(0, self.of_slot, by_slot.long())

    def experts_of(self, slots: Tensor) -> Tensor:
        """The experts of any slots, int; -1 of none."""
        return slots if self.counts_in_order else self._of_any_slot[slots.long()]

    def everywhere(self, tokens: int) -> Tensor:
        """``[tokens, others]`` int32: where each token's sums stand, once for each other rank that hosts experts, among
        so many of every rank, or of every rank that hosts experts where these have no tokens. Kept, for CUDA graphs
        that read it."""
        if tokens not in self._everywhere:
            senders = self.hosts if self.apart else range(self.group.size)
            places = [senders.index(rank) * tokens + t for t in range(tokens) for rank in self.others]
            self._everywhere[tokens] = self._ints(places).view(tokens, len(self.others))
        return self._everywhere[tokens]

    def waiting(self) -> AbstractContextManager[None]:
        """Measures a wait for rows, where somebody watches."""
        return self.clock.part("dispatch") if self.clock else nullcontext()

    def start(
        self,
        x: Tensor,
        gates: Tensor,
        experts: Tensor,
        keep: bool = False,
        live: Live | None = None,
        counts: Tensor | None = None,
    ) -> Flight:
        """Says to all ranks what will come; ``x [T, H]``, ``gates [T, K]`` float32 or float64, ``experts [T, K]`` int.

        keep: whether there will be a backward pass. live: in a step where all ranks that have tokens have as many.
        counts: ``[experts]`` int32, how often each was chosen, where that is known.
        Every rank of the group calls it, and every method of the flight, in the same order.
        """
        if self.group.size == 1:
            return Flight(self, x, gates, experts, keep)
        if live is not None:
            return (ApartFlight if self.apart else GatheredFlight)(self, x, gates, experts, live)
        if self.inbox is None:
            return PackedFlight(self, x, gates, experts, keep)
        return SymmetricFlight(self, x, gates, experts, keep, counts)
