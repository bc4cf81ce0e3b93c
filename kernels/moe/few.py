"""A DeepSeekMoE layer of few tokens, as a decode step has them, in PyTorch and in Triton: nothing is sorted.

A token's choices stay where they are, its shared experts beside them: ``[T, K + S, …]``. What follows adds them up,
weighted (:func:`shoal.kernels.few.add_norm`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.few import add_norm
from shoal.kernels.moe.experts import swiglu_ffn
from shoal.kernels.moe.router import Router


class FewChoice(NamedTuple):
    """total, normed: ``[T, H]``, of ``add_norm``. gates: ``[T, K]``, at least float32, 0 of tokens that nobody needs;
    experts: ``[T, K]`` int32, -1 of those."""

    total: Tensor
    normed: Tensor
    gates: Tensor
    experts: Tensor


def few_choices(
    base: Tensor, parts: Tensor, weight: Tensor, eps: float, live: Tensor, router: Router, triton: bool
) -> FewChoice:
    """:func:`shoal.kernels.few.add_norm` of the first four, and the experts of the normed rows (DeepSeekMoE eq. 10-11).

    live: ``[T]`` int64, 0 for tokens that nobody needs, which choose no expert.
    """
    if triton:
        from shoal.kernels.moe.triton_few import triton_choices

        return triton_choices(base, parts, weight, eps, live, router)
    total, normed = add_norm(base, parts, weight, eps, triton)
    chosen = router.route(normed)
    idle = (live == 0)[:, None]
    wide = torch.promote_types(base.dtype, torch.float32)
    return FewChoice(
        total, normed, chosen.gates.to(wide).masked_fill(idle, 0), chosen.experts.int().masked_fill(idle, -1)
    )


def few_experts(
    x: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, shared: tuple[Tensor, Tensor] | None, triton: bool
) -> Tensor:
    """Results of each token's experts, not weighted: ``[T, H] -> [T, K + S, H]``, at least float32, those of the S
    shared experts last. T: up to ``MOST`` of :mod:`shoal.kernels.few`.

    experts: ``[T, K]`` int32, none twice for a token; -1 for no expert, whose result is undefined. gate_up: ``[N, H,
    2F]`` (gate first), down: ``[N, F, H]``; shared: the same of the shared experts, ``[S, H, 2F]`` and ``[S, F, H]``.
    """
    if triton:
        from shoal.kernels.moe.triton_few import triton_experts

        return triton_experts(x, experts, gate_up, down, shared)
    wide = torch.promote_types(x.dtype, torch.float32)
    shared_up, shared_down = shared or (gate_up[:0], down[:0])
    rows = []
    for row, own in zip(x, experts.tolist(), strict=True):
        results = [swiglu_ffn(row, gate_up[max(e, 0)], down[max(e, 0)]) for e in own]
        results += [swiglu_ffn(row, up, narrow) for up, narrow in zip(shared_up, shared_down, strict=True)]
        rows.append(torch.stack(results).to(wide))
    return torch.stack(rows) if rows else x.new_empty(0, experts.shape[1] + len(shared_up), x.shape[1], dtype=wide)
