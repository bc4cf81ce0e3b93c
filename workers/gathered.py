"""Rows of a step of fixed shape, all of which go to every rank with experts: for few tokens, where what takes long is
not the rows.

All ranks that have tokens have as many. Their rows go to every rank that hosts experts, which computes the share of its
own experts in all of them, and sends each rank the sums of its tokens. All sizes are fixed, so that no host reads one,
and a CUDA graph can hold the exchange; results are those of rows that travel where they are needed, added up in the
same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from shoal.kernels.moe.fan import Fan, combine
from shoal.kernels.moe.plan import address, sort
from shoal.workers.flight import Arrived, Flight, Own
from shoal.workers.transfer import EvenExchange, Letters, OneWayExchange

if TYPE_CHECKING:
    from shoal.workers.dispatch import Dispatcher


class Live(NamedTuple):
    """Of a step of fixed shape. rows: tokens of each rank that has any. mask: ``[T]`` int64 of this rank's own, 0 for
    those that nobody needs, which go to no expert; T is ``rows``, or 0 on a rank that hosts experts alone."""

    mask: Tensor
    rows: int


class GatheredFlight(Flight):
    """Of ranks that all have tokens and experts. There is no backward pass."""

    def __init__(self, dispatcher: Dispatcher, x: Tensor, gates: Tensor, experts: Tensor, live: Live) -> None:
        self.dispatcher, self.live = dispatcher, live
        self.keep, (self.tokens, self.choices) = False, experts.shape
        self.triton = self._by_triton(gates)
        self.own = slice(dispatcher.group.index * self.tokens, (dispatcher.group.index + 1) * self.tokens)
        self.home = dispatcher.everywhere(self.tokens)
        self._letters = Letters.empty(self.tokens * self._copies, x, self.choices * (1 + gates.element_size() // 4))
        self._address(x, gates, experts)
        self._exchange = self._out()

    @property
    def _copies(self) -> int:
        """Letters of each token."""
        return 1

    def _address(self, x: Tensor, gates: Tensor, experts: Tensor) -> None:
        """This rank's rows into the first letters."""
        own = self._letters.of(self._letters.buffer[: self.tokens])
        address(x, gates, experts, self.live.mask, self.dispatcher.ways, self.triton, own.rows, own.behind)

    def _out(self) -> EvenExchange:
        return EvenExchange(self.dispatcher.group, self._letters.buffer, everywhere=True)

    def _back(self, sums: Tensor) -> EvenExchange:
        return EvenExchange(self.dispatcher.group, sums, everywhere=False)

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
        self._exchange = self._back(combine(results, arrived.fan.rows, self.dispatcher.triton, arrived.gates))

    def returned(self, base: Tensor, own: Own | None = None) -> Tensor:
        """As the base class has it."""
        return self._at_home(self._landed(), base, own)


class ApartFlight(GatheredFlight):
    """Of ranks that have tokens or experts, not both. Rows cross from the ones to the others and sums come back;
    nothing travels among ranks of a kind. :meth:`chosen` is known to ranks with experts alone, others have no rows."""

    @property
    def _copies(self) -> int:
        return len(self.dispatcher.hosts)

    def _address(self, x: Tensor, gates: Tensor, experts: Tensor) -> None:
        if not self.tokens:
            return
        super()._address(x, gates, experts)
        first, *others = self._letters.buffer.split(self.tokens)
        if others:
            self._letters.buffer[self.tokens :].view(len(others), *first.shape).copy_(first)

    def _out(self) -> OneWayExchange:
        d = self.dispatcher
        return OneWayExchange(d.group, self._letters.buffer, d.sources, d.hosts, self.live.rows)

    def _back(self, sums: Tensor) -> OneWayExchange:
        d = self.dispatcher
        return OneWayExchange(d.group, sums, d.hosts, d.sources, self.live.rows)

    def arrive(self, x: Tensor, gates: Tensor) -> Arrived:
        """As the base class has it; nothing comes to a rank without experts."""
        if self.dispatcher.local:
            return super().arrive(x, gates)
        self._letters = self._letters.of(self._landed())
        none = self._letters.behind[:, : self.choices]
        return Arrived((x[:0],), gates[:0], Fan(none, none.flatten()), none.flatten())

    def give_back(self, arrived: Arrived, results: Tensor) -> None:
        """As the base class has it."""
        if self.dispatcher.local:
            super().give_back(arrived, results)
        else:
            self._exchange = self._back(results)
