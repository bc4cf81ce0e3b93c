"""The all-to-all that takes token rows to their experts and brings results back, the same for every placement.

A rank without tokens and a rank without experts run the same code with zero rows. The exchange is started, local work
is done meanwhile, and it is waited for at its first use; the backward pass overlaps in the same way, because autograd
runs the later-made local work between the two halves of the reverse exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.workers.mesh import Group


class Dispatcher:
    """Routes rows between the ranks of ``group``; ``owners[e]`` is the place in it of the rank that hosts expert e."""

    def __init__(self, group: Group, owners: tuple[int, ...], device: torch.device) -> None:
        self.group = group
        by_owner = sorted(range(len(owners)), key=lambda e: owners[e])  # stable: keeps the experts of an owner in order
        self.local = tuple(e for e in by_owner if owners[e] == group.index)
        self.per_owner = [owners.count(i) for i in range(group.size)]
        self.slots = torch.tensor([by_owner.index(e) for e in range(len(owners))], device=device)
        self.edges = torch.arange(len(owners) + 1, device=device)

    def start(self, x_TH: Tensor, experts_TK: Tensor) -> Flight:
        """Sorts rows by expert and sends them on their way; ``experts_TK`` int64. Every rank of the group calls it."""
        slots = self.slots[experts_TK].flatten()
        ranked, order = torch.sort(slots, stable=True)
        counts = torch.searchsorted(ranked, self.edges).diff()  # bincount would wait for the GPU, twice
        matrix = self.group.all_gather(counts)
        inverse = _inverse(order)
        rows = _Expand.apply(x_TH, order, inverse, experts_TK.shape[1])
        if self.group.size == 1:
            return Flight(self, order, inverse, matrix, None, rows)
        exchange = _Exchange(self.group, self._splits(matrix))
        regroup = self._regroup(matrix, sum(exchange.splits[1]))
        return Flight(self, order, inverse, matrix, exchange, _Start.apply(rows, exchange), regroup, _inverse(regroup))

    def _splits(self, matrix: Tensor) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank; the sizes must be known on the host."""
        to_rank = [part.sum(1) for part in matrix.split(self.per_owner, dim=1)]
        table = torch.stack(to_rank, dim=1).tolist()
        return table[self.group.index], [row[self.group.index] for row in table]

    def _regroup(self, matrix: Tensor, count: int) -> Tensor:
        """Index that turns ``count`` rows by (source rank, expert) into rows by (expert, source rank)."""
        lengths = matrix.split(self.per_owner, dim=1)[self.group.index]
        starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
        lengths, starts = lengths.T.flatten(), starts.T.flatten()
        shift = starts - (lengths.cumsum(0) - lengths)
        index = torch.repeat_interleave(shift, lengths, output_size=count)
        return index + torch.arange(len(index), device=index.device)

    def local_counts(self, matrix: Tensor) -> Tensor:
        """``[local experts]``: rows that each expert of this rank gets, from all sources."""
        return matrix.split(self.per_owner, dim=1)[self.group.index].sum(0)


@dataclass
class Flight:
    """Rows on their way to their experts and back."""

    dispatcher: Dispatcher
    order: Tensor
    inverse: Tensor
    matrix: Tensor
    exchange: _Exchange | None
    sent: Tensor
    regroup: Tensor | None = None
    ungroup: Tensor | None = None
    back: _Exchange | None = None

    def expert_counts(self) -> Tensor:
        """``[experts]`` int64: tokens that chose each expert, over the whole dispatch group."""
        return self.matrix.sum(0)[self.dispatcher.slots]

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Rows for this rank's experts, sorted by expert, and how many each gets."""
        rows = self.sent
        if self.exchange is not None:
            rows = _Permute.apply(_Wait.apply(rows, self.exchange), self.regroup, self.ungroup)
        return rows, self.dispatcher.local_counts(self.matrix)

    def give_back(self, results: Tensor) -> Tensor:
        """Sends results home; what it returns may be read by :meth:`combine` only."""
        if self.exchange is None:
            return results
        results = _Permute.apply(results, self.ungroup, self.regroup)
        self.back = self.exchange.reverse()
        return _Start.apply(results, self.back)

    def combine(self, returned: Tensor, gates_TK: Tensor) -> Tensor:
        """Waits for the results and adds them up, weighted: ``[T, H]``. The order of the sum is that of the choices."""
        if self.back is not None:
            returned = _Wait.apply(returned, self.back)
        rows = _Permute.apply(returned, self.inverse, self.order)
        tokens, k = gates_TK.shape
        return torch.bmm(gates_TK.to(rows.dtype)[:, None], rows.view(tokens, k, rows.shape[1]))[:, 0]


class _Exchange:
    """One all-to-all in flight, forward or backward. It keeps the sent buffer alive until the transfer is over."""

    def __init__(self, group: Group, splits: tuple[list[int], list[int]]) -> None:
        self.group, self.splits = group, splits
        self.work: dist.Work | None = None
        self.sending: Tensor | None = None
        self.receiving: Tensor | None = None

    def reverse(self) -> _Exchange:
        return _Exchange(self.group, (self.splits[1], self.splits[0]))

    def launch(self, rows: Tensor, splits: tuple[list[int], list[int]]) -> Tensor:
        send, receive = splits
        out = rows.new_empty(sum(receive), rows.shape[1])
        self.sending, self.receiving = rows.contiguous(), out
        self.work = dist.all_to_all_single(out, self.sending, receive, send, group=self.group.handle, async_op=True)
        return out

    def wait(self) -> Tensor:
        assert self.work is not None and self.receiving is not None
        self.work.wait()
        out = self.receiving
        self.work = self.sending = self.receiving = None
        return out


class _Start(torch.autograd.Function):
    """Launches the exchange; its output may be read only after ``_Wait``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(rows, exchange.splits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # grad is only _Wait's word that the reverse exchange is under way; what it brings has this input's shape
        return ctx.exchange.wait(), None


class _Wait(torch.autograd.Function):
    """Waits for the exchange; backwards it launches the reverse one, which ``_Start`` waits for."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        exchange: _Exchange = ctx.exchange
        exchange.launch(grad, (exchange.splits[1], exchange.splits[0]))
        return grad, None


class _Expand(torch.autograd.Function):
    """``[T, H] -> [T·K, H]``, a row for each choice in sorted order; backward is a gather and a sum, no scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape = (x.shape[0], k, x.shape[1])
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(ctx.shape).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """``x[index]`` for a permutation, whose backward is ``grad[inverse]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def _inverse(index: Tensor) -> Tensor:
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(len(index), device=index.device)
    return inverse
