"""Rows of a step of fixed shape, of which every rank gets all: for few tokens, where what takes long is not the rows.

All ranks have as many tokens. Their rows go to every rank, which computes the share of its own experts in all of them,
and sends each rank the sums of its tokens. All sizes are fixed, so that no host reads one, and a CUDA graph can hold
the exchange; results are those of rows that travel where they are needed, added up in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from shoal.kernels.moe.fan import combine
from shoal.kernels.moe.plan import address, sort
from shoal.workers.flight import Arrived, Flight
from shoal.workers.transfer import EvenExchange, Letters

if TYPE_CHECKING:
    from shoal.workers.dispatch import Dispatcher


class GatheredFlight(Flight):
    """live: ``[T]`` int64, 0 for rows that go to no expert. There is no backward pass."""

    def __init__(self, dispatcher: Dispatcher, x: Tensor, gates: Tensor, experts: Tensor, live: Tensor) -> None:
        d = self.dispatcher = dispatcher
        self.keep, (self.tokens, self.choices) = False, experts.shape
        self.triton = self._by_triton(gates)
        self.own = slice(d.group.index * self.tokens, (d.group.index + 1) * self.tokens)
        self.home = d.everywhere(self.tokens)
        self._letters = Letters.empty(self.tokens, x, self.choices * (1 + gates.element_size() // 4))
        address(x, gates, experts, live, d.ways, self.triton, self._letters.rows, self._letters.behind)
        self._exchange = EvenExchange(d.group, self._letters.buffer, everywhere=True)

    def chosen(self) -> Tensor:
        """``[ranks · T, K]`` int: the experts that all ranks' tokens chose, -1 of those that go to none."""
        return self.dispatcher.experts_of(self._letters.behind[:, -self.choices :])

    def arrive(self, x: Tensor, gates: Tensor) -> Arrived:
        """As the base class has it; but this rank's tokens stand among those of all, in the order of ranks."""
        d, letters = self.dispatcher, self._letters.of(self._landed())
        self._letters = letters
        places = len(letters.buffer) * min(self.choices, len(d.local))
        none = letters.behind[:0, -self.choices :], gates[:0]
        return Arrived((letters.rows,), *sort(*none, letters.behind, d.first, len(d.local), places, self.triton))

    def _landed(self) -> Tensor:
        with self.dispatcher.waiting():
            return self._exchange.wait()

    def give_back(self, arrived: Arrived, results: Tensor) -> None:
        """As the base class has it."""
        sums = combine(results, arrived.fan.rows, self.dispatcher.triton, arrived.gates)
        self._exchange = EvenExchange(self.dispatcher.group, sums, everywhere=False)

    def returned(self, base: Tensor) -> Tensor:
        """As the base class has it."""
        return self._at_home(self._landed(), base)
