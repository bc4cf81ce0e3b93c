"""AdamW over float32 master weights, whatever the dtype the model computes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from shoal.workers.config import TrainTable
from shoal.workers.replicas import Piece
from shoal.workers.shards import local


class Moments(NamedTuple):
    """What Adam keeps of a master: running means of its gradient and of the gradient's square, as the master is, and
    how many steps these have seen ([], float32, on the master's device)."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor

    @classmethod
    def of(cls, master: Tensor) -> Moments:
        steps = torch.zeros((), dtype=torch.float32, device=master.device)
        return cls(torch.zeros_like(master), torch.zeros_like(master), steps)


class MasterAdamW:
    """PyTorch's fused AdamW on masters of at least float32; bfloat16 weights are rounded copies of them.

    Gradients of several micro-batches are added up in the masters' dtype. Matrices decay, norms do not. PyTorch's
    function is called, not its class, which would import the compiler: 0.6 s of each rank's start.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        table: TrainTable,
        pieces: Sequence[Piece] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """pieces: what has its masters and moments here, and is updated here; None: all of the parameters. dtype: what
        the model computes in, where some parameters (shards) are longer; None: that of each."""
        self.parameters = parameters
        self.rounded = [not _is_wide(dtype or p.dtype) for p in parameters]
        self.pieces = [Piece(i, 0, len(p)) for i, p in enumerate(parameters)] if pieces is None else list(pieces)
        here = [local(p) for p in parameters]
        self.masters = [_master(piece.of(here)) for piece in self.pieces]
        self._sums: list[Tensor | None] = [None] * len(parameters)
        self._of: dict[int, list[int]] = {}
        for i, piece in enumerate(self.pieces):
            self._of.setdefault(piece.index, []).append(i)
        self.table = table
        # made here, not at the first step: a checkpoint is loaded into them
        self.moments = [Moments.of(master) for master in self.masters]

    def take(self, index: int) -> Tensor:
        """Takes the gradient that a backward pass has just made of a parameter, and adds it up with those before, in
        the masters' dtype; the sum."""
        parameter = self.parameters[index]
        grad = parameter.grad
        assert grad is not None
        if _is_wide(parameter.dtype):
            return local(grad)
        before = self._sums[index]
        total = self._sums[index] = grad.to(torch.float32) if before is None else before.add_(grad)
        parameter.grad = None
        return total

    def gradients(self) -> list[Tensor]:
        """One gradient per parameter, in order, of what of it is here; zeros for one that nothing reached."""
        out = []
        for i, parameter in enumerate(self.parameters):
            if _is_wide(parameter.dtype):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                out.append(local(parameter.grad))
                continue
            found = self._sums[i]
            if found is None:
                found = self._sums[i] = torch.zeros_like(parameter, dtype=torch.float32)
            out.append(found)
        return out

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update of what is updated here; gradients are dropped afterwards."""
        gradients = self.gradients()
        own = list(zip([piece.of(gradients) for piece in self.pieces], self.masters, self.moments, strict=True))
        self._update([each for each in own if each[1].ndim >= 2], rate, self.table.weight_decay)
        self._update([each for each in own if each[1].ndim < 2], rate, 0.0)
        for i, parameter in enumerate(self.parameters):
            parameter.grad = self._sums[i] = None
        held = zip(self.pieces, self.masters, strict=True)
        short = [(piece, master) for piece, master in held if not _is_wide(self.parameters[piece.index].dtype)]
        if short:
            weights = [piece.of(self.parameters) for piece, _ in short]
            torch._foreach_copy_(weights, [master for _, master in short])

    def _update(self, own: list[tuple[Tensor, Tensor, Moments]], rate: float, decay: float) -> None:
        """Updates masters in place. own: gradient, master and moments of each."""
        adamw(
            [master for _, master, _ in own],
            [gradient for gradient, _, _ in own],
            [moments.exp_avg for *_, moments in own],
            [moments.exp_avg_sq for *_, moments in own],
            [],
            [moments.steps for *_, moments in own],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.table.beta1,
            beta2=self.table.beta2,
            lr=rate,
            weight_decay=decay,
            eps=self.table.adam_eps,
        )

    def set_steps(self, steps: int) -> None:
        """Tells Adam how many steps its moments have seen (its bias correction)."""
        for moments in self.moments:
            moments.steps.fill_(float(steps))

    def state_of(self, index: int, member: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """``(kind, tensor)`` of parameter ``index``, or of one of the experts stacked in it: both moments, and the
        master where the model computes with a rounded copy of it. Nothing of what is not updated here."""
        for i in self._of.get(index, ()):
            piece, moments = self.pieces[i], self.moments[i]
            if member is not None and not piece.start <= member < piece.stop:
                continue
            at = slice(None) if member is None else member - piece.start
            yield "exp_avg", moments.exp_avg[at]
            yield "exp_avg_sq", moments.exp_avg_sq[at]
            if self.rounded[index]:
                yield "master", self.masters[i][at]


def _is_wide(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype are their own masters."""
    return dtype in (torch.float32, torch.float64)


def _master(weights: Tensor) -> Tensor:
    weights = weights.detach()
    return weights if _is_wide(weights.dtype) else weights.to(torch.float32)
