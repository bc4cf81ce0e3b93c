"""Cross entropy over a vocabulary, whose gradient is computed with the loss: logits exist for some tokens at a time,
and once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.workers.data.batch import IGNORE


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """``-Σ log softmax(hidden weightᵀ)[target]``, nats, at least float32.

    hidden: ``[T, H]``, weight: ``[V, H]``, targets: ``[T]`` int64, ``IGNORE`` for none. chunk: tokens whose logits
    exist at a time. Where gradients are wanted they are computed along with the loss, and kept in place of logits.
    """
    total = _CrossEntropy.apply(hidden, weight, targets, chunk)
    assert isinstance(total, Tensor)
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        wanted = any(ctx.needs_input_grad[:2])
        d_hidden, d_weight = (torch.zeros_like(x) if wanted else None for x in (hidden, weight))
        for start in range(0, len(hidden), chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk]
            log_p = torch.log_softmax(F.linear(part, weight), -1, dtype=wide)
            total += F.nll_loss(log_p, target, ignore_index=IGNORE, reduction="sum")
            if d_hidden is None or d_weight is None:
                continue
            grad = log_p.exp_()
            grad[torch.arange(len(part), device=grad.device), target.clamp(min=0)] -= 1
            grad = torch.mul(grad, (target != IGNORE)[:, None], out=torch.empty_like(grad, dtype=hidden.dtype))
            torch.mm(grad, weight, out=d_hidden[start : start + chunk])
            d_weight.addmm_(grad.T, part)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        d_hidden, d_weight = (torch.mul(x, upstream[None], out=torch.empty_like(x)) for x in ctx.saved_tensors)
        return d_hidden, d_weight, None, None
