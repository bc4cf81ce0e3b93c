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
from shoal.workers.flight import Flight, PackedFlight
from shoal.workers.gathered import ApartFlight, GatheredFlight, Live
from shoal.workers.mesh import Group
from shoal.workers.symmetric import Inbox, SymmetricFlight
from shoal.workers.transfer import HostReads

if TYPE_CHECKING:
    from shoal.workers.clock import Clock


class Dispatcher:
    """Routes rows between the ranks of ``group``; ``owners[e]`` is the place in it of the rank that hosts expert e, or
    the places of several ranks that hold copies of it, among which its tokens take turns.

    A *slot* is an expert on a rank that hosts it, numbered by rank, then by expert. triton: who plans, copies rows and
    adds them up. inbox: where other ranks of this node put rows; without one, they are exchanged by ``all_to_all``.
    sources: places of the ranks that have tokens, where these host no experts; None: all.
    """

    def __init__(
        self,
        group: Group,
        owners: Sequence[int | tuple[int, ...]],
        device: torch.device,
        triton: bool = False,
        inbox: Inbox | None = None,
        sources: Sequence[int] | None = None,
    ) -> None:
        self.group, self.device, self.triton, self.inbox = group, device, triton, inbox
        self.sources = tuple(range(group.size) if sources is None else sources)
        self.apart = len(self.sources) < group.size  # those that have tokens host no experts then
        self.reads = HostReads()
        self.clock: Clock | None = None
        self.assign(owners)

    def assign(self, owners: Sequence[int | tuple[int, ...]]) -> None:
        """Gives the experts to these ranks, from the next flight on. All ranks call it alike, between two flights."""
        places = [(each,) if isinstance(each, int) else each for each in owners]
        hosted = sorted((place, expert) for expert, own in enumerate(places) for place in own)
        self.local = tuple(expert for place, expert in hosted if place == self.group.index)
        self.first = sum(place < self.group.index for place, _ in hosted)
        self.most_local = max(sum(place == rank for place, _ in hosted) for rank in range(self.group.size))
        self.hosts = sorted({place for place, _ in hosted})
        self.others = [place for place in self.hosts if place != self.group.index]
        slots: list[list[int]] = [[] for _ in places]
        for slot, (_, expert) in enumerate(hosted):
            slots[expert].append(slot)
        most = max(map(len, slots))
        columns = [self.others.index(rank) if rank in self.others else 0 for rank in range(self.group.size)]
        self.experts, self.counts_in_order = len(places), all(own == [e] for e, own in enumerate(slots))
        table = [slot for own in slots for slot in own + own[:1] * (most - len(own))]
        self.ways = Ways(
            table=self._ints(table),
            copies=self._ints([len(own) for own in slots]) if most > 1 else None,
            hosts=self._ints([place for place, _ in hosted]),
            numbers=self._ints(list(range(len(hosted)))),
            ranks=self._ints(self.others),
            columns=self._ints(columns),
            own=self.group.index,
            in_order=self.counts_in_order,
        )
        self.of_slot = self._ints([expert for _, expert in hosted])
        self._of_any_slot = self._ints([*(expert for _, expert in hosted), -1])  # -1 has its last element
        self._everywhere: dict[int, Tensor] = {}

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
