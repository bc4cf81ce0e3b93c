"""The MoE layer written straight from DeepSeekMoE's equations: a loop over tokens and experts, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ffn(u: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One SwiGLU expert on one token ``[H]``."""
    hidden = u @ gate_up
    half = hidden.shape[-1] // 2
    return (F.silu(hidden[:half]) * hidden[half:]) @ down


def moe_layer(
    u_TH: Tensor,
    centroids_NH: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: list[tuple[Tensor, Tensor]],
    top_k: int,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[T, H]`` without the residual, scores ``[T, N']`` and counts ``[N']`` (eq. 9-11, token by token)."""
    out, all_scores = [], []
    counts = torch.zeros(len(centroids_NH), dtype=torch.int64)
    for u in u_TH:
        scores = torch.softmax(torch.stack([u @ e for e in centroids_NH]), dim=0)
        chosen = sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:top_k]
        total = sum(scores[i] for i in chosen) if normalize else 1.0
        h = torch.zeros_like(u)
        for i in chosen:
            h = h + scores[i] / total * ffn(u, gate_up[i], down[i])
            counts[i] += 1
        for g, d in shared:
            h = h + ffn(u, g, d)
        out.append(h)
        all_scores.append(scores)
    return torch.stack(out), torch.stack(all_scores), counts


def expert_balance(scores_TN: Tensor, counts_N: Tensor, top_k: int, alpha: float) -> Tensor:
    """Expert-level balance loss, eq. 12-14, term by term."""
    tokens, experts = scores_TN.shape
    total = scores_TN.new_zeros(())
    for i in range(experts):
        f = experts / (top_k * tokens) * float(counts_N[i])
        total = total + f * scores_TN[:, i].mean()
    return alpha * total


def device_balance(scores_TN: Tensor, counts_N: Tensor, top_k: int, alpha: float, groups: int) -> Tensor:
    """Device-level balance loss, eq. 15-17, group by group."""
    tokens, experts = scores_TN.shape
    size = experts // groups
    total = scores_TN.new_zeros(())
    for g in range(groups):
        members = range(g * size, (g + 1) * size)
        f = sum(experts / (top_k * tokens) * float(counts_N[j]) for j in members) / size
        p = sum(scores_TN[:, j].mean() for j in members)
        total = total + f * p
    return alpha * total
