"""Which rank hosts which expert, and how token rows get there and back: the same for every placement.

A token travels once to each other rank that hosts experts of its choice, with all its choices and gates behind it. That
rank fans it out to its experts, weights their results and adds them up, so that one row comes back. A rank without
tokens and a rank without experts run the same code with zero rows. The backward pass goes the same ways: gradients of
the output travel out, those of the tokens and their gates come back.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.workers.flight import Flight, PackedFlight
from shoal.workers.mesh import Group
from shoal.workers.symmetric import Inbox, SymmetricFlight
from shoal.workers.transfer import HostReads

if TYPE_CHECKING:
    from shoal.workers.watch import Clock


class Dispatcher:
    """Routes rows between the ranks of ``group``; ``owners[e]`` is the place in it of the rank that hosts expert e.

    A *slot* is an expert's number when they are sorted by owner. triton: who copies rows and adds them up. inbox: where
    other ranks of this node put rows; without one, they are exchanged by ``all_to_all``.
    """

    def __init__(
        self,
        group: Group,
        owners: tuple[int, ...],
        device: torch.device,
        triton: bool = False,
        inbox: Inbox | None = None,
    ) -> None:
        self.group, self.device, self.triton, self.inbox = group, device, triton, inbox
        by_owner = sorted(range(len(owners)), key=lambda e: owners[e])  # stable: keeps the experts of an owner in order
        self.local = tuple(e for e in by_owner if owners[e] == group.index)
        self.first = sum(owner < group.index for owner in owners)
        self.others = sorted(set(owners) - {group.index})
        self.reads = HostReads()
        self.clock: Clock | None = None
        self.spare = 0  # multiprocessors that products leave to an exchange that runs meanwhile
        slots = [0] * len(owners)
        for slot, expert in enumerate(by_owner):
            slots[expert] = slot

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        columns = [self.others.index(rank) if rank in self.others else 0 for rank in range(group.size)]
        self.slots, self.hosts = ints(slots), ints([owners[e] for e in by_owner])
        self.numbers, self.ranks = ints(list(range(len(owners)))), ints(self.others)
        self.columns = ints(columns).long()  # of ``others``, by rank

    def waiting(self) -> AbstractContextManager[None]:
        """Measures a wait for rows, where somebody watches."""
        return self.clock.part("dispatch") if self.clock else nullcontext()

    def start(self, x: Tensor, gates: Tensor, experts: Tensor, keep: bool = False) -> Flight:
        """Says to all ranks what will come; ``x [T, H]``, ``gates [T, K]`` float32 or float64, ``experts [T, K]`` int.

        keep: whether there will be a backward pass.
        Every rank of the group calls it, and every method of the flight, in the same order.
        """
        if self.group.size == 1:
            return Flight(self, x, gates, experts, keep)
        if self.inbox is None:
            return PackedFlight(self, x, gates, experts, keep)
        return SymmetricFlight(self, x, gates, experts, keep)
