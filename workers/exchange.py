"""Rows that some ranks of a group own and others read: fetched, and their gradients given back to be summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.kernels.nsa.rows import Rows
from shoal.kernels.pieces import Pieces, columns, letters, put_together
from shoal.workers import volume
from shoal.workers.mesh import Group

if TYPE_CHECKING:
    from shoal.workers.clock import Clock

_clocks: list[Clock] = []  # of who watches; the backward pass has a thread of its own


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Adds up this process's waits for rows meanwhile, as the part ``exchange``."""
    _clocks.append(clock)
    try:
        yield
    finally:
        _clocks.remove(clock)


def finish(works: Sequence[Any]) -> None:
    """Waits for what was sent and received; on a GPU the stream does, not the host."""
    with _clocks[-1].part("exchange") if _clocks else nullcontext():
        for work in works:
            work.wait()


@dataclass(frozen=True)
class Plan:
    """Which rows one rank sends to which and receives from which; every rank of the group makes the same plan.

    owned, needed: how many rows this rank has, and reads. local: places among its own and where they are read. sends,
    receives: ``(rank of the group, places)``, ascending. received: bytes that arrived here, by name of the plan. large:
    whether nearly all rows travel. total: how many all ranks own. quiet: whether no rank sends any other anything.

    All that is for a rank is one message, packed before and unpacked after, which takes the host less than a message
    for each piece. Only of large plans, whose rows take more than ``volume.PACKED``, each piece goes straight from
    where it lies to where it is read, and memory holds nothing twice.
    """

    name: str
    group: Group
    owned: int
    needed: int
    local: tuple[tuple[slice, slice], ...]
    sends: tuple[tuple[int, slice], ...]
    receives: tuple[tuple[int, slice], ...]
    received: Counter[str] = field(default_factory=Counter, compare=False)
    large: bool = False
    total: int = 0
    quiet: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        group: Group,
        owned: Sequence[Rows],
        needed: Sequence[Rows],
        received: Counter[str] | None = None,
        large: bool = False,
    ) -> Plan:
        """Of the rows that each rank of the group owns, none twice, those that each needs."""
        me, others = group.index, [i for i in range(group.size) if i != group.index]
        everyone = range(group.size)
        return cls(
            name,
            group,
            owned[me].count,
            needed[me].count,
            tuple(owned[me].shared(needed[me])),
            tuple((i, mine) for i in others for mine, _ in owned[me].shared(needed[i])),
            tuple((i, here) for i in others for _, here in owned[i].shared(needed[me])),
            Counter() if received is None else received,
            large,
            sum(rows.count for rows in owned),
            not any(i != j and any(owned[i].shared(needed[j])) for i in everyone for j in everyone),
        )

    def fetch(self, *xs: Tensor) -> Fetch:
        """Starts to fetch what this rank needs of tensors ``[owned, …]``; see :class:`Fetch`."""
        return Fetch(self, xs)

    def give(self, *grads: Tensor) -> Give:
        """Starts to give gradients ``[needed, …]`` back to the rows' owners; see :class:`Give`."""
        return Give(self, grads)

    def packs(self, xs: Sequence[Tensor]) -> bool:
        """Whether rows of such tensors are packed: all ranks decide alike."""
        return not self.large or self.total * sum(prod(x.shape[1:]) * x.element_size() for x in xs) <= volume.PACKED

    @cached_property
    def leaving(self) -> Side:
        """Rows that are sent."""
        return Side.of(self.sends, self.group.size)

    @cached_property
    def arriving(self) -> Side:
        """Rows that are received."""
        return Side.of(self.receives, self.group.size)

    @cached_property
    def wanted(self) -> Pieces:
        """What is needed, of this rank's own rows and of those that came."""
        own = [(here, mine, False) for mine, here in self.local]
        return Pieces(self.needed, [*own, *((at, row, True) for at, row in self.arriving.rows)])

    @cached_property
    def summed(self) -> Pieces:
        """What is owned, of gradients of what is needed here, and of those that came, in the order of ranks."""
        own = [(mine, here, False) for mine, here in self.local]
        return Pieces(self.owned, [*own, *((at, row, True) for at, row in self.leaving.rows)])

    def launch(self, out: Sequence[tuple[int, Tensor]], into: Sequence[tuple[int, Tensor]]) -> list[Any]:
        """Sends and receives contiguous tensors; between two ranks they are matched by their order."""
        ops = [
            dist.P2POp(op, tensor, self.group.ranks[i], self.group.handle)
            for op, side in ((dist.isend, out), (dist.irecv, into))
            for i, tensor in side
        ]
        self.received[self.name] += sum(tensor.nbytes for _, tensor in into)
        return dist.batch_isend_irecv(ops) if ops else []

    def trade(self, out: Tensor, into: Tensor, leaving: Side, arriving: Side) -> list[Any]:
        """Sends and receives letters ``[rows, W]``, of all ranks at once."""
        self.received[self.name] += into.nbytes
        if self.quiet:
            return []
        sizes = list(arriving.counts), list(leaving.counts)
        return [dist.all_to_all_single(into, out, *sizes, group=self.group.handle, async_op=True)]


@dataclass(frozen=True)
class Side:
    """What travels one way between a rank and all others, one row behind another. rows: places in a buffer, and among
    what travels. counts: how many rows each rank has a part in. packed: what travels, of the buffer."""

    rows: tuple[tuple[slice, slice], ...]
    counts: tuple[int, ...]
    packed: Pieces

    @classmethod
    def of(cls, places: Sequence[tuple[int, slice]], ranks: int) -> Side:
        """places: ``(rank, places)`` of a buffer, ascending."""
        ends = list(accumulate((at.stop - at.start for _, at in places), initial=0))
        rows = tuple((at, slice(*ends)) for (_, at), ends in zip(places, pairwise(ends), strict=True))
        counts = tuple(sum(at.stop - at.start for i, at in places if i == rank) for rank in range(ranks))
        return cls(rows, counts, Pieces(ends[-1], [(row, at, False) for at, row in rows]))


class Fetch:
    """Rows on their way. ``buffers [needed, …]`` may be read once :meth:`wait` has returned."""

    def __init__(self, plan: Plan, xs: Sequence[Tensor]) -> None:
        self.plan = plan
        self.buffers = tuple(x.new_empty(plan.needed, *x.shape[1:]) for x in xs)
        self.letters: list[Tensor] = []
        if plan.packs(xs):
            self.sent = list(xs)
            out, came, self.works = _posted(plan, xs, plan.leaving, plan.arriving)
            self.letters = [out, came]
            return
        self.sent = [x.contiguous() for x in xs]  # kept alive until they have left
        self.works = plan.launch(
            [(i, x[at]) for x in self.sent for i, at in plan.sends],
            [(i, b[at]) for b in self.buffers for i, at in plan.receives],
        )
        for x, buffer in zip(self.sent, self.buffers, strict=True):
            for mine, here in plan.local:
                buffer[here] = x[mine]

    def wait(self) -> tuple[Tensor, ...]:
        """The buffers, complete."""
        finish(self.works)
        if self.letters:
            put_together(self.plan.wanted, self.sent, columns(self.letters[1], self.sent), self.buffers)
        self.works, self.sent, self.letters = [], [], []
        return self.buffers


class Give:
    """Gradients on their way to the owners of the rows."""

    def __init__(self, plan: Plan, grads: Sequence[Tensor]) -> None:
        self.plan = plan
        if plan.packs(grads):
            out, came, self.works = _posted(plan, grads, plan.arriving, plan.leaving)
            self.sent, self.came = [*grads, out], columns(came, grads)
            return
        self.sent = [g.contiguous() for g in grads]
        self.came = [letters([g], plan.leaving.packed.count) for g in grads]
        rows = [(i, row) for (i, _), (_, row) in zip(plan.sends, plan.leaving.rows, strict=True)]
        self.works = plan.launch(
            [(i, g[at]) for g in self.sent for i, at in plan.receives],
            [(i, came[row]) for came in self.came for i, row in rows],
        )

    def wait(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Sums ``[owned, …]`` in ``dtype``: this rank's part, then the others' in their order, added up in float32."""
        finish(self.works)
        grads = self.sent[: len(self.came)]
        sums = tuple(g.new_empty(self.plan.owned, *g.shape[1:], dtype=dtype) for g in grads)
        put_together(self.plan.summed, grads, self.came, sums)
        self.works, self.sent, self.came = [], [], []
        return sums


def _posted(plan: Plan, xs: Sequence[Tensor], leaving: Side, arriving: Side) -> tuple[Tensor, Tensor, list[Any]]:
    """Letters with rows of all tensors that leave, those that come, and the exchange that is under way."""
    out, came = (letters(xs, side.packed.count) for side in (leaving, arriving))
    put_together(leaving.packed, xs, xs, columns(out, xs))
    return out, came, plan.trade(out, came, leaving, arriving)


def fetch_rows(plan: Plan, *xs: Tensor) -> tuple[Tensor, ...]:
    """What this rank needs of tensors ``[owned, …]``, ``[needed, …]`` each; gradients go back to the rows' owners."""
    return _FetchRows.apply(plan, *xs)


class _FetchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.dtype = plan, xs[0].dtype
        return plan.fetch(*xs).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.plan.give(*grads).wait(ctx.dtype))
