"""Keys and values that were chosen, page by page, where that moves less than all that might be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.host import sent_to
from shoal.kernels.nsa.rows import Rows
from shoal.workers.exchange import Plan, finish


@dataclass
class Fetching:
    """How a layer fetches the selected branch's keys from other ranks, alike on all of them.

    pull: only pages that were chosen, once they are; else all that may be, on their way meanwhile. count: whether it is
    kept what was chosen. Of the last forward pass for which it was, read: ``[heads, pages]`` bool for each turn of
    heads, of ``pages``.
    """

    pull: bool = False
    count: bool = False
    read: list[Tensor] = field(default_factory=list)
    pages: Pages | None = None

    def keep(self, pages: Pages, read: Tensor, first: bool) -> None:
        """Keeps what was chosen of a turn's heads, the first of a forward pass or one more."""
        self.pages, self.read = pages, [read] if first else [*self.read, read]


def counted(layers: Sequence[Fetching]) -> Tensor:
    """``[layers, 5]`` int64, :meth:`Pages.count` of each layer's last forward pass, of one packed batch: of all layers
    at once, since what is launched for a single one takes the host's time between its kernels."""
    pages = layers[0].pages
    assert pages is not None
    return pages.count(torch.cat([read for layer in layers for read in layer.read]).unflatten(0, (len(layers), -1)))


@dataclass(frozen=True)
class Pages:
    """Which tokens of a pack each rank owns and may read, in pages of ``size`` tokens, none of two owners."""

    plan: Plan
    owned: tuple[Rows, ...]
    far: tuple[Rows, ...]
    tokens: int
    size: int

    def wanted(self, read: Tensor) -> Tensor:
        """``[KV, pages]`` bool: pages of other ranks in which this rank reads. read: ``[KV, pages]`` bool, of all."""
        return read & self._others(read.device)[0].bool()

    def count(self, read: Tensor) -> Tensor:
        """``[…, 5]`` int64 on read's device, which nothing waits for, of read ``[…, KV, pages]`` bool, counted for each
        head of keys: pages of other ranks in which this rank reads, and their rows; the same of all that it might read;
        pages that ``ask`` tells of."""
        others, heads = self._others(read.device), read.shape[-2]
        found = (read.sum(-2)[..., None, :] * others[:2]).sum(-1)
        return torch.cat([found, heads * others.sum(-1).expand(*found.shape[:-1], -1)], -1)

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

    def _others(self, device: torch.device) -> Tensor:
        me = self.plan.group.index
        return _of_others(self.far[me], self.owned[me], self.tokens, self.size, device)

    def _rows(self, pages: Tensor, owner: int, reader: int, among: Rows) -> Tensor:
        """Rows, ``place · KV + head``, among some tokens, of an owner's ``pages [KV, pages]`` that a reader may see."""
        tokens = self.owned[owner].indices()
        heads, chosen = (pages[:, tokens // self.size] & self.far[reader].holds(tokens)).nonzero(as_tuple=True)
        return among.places(tokens[chosen]) * pages.shape[0] + heads


@lru_cache(maxsize=8)
def _of_others(far: Rows, owned: Rows, tokens: int, size: int, device: torch.device) -> Tensor:
    """``[3, pages]`` int64: of each page of some tokens whether a rank may read it, which reads ``far`` and has
    ``owned``, at another one; how many rows of it; and 1. The last few are remembered: all layers ask for them."""
    first = torch.arange(0, tokens, size)

    def inside(rows: Rows) -> Tensor:
        parts = [(first + size).clamp(max=stop) - first.clamp(min=start) for start, stop in rows.ranges]
        return torch.stack([part.clamp(min=0) for part in parts]).sum(0) if parts else torch.zeros_like(first)

    rows = torch.where(inside(owned) > 0, 0, inside(far))
    return sent_to(device, torch.stack([(rows > 0).long(), rows, torch.ones_like(rows)]))


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
