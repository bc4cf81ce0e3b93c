"""Cross entropy over a vocabulary, whose gradient is computed with the loss: logits exist for some tokens at a time,
and once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.workers.data.batch import IGNORE


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """``-Σ log softmax(hidden weightᵀ)[target]``, nats, at least float32.

    hidden: ``[T, H]``, weight: ``[V, H]``, targets: ``[T]`` int64, ``IGNORE`` for none. chunk: tokens whose logits
    exist at a time. Where gradients are wanted they are computed along with the loss, and kept in place of logits.
    """
    # Asked here: within a function of autograd gradients are off, and inputs' needs say nothing of no_grad around it.
    wanted = torch.is_grad_enabled()
    d_hidden, d_weight = (torch.zeros_like(x) if wanted and x.requires_grad else None for x in (hidden, weight))
    total = _CrossEntropy.apply(hidden, weight, targets, chunk, d_hidden, d_weight)
    assert isinstance(total, Tensor)
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            total += _add_part(
                hidden[part], weight, targets[part], None if d_hidden is None else d_hidden[part], d_weight
            )
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = (
            None if x is None else torch.mul(x, upstream[None], out=torch.empty_like(x)) for x in ctx.saved_tensors
        )
        return d_hidden, d_weight, None, None, None, None


def _add_part(
    hidden: Tensor, weight: Tensor, targets: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None
) -> Tensor:
    """The loss of some tokens; writes their gradient, and adds that of the weight. What is as wide as the vocabulary is
    gone afterwards."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # Not log_softmax(…, dtype=wide): that makes the same copy of bfloat16 logits, and keeps those meanwhile.
    log_p = torch.log_softmax(F.linear(hidden, weight).to(wide), -1)
    loss = F.nll_loss(log_p, targets, ignore_index=IGNORE, reduction="sum")
    if d_hidden is None and d_weight is None:
        return loss
    grad = log_p.exp_()
    grad[torch.arange(len(grad), device=grad.device), targets.clamp(min=0)] -= 1
    grad = torch.mul(grad, (targets != IGNORE)[:, None], out=torch.empty_like(grad, dtype=hidden.dtype))
    if d_hidden is not None:
        torch.mm(grad, weight, out=d_hidden)
    if d_weight is not None:
        d_weight.addmm_(grad.T, hidden)
    return loss
