"""AdamW over float32 master weights, whatever the dtype the model computes in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from shoal.workers.config import TrainTable


class MasterAdamW:
    """PyTorch's fused AdamW on masters of at least float32; bfloat16 weights are rounded copies of them.

    Gradients of several micro-batches are added up in the masters' dtype. Matrices decay, norms do not.
    """

    def __init__(self, parameters: list[nn.Parameter], table: TrainTable) -> None:
        self.parameters = parameters
        self.masters = [_master(p) for p in parameters]
        matrices = [m for m in self.masters if m.ndim >= 2]
        vectors = [m for m in self.masters if m.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": table.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]],
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

    def collect(self) -> None:
        """Moves the gradients of a backward pass to the masters, adding to those already there."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is master:
                continue
            if parameter.grad is not None:
                grad = parameter.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """One gradient per parameter, in order; zeros for one that nothing reached."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [m.grad for m in self.masters if m.grad is not None]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update; gradients are dropped afterwards."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def set_steps(self, steps: int) -> None:
        """Tells Adam how many steps its moments have seen (its bias correction)."""
        for state in self.adam.state.values():
            state["step"].fill_(float(steps))

    def state_of(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """``(kind, tensor)`` of parameter ``index``: both moments, and the master where it is not the weight itself."""
        master = self.masters[index]
        for kind in ("exp_avg", "exp_avg_sq"):
            yield kind, self.adam.state[master][kind]
        if master is not self.parameters[index]:
            yield "master", master.data


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32))
