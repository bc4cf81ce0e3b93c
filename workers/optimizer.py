"""AdamW over float32 master weights, whatever the dtype the model computes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from shoal.workers.config import TrainTable
from shoal.workers.replicas import Piece
from shoal.workers.shards import local


class MasterAdamW:
    """PyTorch's fused AdamW on masters of at least float32; bfloat16 weights are rounded copies of them.

    Gradients of several micro-batches are added up in the masters' dtype. Matrices decay, norms do not.
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
        self.adam = torch.optim.AdamW(
            [
                {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": table.weight_decay},
                {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
            ],
            lr=table.learning_rate,
            betas=(table.beta1, table.beta2),
            eps=table.adam_eps,
            fused=True,
        )
        for master in self.masters:  # made here, not at the first step: a checkpoint is loaded into them
            self.adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

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
        for piece, master in zip(self.pieces, self.masters, strict=True):
            master.grad = piece.of(gradients)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for i, parameter in enumerate(self.parameters):
            parameter.grad = self._sums[i] = None
        held = zip(self.pieces, self.masters, strict=True)
        short = [(piece, master) for piece, master in held if not _is_wide(self.parameters[piece.index].dtype)]
        if short:
            weights = [piece.of(self.parameters) for piece, _ in short]
            torch._foreach_copy_(weights, [master for _, master in short])

    def set_steps(self, steps: int) -> None:
        """Tells Adam how many steps its moments have seen (its bias correction)."""
        for state in self.adam.state.values():
            state["step"].fill_(float(steps))

    def state_of(self, index: int, member: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """``(kind, tensor)`` of parameter ``index``, or of one of the experts stacked in it: both moments, and the
        master where the model computes with a rounded copy of it. Nothing of what is not updated here."""
        for i in self._of.get(index, ()):
            piece, master = self.pieces[i], self.masters[i]
            if member is not None and not piece.start <= member < piece.stop:
                continue
            at = slice(None) if member is None else member - piece.start
            for kind in ("exp_avg", "exp_avg_sq"):
                yield kind, self.adam.state[master][kind][at]
            if self.rounded[index]:
                yield "master", master.data[at]


def _is_wide(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype are their own masters."""
    return dtype in (torch.float32, torch.float64)


def _master(weights: Tensor) -> nn.Parameter:
    weights = weights.detach()
    return nn.Parameter(weights if _is_wide(weights.dtype) else weights.to(torch.float32))
