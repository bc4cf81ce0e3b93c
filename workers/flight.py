"""The rows of one layer on their way to experts and back, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.kernels.moe.fan import Fan, combine, expand
from shoal.kernels.moe.plan import gates_at_home, pack, plan, sort, words_of
from shoal.workers.transfer import Exchange, Letters, Moment, Table

if TYPE_CHECKING:
    from shoal.workers.dispatch import Dispatcher


@dataclass(frozen=True)
class Arrived:
    """What a rank's experts work on: its own tokens, then those that came.

    parts: their rows, ``[T, H]`` and ``[C, H]``. gates: ``[T + C, K]``. fan: their places among rows sorted by expert;
    ends: ``[E]`` int32, where each expert's rows end.
    """

    parts: tuple[Tensor, ...]
    gates: Tensor
    fan: Fan
    ends: Tensor


@dataclass(frozen=True)
class Own:
    """What this rank's experts have for its own tokens: results ``[R, H]``, places of each token's ``[T, K]`` int32,
    and their gates ``[T, K]``, or None for plain sums."""

    results: Tensor
    rows: Tensor
    gates: Tensor | None = None


class Flight:
    """Of a rank alone, from which nothing travels. Of others, each pair of methods stands before and after a transfer.

    keep: whether there will be a backward pass. room: rows that each rank has room for, 0 where that does not matter.
    home: where what comes back for each token stands among all that does. triton: who plans and sorts. own: this rank's
    tokens among all that its experts work on. counts: as :meth:`Dispatcher.start` has them.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        x: Tensor,
        gates: Tensor,
        experts: Tensor,
        keep: bool,
        room: int = 0,
        counts: Tensor | None = None,
    ) -> None:
        self.dispatcher, self.keep = dispatcher, keep
        self.tokens, self.choices = experts.shape
        self.own = slice(0, self.tokens)
        self.triton = self._by_triton(gates)
        self._plan = plan(experts, gates, dispatcher.ways, self.triton, room, counts)
        self.slots = self._plan.slots
        self.counts = self._plan.counts if room else self._plan.counts[: len(dispatcher.ways.hosts)]
        self.home = self.slots.new_empty(self.tokens, 0) if self._plan.home is None else self._plan.home

    def _by_triton(self, gates: Tensor) -> bool:
        return self.dispatcher.triton and gates.dtype == torch.float32

    def expert_counts(self) -> Tensor:
        """``[experts]`` int64: tokens that chose each expert, over the whole dispatch group."""
        return self.dispatcher.by_expert(self._slot_counts())

    def _slot_counts(self) -> Tensor:
        return self.counts

    def send(self) -> None:
        """Sends the rows on their way, behind what was launched before this flight's start."""

    def arrive(self, x: Tensor, gates: Tensor) -> Arrived:
        """Waits for the rows that come; x, gates: this rank's own ones once more."""
        return self._sorted((x,), gates, None, self.tokens * self.choices)

    def _sorted(self, parts: tuple[Tensor, ...], gates: Tensor, words: Tensor | None, places: int) -> Arrived:
        """words: gates and slots that came from other ranks. places: not fewer than copies for this rank's experts."""
        d = self.dispatcher
        return Arrived(parts, *sort(self.slots, gates, words, d.first, len(d.local), places, self.triton))

    def give_back(self, arrived: Arrived, results: Tensor) -> None:
        """Sends the results of others' tokens home, weighted and added up."""

    def returned(self, base: Tensor, own: Own | None = None) -> Tensor:
        """``[T, H]``: base, what this rank has itself, and what came home, in the order of ranks. base may be
        overwritten."""
        return self._at_home(None, base, own)

    def kept(self, arrived: Arrived) -> Arrived:
        """What of it the backward pass will ask for, once all has returned."""
        return arrived

    def send_grads(self, grad: Tensor) -> None:
        """Sends gradients of the output ``[T, H]`` the way that the tokens went."""

    def arrive_grads(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Waits for gradients that come; with this rank's own ones, as parts of :class:`Arrived`."""
        return (grad,)

    def give_back_grads(self, fan: Fan, d_rows: Tensor, d_gates: Tensor) -> None:
        """Sends home the gradients of others' tokens, and of their gates ``[T + C, K]``."""

    def returned_gates(self, own: Tensor) -> Tensor:
        """Waits for gradients that come home; those of the gates ``[T, K]``. own: of choices that this rank hosts."""
        return own

    def returned_grads(self, base: Tensor | None, own: Own, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Gradients of the tokens ``[T, H]``: base, what this rank has itself, what came home, and a product if there
        is one.

        To be called after :meth:`returned_gates`; base may be overwritten.
        """
        return self._at_home(None, base, own, product)

    def _at_home(
        self,
        came: Tensor | None,
        base: Tensor | None,
        own: Own | None,
        product: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """All in one sum: what is written once is read by nobody in between."""
        triton, more = self.dispatcher.triton, None if came is None else (came, self.home)
        if own is not None:
            return combine(own.results, own.rows, triton, own.gates, base, product, base, more)
        assert base is not None
        return base if more is None else combine(*more, triton, base=base, product=product, out=base)

    def _gates_at_home(self, own: Tensor, words: Tensor) -> Tensor:
        """words: gradients that came home."""
        return gates_at_home(own, words, self.home, self.slots, self.dispatcher.ways, self.triton)


class PackedFlight(Flight):
    """Rows that are needed, packed by rank and exchanged by ``all_to_all``, whose sizes the host must read."""

    def __init__(self, dispatcher: Dispatcher, x: Tensor, gates: Tensor, experts: Tensor, keep: bool) -> None:
        super().__init__(dispatcher, x, gates, experts, keep)
        d = dispatcher
        self._table = Table(d.group, self._plan.counts, Moment(x.device))
        most = self.tokens * min(self.choices, len(d.others))
        self._letters = Letters.empty(most, x, self.choices * (1 + gates.element_size() // 4))
        fan = pack(self._plan, x, gates, d.ways, self.triton, self._letters.rows, self._letters.behind)
        self.home, self._order = fan.rows, fan.order
        self._packed = Moment(x.device)
        del self._plan

    def _slot_counts(self) -> Tensor:
        return self._table.here()[:, : len(self.dispatcher.ways.hosts)].sum(0)

    def send(self) -> None:
        """Reads the sizes, and sends the rows on their way, behind what was launched before this flight's start."""
        d, slots = self.dispatcher, len(self.dispatcher.ways.hosts)
        table = self._table.read(d.reads)
        self._places = sum(sum(row[d.first : d.first + len(d.local)]) for row in table)
        self.out, self.back = table[d.group.index][slots:], [row[slots + d.group.index] for row in table]
        self._exchange = Exchange(d.group, self._letters.buffer, self.out, self.back, self._packed)

    def arrive(self, x: Tensor, gates: Tensor) -> Arrived:
        """As the base class has it."""
        letters = self._letters.of(self._landed())
        del self._letters
        return self._sorted((x, letters.rows), gates, letters.behind, self._places)

    def _landed(self) -> Tensor:
        with self.dispatcher.waiting():
            rows = self._exchange.wait()
        del self._exchange
        return rows

    def give_back(self, arrived: Arrived, results: Tensor) -> None:
        """As the base class has it."""
        rows, gates = arrived.fan.rows[self.tokens :], arrived.gates[self.tokens :]
        sums = combine(results, rows, self.dispatcher.triton, gates)
        self._exchange = Exchange(self.dispatcher.group, sums, self.back, self.out, Moment(sums.device))

    def returned(self, base: Tensor, own: Own | None = None) -> Tensor:
        """As the base class has it."""
        return self._at_home(self._landed(), base, own)

    def send_grads(self, grad: Tensor) -> None:
        """As the base class has it."""
        d = self.dispatcher
        rows = expand([grad], Fan(self.home, self._order[: sum(self.out)]), d.triton)
        self._exchange = Exchange(d.group, rows, self.out, self.back, Moment(grad.device))

    def arrive_grads(self, grad: Tensor) -> tuple[Tensor, ...]:
        """As the base class has it."""
        return grad, self._landed()

    def give_back_grads(self, fan: Fan, d_rows: Tensor, d_gates: Tensor) -> None:
        """As the base class has it; gradients of gates stand behind those of the tokens."""
        d, rows, words = self.dispatcher, fan.rows[self.tokens :], words_of(d_gates[self.tokens :])
        self._letters = Letters.empty(len(rows), d_rows, words.shape[1])
        combine(d_rows, rows, d.triton, out=self._letters.rows)
        self._letters.behind.copy_(words)
        self._exchange = Exchange(d.group, self._letters.buffer, self.back, self.out, Moment(d_rows.device))

    def returned_gates(self, own: Tensor) -> Tensor:
        """As the base class has it."""
        self._letters = self._letters.of(self._landed())
        return self._gates_at_home(own, self._letters.behind)

    def returned_grads(self, base: Tensor | None, own: Own, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As the base class has it."""
        rows = self._letters.rows
        del self._letters
        return self._at_home(rows, base, own, product)
