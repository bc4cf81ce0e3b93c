"""Keys and values that were chosen, page by page, where that moves less than all that might be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.host import sent_to
from shoal.kernels.nsa.rows import Rows
from shoal.workers.exchange import Plan, finish


@dataclass
class Fetching:
    """How a layer fetches the selected branch's keys from other ranks, alike on all of them.

    pull: only pages that were chosen, once they are; else all that may be, on their way meanwhile. count: whether what
    is chosen is counted; counts: :meth:`Pages.count` of the last forward pass.
    """

    pull: bool = False
    count: bool = False
    counts: Tensor | None = None


@dataclass(frozen=True)
class Pages:
    """Which tokens of a pack each rank owns and may read, in pages of ``size`` tokens, none of two owners."""

    plan: Plan
    owned: tuple[Rows, ...]
    far: tuple[Rows, ...]
    tokens: int
    size: int

    def wanted(self, read: Tensor) -> Tensor:
        """``[KV, pages]`` bool: pages of other ranks in which this rank reads. read: ``[KV, far]`` bool."""
        none = self._count
        pages = torch.zeros(read.shape[0], none + 1, dtype=torch.bool, device=read.device)
        return pages.scatter_(1, torch.where(read, self._foreign(read.device), none), True)[:, :none]

    def count(self, read: Tensor) -> Tensor:
        """``[5]`` int64 on read's device, which nothing waits for, counted for each head of keys: pages of other ranks
        in which this rank reads, and their rows; the same of all that it might read; pages that ``ask`` tells of."""
        wanted, foreign = self.wanted(read), self._foreign(read.device)
        rows = foreign.new_zeros(self._count + 1).index_add_(0, foreign, torch.ones_like(foreign))[:-1]
        heads, told = len(read), foreign.new_full((), wanted.numel())
        return torch.stack([wanted.sum(), (wanted * rows).sum(), heads * (rows > 0).sum(), heads * rows.sum(), told])

    def ask(self, read: Tensor) -> Pull:
        """Tells all ranks what this one reads, and learns what they do. Waits for the choice, on the host."""
        wanted, group = self.wanted(read), self.plan.group
        everyone = group.all_gather(wanted.to(torch.uint8)).bool().cpu()
        self.plan.received["pages"] += (group.size - 1) * wanted.numel()
        me, others = group.index, [i for i in range(group.size) if i != group.index]
        return Pull(
            self.plan,
            [(i, sent_to(read.device, self._rows(everyone[i], me, i, self.owned[me]))) for i in others],
            [(i, sent_to(read.device, self._rows(everyone[me], i, me, self.far[me]))) for i in others],
        )

    @property
    def _count(self) -> int:
        return -(-self.tokens // self.size)

    def _foreign(self, device: torch.device) -> Tensor:
        """``[far]`` int64: the page of each row that this rank may read; of its own ones one beyond the last."""
        pages = self.far[self.plan.group.index].indices(device) // self.size
        for _, here in self.plan.local:
            pages[here] = self._count
        return pages

    def _rows(self, pages: Tensor, owner: int, reader: int, among: Rows) -> Tensor:
        """Rows, ``place · KV + head``, among some tokens, of an owner's ``pages [KV, pages]`` that a reader may see."""
        tokens = self.owned[owner].indices()
        heads, chosen = (pages[:, tokens // self.size] & self.far[reader].holds(tokens)).nonzero(as_tuple=True)
        return among.places(tokens[chosen]) * pages.shape[0] + heads


@dataclass(frozen=True)
class Pull:
    """What was asked for. sends, receives: ``(rank, rows)`` of this rank's own tokens and of those it reads."""

    plan: Plan
    sends: Sequence[tuple[int, Tensor]]
    receives: Sequence[tuple[int, Tensor]]

    def fetch(self, *xs: Tensor, into: tuple[Tensor, ...] | None = None) -> PullFetch:
        """Starts to fetch them; see :class:`PullFetch`. into: its buffers, zeros; None: new ones."""
        return PullFetch(self, xs, into)

    def give(self, *grads: Tensor) -> PullGive:
        """Starts to give gradients back; see :class:`PullGive`."""
        return PullGive(self, grads)


class PullFetch:
    """``buffers [needed, KV, D]``: this rank's own rows, those asked for, and zeros, once :meth:`wait` has returned."""

    def __init__(self, pull: Pull, xs: Sequence[Tensor], into: tuple[Tensor, ...] | None) -> None:
        self.pull, plan = pull, pull.plan
        self.buffers = into or tuple(x.new_zeros(plan.needed, *x.shape[1:]) for x in xs)
        flat = [x.flatten(0, 1) for x in xs]
        self.sent = [(i, x[rows]) for x in flat for i, rows in pull.sends if len(rows)]
        self.parts = [
            [(i, rows, x.new_empty(len(rows), x.shape[-1])) for i, rows in pull.receives if len(rows)] for x in flat
        ]
        self.works = plan.launch(self.sent, [(i, part) for parts in self.parts for i, _, part in parts])
        for x, buffer in zip(xs, self.buffers, strict=True):
            for mine, here in plan.local:
                buffer[here] = x[mine]

    def wait(self) -> tuple[Tensor, ...]:
        """The buffers, complete."""
        finish(self.works)
        for buffer, parts in zip(self.buffers, self.parts, strict=True):
            for _, rows, part in parts:
                buffer.flatten(0, 1)[rows] = part
        self.works, self.sent, self.parts = [], [], [[] for _ in self.buffers]
        return self.buffers


class PullGive:
    """Gradients of the rows that were asked for, on their way to the owners."""

    def __init__(self, pull: Pull, grads: Sequence[Tensor]) -> None:
        self.pull, self.grads = pull, grads
        flat = [g.flatten(0, 1) for g in grads]
        self.sent = [(i, g[rows]) for g in flat for i, rows in pull.receives if len(rows)]
        self.parts = [
            [(i, rows, g.new_empty(len(rows), g.shape[-1])) for i, rows in pull.sends if len(rows)] for g in flat
        ]
        self.works: list[Any] = pull.plan.launch(self.sent, [(i, part) for parts in self.parts for i, _, part in parts])

    def wait(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Sums ``[owned, KV, D]`` in ``dtype``, as :meth:`shoal.workers.exchange.Give.wait`."""
        finish(self.works)
        sums = []
        for g, parts in zip(self.grads, self.parts, strict=True):
            wide = torch.promote_types(g.dtype, torch.float32)
            total = torch.zeros(self.pull.plan.owned, *g.shape[1:], dtype=wide, device=g.device)
            for mine, here in self.pull.plan.local:
                total[mine] = g[here].to(wide)
            for _, rows, part in parts:  # no row twice in one rank's part
                total.flatten(0, 1)[rows] += part.to(wide)
            sums.append(total.to(dtype))
        self.works, self.sent, self.parts = [], [], []
        return tuple(sums)
