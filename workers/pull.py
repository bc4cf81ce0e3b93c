"""Keys and values that were chosen, page by page, where that moves less than all that might be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.nsa.rows import Rows
from shoal.workers.exchange import Plan


@dataclass(frozen=True)
class Pages:
    """Which tokens of a pack each rank owns and may read, in pages of ``size`` tokens, none of two owners."""

    plan: Plan
    owned: tuple[Rows, ...]
    far: tuple[Rows, ...]
    tokens: int
    size: int

    def wanted(self, read: Tensor) -> Tensor:
        """``[KV, pages]`` bool on the host: pages of other ranks in which this rank reads. read: ``[KV, far]`` bool."""
        me = self.plan.group.index
        tokens = self.far[me].indices()
        read = read.cpu() & ~self.owned[me].holds(tokens)
        pages = torch.zeros(read.shape[0], -(-self.tokens // self.size), dtype=torch.int32)
        return pages.index_add_(1, tokens // self.size, read.int()) > 0

    def coverage(self, read: Tensor) -> float:
        """The share of the pages at other ranks that this rank reads, of all that it might read; 0 of none."""
        might = self.wanted(torch.ones_like(read)).sum()
        return float(self.wanted(read).sum() / might.clamp(min=1))

    def ask(self, read: Tensor) -> Pull:
        """Tells all ranks what this one reads, and learns what they do. Waits for the choice, on the host."""
        wanted, group = self.wanted(read), self.plan.group
        everyone = group.all_gather(wanted.to(torch.uint8).to(read.device)).bool().cpu()
        self.plan.received["pages"] += (group.size - 1) * wanted.numel()
        me, others = group.index, [i for i in range(group.size) if i != group.index]
        return Pull(
            self.plan,
            [(i, self._rows(everyone[i], me, i, self.owned[me]).to(read.device)) for i in others],
            [(i, self._rows(everyone[me], i, me, self.far[me]).to(read.device)) for i in others],
            int((everyone * self._foreign[:, None]).sum()),
        )

    def fetched_rows(self, heads: int) -> int:
        """Rows of a head that all ranks fetch from one another when none asks."""
        return heads * int(self._foreign.sum())

    @cached_property
    def _foreign(self) -> Tensor:
        """``[ranks, pages]`` int64: of each rank how many of a page's tokens it may read and does not own."""
        counts = torch.zeros(len(self.far), -(-self.tokens // self.size), dtype=torch.int64)
        for count, far, owned in zip(counts, self.far, self.owned, strict=True):
            tokens = far.indices()
            count.index_add_(0, tokens // self.size, (~owned.holds(tokens)).long())
        return counts

    def _rows(self, pages: Tensor, owner: int, reader: int, among: Rows) -> Tensor:
        """Rows, ``place · KV + head``, among some tokens, of an owner's ``pages [KV, pages]`` that a reader may see."""
        tokens = self.owned[owner].indices()
        heads, chosen = (pages[:, tokens // self.size] & self.far[reader].holds(tokens)).nonzero(as_tuple=True)
        return among.places(tokens[chosen]) * pages.shape[0] + heads


@dataclass(frozen=True)
class Pull:
    """What was asked for. sends, receives: ``(rank, rows)`` of this rank's own tokens and of those it reads. moved:
    rows that go from any rank to any other."""

    plan: Plan
    sends: Sequence[tuple[int, Tensor]]
    receives: Sequence[tuple[int, Tensor]]
    moved: int

    def fetch(self, *xs: Tensor) -> PullFetch:
        """Starts to fetch them; see :class:`PullFetch`."""
        return PullFetch(self, xs)

    def give(self, *grads: Tensor) -> PullGive:
        """Starts to give gradients back; see :class:`PullGive`."""
        return PullGive(self, grads)


class PullFetch:
    """``buffers [needed, KV, D]``: this rank's own rows, those asked for, and zeros, once :meth:`wait` has returned."""

    def __init__(self, pull: Pull, xs: Sequence[Tensor]) -> None:
        self.pull, plan = pull, pull.plan
        self.buffers = tuple(x.new_zeros(plan.needed, *x.shape[1:]) for x in xs)
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
        for work in self.works:
            work.wait()
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
        for work in self.works:
            work.wait()
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
