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


def choose(wanted: list[float], top_k: int, groups: int = 1, most: int = 0) -> list[int]:
    """The best ``top_k`` experts of one token, the best first; of equals the lower one.

    groups, most: only experts of the ``most`` groups, equal runs of experts, whose best expert is best; 0: of all.
    """
    best = lambda numbers, key, count: sorted(numbers, key=lambda i: (-key(i), i))[:count]  # noqa: E731
    size = len(wanted) // groups
    kept = best(range(groups), lambda g: max(wanted[g * size : (g + 1) * size]), most or groups)
    return best([i for i in range(len(wanted)) if i // size in kept], lambda i: wanted[i], top_k)


def moe_layer(
    u_TH: Tensor,
    centroids_NH: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: list[tuple[Tensor, Tensor]],
    top_k: int,
    normalize: bool = False,
    score: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[T, H]`` without the residual, scores ``[T, N']`` and counts ``[N']`` (eq. 9-11, token by token)."""
    out, all_scores = [], []
    counts = torch.zeros(len(centroids_NH), dtype=torch.int64)
    for u in u_TH:
        logits = torch.stack([u @ e for e in centroids_NH])
        scores = torch.softmax(logits, dim=0) if score == "softmax" else 1 / (1 + torch.exp(-logits))
        chosen = choose(scores.tolist(), top_k)
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


def sequence_balance(scores_TN: Tensor, experts_TK: Tensor, sequences: list[range], alpha: float) -> Tensor:
    """Expert-level balance loss within each sequence (a range of tokens), their mean: DeepSeek-V3 eq. 17-20."""
    total = scores_TN.new_zeros(())
    for tokens in sequences:
        rows = list(tokens)
        counts = torch.bincount(experts_TK[rows].flatten(), minlength=scores_TN.shape[1])
        total = total + expert_balance(scores_TN[rows], counts, experts_TK.shape[1], alpha)
    return total / len(sequences)


def router_z(u_TH: Tensor, centroids_NH: Tensor, coefficient: float) -> Tensor:
    """The router's z-loss (ST-MoE eq. 5): the mean over tokens of log²(Σ exp(logit))."""
    total = u_TH.new_zeros(())
    for u in u_TH:
        total = total + torch.log(torch.stack([torch.exp(u @ e) for e in centroids_NH]).sum()) ** 2
    return coefficient * total / len(u_TH)
