"""Rows put straight into the memory of the other GPUs of a node, by copy engines, while all multiprocessors compute.

Sizes are fixed: a rank puts the rows of all its tokens into a slot of each other rank (``symmetric.py``), up to the
slots' capacity, and says behind each token what it chose. So nothing is packed, and no host reads a size. That pays
where nearly every token needs nearly every rank: of 64 experts, 6 of them chosen, 99 % of tokens need a given one of 2
ranks, 84 % one of 4.

A slot is written again only after its last content was used: a rank puts rows out when it has what came home from the
pass before, which the others sent after they had used all that came to them; and the other way round. So there is one
pass at a time, of all layers that share the slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.kernels.moe.fan import Fan, combine
from shoal.kernels.moe.plan import words_of
from shoal.workers.flight import Arrived, Flight, Own
from shoal.workers.slots import BACK, COUNTS, LETTER, OUT, WORDS_BACK, has_room, rows_at_most
from shoal.workers.transfer import Moment, beside, on_host, used_here

if TYPE_CHECKING:
    from shoal.workers.dispatch import Dispatcher


class SymmetricFlight(Flight):
    """Rows that are put where they are needed. Gates are float32."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        x: Tensor,
        gates: Tensor,
        experts: Tensor,
        keep: bool,
        counts: Tensor | None = None,
    ) -> None:
        assert dispatcher.inbox is not None
        assert x.shape[0] <= dispatcher.inbox.capacity, (
            f"{len(x)} rows, and slots have room for {dispatcher.inbox.capacity}"
        )
        self._inbox = box = dispatcher.inbox
        super().__init__(dispatcher, x, gates, experts, keep, box.capacity, counts)
        letter = self._plan.letter
        assert letter is not None
        del self._plan
        away = len(box.others) * box.capacity
        self._places = (self.tokens + away) * min(self.choices, len(dispatcher.local))
        # of any rank: all of them decide alike
        most = rows_at_most(box.capacity, dispatcher.group.size, self.choices, dispatcher.most_local)
        self._out: dict[int, Tensor] = {}
        self._counted: Moment | None = None
        self._copied: Moment | None = None
        self._reads = not has_room(most, x.shape[1] * x.element_size())
        if self._reads and box.tallies is not None:
            with beside(x.device, lane=1):
                box.tallies.tell(self.counts)
        elif self._reads:
            with beside(x.device, lane=1):  # the host reads counts while rows are on their way
                self._put({COUNTS: self.counts}, COUNTS)
                box.hear(COUNTS)
                self._total = self._counts_of_all()
                self._host = on_host(self._total[None])
                self._counted = Moment(x.device)
        with beside(x.device):
            self._put({LETTER: letter, OUT: x}, OUT)

    def _counts_of_all(self) -> Tensor:
        """``[slots]`` int64, the sum over all ranks."""
        return self._inbox.counts().sum(0).add_(self.counts)

    def _put(self, parts: dict[int, Tensor], told: int) -> None:
        """The same to all others, on the current stream; of what goes home ``[others · capacity, …]`` to each its part.

        What goes out is kept until others' results have come home, which they made of it; when they have what goes home
        this pass need not hear.
        """
        box = self._inbox
        if BACK in parts:
            used_here(*parts.values())
        else:
            self._out = self._out | parts
        each = {part: values.split(box.capacity) for part, values in parts.items() if part in (BACK, WORDS_BACK)}
        for rank in box.turns:
            for part, values in parts.items():
                box.put(part, rank, each[part][box.others.index(rank)] if part in each else values)
            box.say(told, rank)

    def _hear(self, part: int) -> None:
        with self.dispatcher.waiting():
            self._inbox.hear(part)

    def _hear_back(self) -> None:
        self._hear(BACK)
        self._out.clear()

    def _slot_counts(self) -> Tensor:
        """To be called once rows have arrived."""
        if self._counted is not None:
            self._counted.before_here()
            used_here(self._total)
        return self._total

    def arrive(self, x: Tensor, gates: Tensor) -> Arrived:
        """As the base class has it; what came is copied where a backward pass will ask for it.

        Reads how many rows this rank's experts get, if that may be many, once all is launched that needs not know it.
        """
        box, d = self._inbox, self.dispatcher
        if self._counted is not None:
            self._counted.before_here()  # and so before word goes home that slots may be written again
        self._hear(OUT)
        if self._counted is None:
            self._total = self._counts_of_all()
        rows = box.rows(OUT)
        if self.keep:
            self._copy(rows)
        arrived = self._sorted((x, rows), gates, box.words(LETTER), self._places)
        if not self._reads:
            return arrived
        table = d.reads.of(self._host, self._counted) if self._counted else box.read_tallies(d.reads)
        places = sum(sum(counts[d.first : d.first + len(d.local)]) for counts in table)
        return replace(arrived, fan=Fan(arrived.fan.rows, arrived.fan.order[:places]))

    def _copy(self, rows: Tensor) -> None:
        """Beside the experts' products, and on the stream that later says that the slots may be written again."""
        self._copies = torch.empty_like(rows)
        with beside(rows.device):
            self._copies.copy_(rows)
            self._copied = Moment(rows.device)

    def give_back(self, arrived: Arrived, results: Tensor) -> None:
        """As the base class has it."""
        rows, gates = arrived.fan.rows[self.tokens :], arrived.gates[self.tokens :]
        sums = combine(results, rows, self.dispatcher.triton, gates)
        with beside(sums.device):
            self._put({BACK: sums}, BACK)

    def returned(self, base: Tensor, own: Own | None = None) -> Tensor:
        """As the base class has it."""
        self._hear_back()
        del self.counts  # others have read them, and the letter that they are part of would stay for the backward pass
        return self._at_home(self._inbox.rows(BACK), base, own)

    def kept(self, arrived: Arrived) -> Arrived:
        """As the base class has it: copies of the rows, since slots are written again."""
        if self._copied is None:
            return arrived
        self._copied.before_here()
        return replace(arrived, parts=(arrived.parts[0], self._copies))

    def send_grads(self, grad: Tensor) -> None:
        """As the base class has it."""
        with beside(grad.device):
            self._put({OUT: grad}, OUT)

    def arrive_grads(self, grad: Tensor) -> tuple[Tensor, ...]:
        """As the base class has it."""
        self._hear(OUT)
        return grad, self._inbox.rows(OUT)

    def give_back_grads(self, fan: Fan, d_rows: Tensor, d_gates: Tensor) -> None:
        """As the base class has it."""
        sums = combine(d_rows, fan.rows[self.tokens :], self.dispatcher.triton)
        words = words_of(d_gates[self.tokens :])
        with beside(sums.device):
            self._put({WORDS_BACK: words, BACK: sums}, BACK)

    def returned_gates(self, own: Tensor) -> Tensor:
        """As the base class has it."""
        self._hear_back()
        return self._gates_at_home(own, self._inbox.words(WORDS_BACK))

    def returned_grads(self, base: Tensor | None, own: Own, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As the base class has it."""
        return self._at_home(self._inbox.rows(BACK), base, own, product)
