"""Rows that some ranks of a group own and others read: fetched, and their gradients given back to be summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.kernels.nsa.rows import Rows
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
    receives: ``(rank of the group, places)``, ascending. received: bytes that arrived here, by name of the plan.
    """

    name: str
    group: Group
    owned: int
    needed: int
    local: tuple[tuple[slice, slice], ...]
    sends: tuple[tuple[int, slice], ...]
    receives: tuple[tuple[int, slice], ...]
    received: Counter[str] = field(default_factory=Counter, compare=False)

    @classmethod
    def of(
        cls,
        name: str,
        group: Group,
        owned: Sequence[Rows],
        needed: Sequence[Rows],
        received: Counter[str] | None = None,
    ) -> Plan:
        """Of the rows that each rank of the group owns, none twice, those that each needs."""
        me, others = group.index, [i for i in range(group.size) if i != group.index]
        return cls(
            name,
            group,
            owned[me].count,
            needed[me].count,
            tuple(owned[me].shared(needed[me])),
            tuple((i, mine) for i in others for mine, _ in owned[me].shared(needed[i])),
            tuple((i, here) for i in others for _, here in owned[i].shared(needed[me])),
            Counter() if received is None else received,
        )

    def fetch(self, *xs: Tensor) -> Fetch:
        """Starts to fetch what this rank needs of tensors ``[owned, …]``; see :class:`Fetch`."""
        return Fetch(self, xs)

    def give(self, *grads: Tensor) -> Give:
        """Starts to give gradients ``[needed, …]`` back to the rows' owners; see :class:`Give`."""
        return Give(self, grads)

    def launch(self, out: Sequence[tuple[int, Tensor]], into: Sequence[tuple[int, Tensor]]) -> list[Any]:
        """Sends and receives contiguous tensors; between two ranks they are matched by their order."""
        ops = [
            dist.P2POp(op, tensor, self.group.ranks[i], self.group.handle)
            for op, side in ((dist.isend, out), (dist.irecv, into))
            for i, tensor in side
        ]
        self.received[self.name] += sum(tensor.nbytes for _, tensor in into)
        return dist.batch_isend_irecv(ops) if ops else []


class Fetch:
    """Rows on their way. ``buffers [needed, …]`` may be read once :meth:`wait` has returned."""

    def __init__(self, plan: Plan, xs: Sequence[Tensor]) -> None:
        self.sent = [x.contiguous() for x in xs]  # kept alive until they have left
        self.buffers = tuple(x.new_empty(plan.needed, *x.shape[1:]) for x in xs)
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
        self.works, self.sent = [], []
        return self.buffers


class Give:
    """Gradients on their way to the owners of the rows."""

    def __init__(self, plan: Plan, grads: Sequence[Tensor]) -> None:
        self.plan, self.sent = plan, [g.contiguous() for g in grads]
        self.parts = [[(at, g.new_empty(at.stop - at.start, *g.shape[1:])) for _, at in plan.sends] for g in self.sent]
        self.works = plan.launch(
            [(i, g[at]) for g in self.sent for i, at in plan.receives],
            [(i, part) for parts in self.parts for (i, _), (_, part) in zip(plan.sends, parts, strict=True)],
        )

    def wait(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Sums ``[owned, …]`` in ``dtype``: this rank's part, then the others' in their order, added up in float32."""
        sums = []
        finish(self.works)
        for g, parts in zip(self.sent, self.parts, strict=True):
            wide = torch.promote_types(g.dtype, torch.float32)
            total = torch.zeros(self.plan.owned, *g.shape[1:], dtype=wide, device=g.device)
            for mine, here in self.plan.local:
                total[mine] = g[here].to(wide)
            for at, part in parts:
                total[at] += part
            sums.append(total.to(dtype))
        self.works, self.sent, self.parts = [], [], []
        return tuple(sums)


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
