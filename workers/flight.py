"""The rows of one layer on their way to experts and back, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.kernels.moe.fan import Fan, by_expert, by_rank, combine, expand
from shoal.workers.transfer import Exchange, Letters, Moment, Table, numbers_of, words_of

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


class Flight:
    """Of a rank alone, from which nothing travels. Of others, each pair of methods stands before and after a transfer.

    keep: whether there will be a backward pass. home: where what comes back for each token stands among all that does.
    """

    def __init__(self, dispatcher: Dispatcher, x: Tensor, gates: Tensor, experts: Tensor, keep: bool) -> None:
        self.dispatcher, self.keep = dispatcher, keep
        self.tokens, self.choices = experts.shape
        self.wide = gates.dtype
        self.slots = dispatcher.slots_of(experts)
        # bincount would wait for the GPU
        self.counts = (self.slots.reshape(-1, 1) == dispatcher.numbers).sum(0, dtype=torch.int32)
        self.home = self.slots.new_empty(self.tokens, 0)

    def expert_counts(self) -> Tensor:
        """``[experts]`` int64: tokens that chose each expert, over the whole dispatch group."""
        return self.dispatcher.by_expert(self._slot_counts())

    def _slot_counts(self) -> Tensor:
        return self.counts

    def send(self) -> None:
        """Sends the rows on their way, behind what was launched before this flight's start."""

    def arrive(self, x: Tensor, gates: Tensor) -> Arrived:
        """Waits for the rows that come; x, gates: this rank's own ones once more."""
        return self._sorted((x,), gates, self.slots, self.tokens * self.choices)

    def _sorted(self, parts: tuple[Tensor, ...], gates: Tensor, slots: Tensor, places: int) -> Arrived:
        """slots: ``[T + C, K]``, those of other ranks among them. places: not fewer than those of this rank."""
        local = len(self.dispatcher.local)
        mine = slots - self.dispatcher.first
        mine = torch.where((mine >= 0) & (mine < local), mine, -1)
        return Arrived(parts, gates, *by_expert(mine, local, places))

    def give_back(self, arrived: Arrived, results: Tensor) -> None:
        """Sends the results of others' tokens home, weighted and added up."""

    def returned(self, base: Tensor) -> Tensor:
        """``[T, H]``: base, and what came home, in the order of ranks. base may be overwritten."""
        return base

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

    def returned_grads(self, base: Tensor, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Gradients of the tokens ``[T, H]``: base, what came home, and a product if there is one.

        To be called after :meth:`returned_gates`; base may be overwritten.
        """
        return self._at_home(base[:0], base, product)

    def _at_home(self, rows: Tensor, base: Tensor, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return combine(rows, self.home, self.dispatcher.triton, base=base, product=product, out=base)

    def _gates_at_home(self, own: Tensor, theirs: Tensor) -> Tensor:
        """theirs: ``[R, K]``, what came home."""
        if not len(theirs):
            return own
        d = self.dispatcher
        hosts = d.hosts[self.slots.long()]
        place = self.home.gather(1, d.columns[hosts.long()])
        away = (hosts != d.group.index) & (place >= 0)
        flat = place.clamp(min=0).long() * self.choices + torch.arange(self.choices, device=place.device)
        return torch.where(away, theirs.flatten()[flat], own)


class PackedFlight(Flight):
    """Rows that are needed, packed by rank and exchanged by ``all_to_all``, whose sizes the host must read."""

    def __init__(self, dispatcher: Dispatcher, x: Tensor, gates: Tensor, experts: Tensor, keep: bool) -> None:
        super().__init__(dispatcher, x, gates, experts, keep)
        d = dispatcher
        fan, to_rank = by_rank(d.hosts[self.slots.long()], d.ranks)
        self.home, self._order = fan.rows, fan.order
        each = to_rank.new_zeros(d.group.size).index_copy_(0, d.ranks.long(), to_rank)
        self._table = Table(d.group, torch.cat([self.counts, each]), Moment(x.device))
        behind = torch.cat([words_of(gates), self.slots], 1)
        self._letters = Letters.empty(len(fan.order), x, behind.shape[1])
        expand([x], fan, d.triton, self._letters.rows)
        expand([behind], fan, d.triton, self._letters.behind)
        self._packed = Moment(x.device)

    def _slot_counts(self) -> Tensor:
        return self._table.here()[:, : len(self.dispatcher.hosts)].sum(0)

    def send(self) -> None:
        """Reads the sizes, and sends the rows on their way, behind what was launched before this flight's start."""
        d, slots = self.dispatcher, len(self.dispatcher.hosts)
        table = self._table.read(d.reads)
        self._places = sum(sum(row[d.first : d.first + len(d.local)]) for row in table)
        self.out, self.back = table[d.group.index][slots:], [row[slots + d.group.index] for row in table]
        self._exchange = Exchange(d.group, self._letters.buffer, self.out, self.back, self._packed)

    def arrive(self, x: Tensor, gates: Tensor) -> Arrived:
        """As the base class has it."""
        letters = self._letters.of(self._landed())
        del self._letters
        words = letters.behind.split([letters.words - self.choices, self.choices], 1)
        gates = torch.cat([gates, numbers_of(words[0], self.wide)])
        return self._sorted((x, letters.rows), gates, torch.cat([self.slots, words[1]]), self._places)

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

    def returned(self, base: Tensor) -> Tensor:
        """As the base class has it."""
        return self._at_home(self._landed(), base)

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
        return self._gates_at_home(own, numbers_of(self._letters.behind, self.wide))

    def returned_grads(self, base: Tensor, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As the base class has it."""
        rows = self._letters.rows
        del self._letters
        return self._at_home(rows, base, product)
