"""Which experts a token goes to, and the losses that keep their load even (DeepSeekMoE eq. 9-17)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """scores: ``[T, N']`` softmax over the routed experts (None for the hash router). gates, experts: ``[T, K']``."""

    scores: Tensor | None
    gates: Tensor
    experts: Tensor


def route(x_TH: Tensor, centroids_NH: Tensor, top_k: int, normalize: bool = False) -> Routing:
    """Softmax affinity to every expert's centroid, and the ``top_k`` best of them (DeepSeekMoE eq. 10-11).

    Logits and scores are float32 (float64 for float64 inputs). Gates are the scores themselves; ``normalize`` divides
    them by their sum, as GShard does.
    """
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    scores = torch.softmax(x_TH.to(wide) @ centroids_NH.to(wide).T, dim=-1)
    gates, experts = scores.topk(top_k, dim=-1)
    if normalize:
        gates = gates / gates.sum(-1, keepdim=True)
    return Routing(scores, gates, experts)


def hash_route(tokens_T: Tensor, count: int, dtype: torch.dtype) -> Routing:
    """The Hash layer: a token's expert is a fixed hash of its id, its gate is 1. Experts are int64 ``[T, 1]``.

    The hash is Fibonacci's multiplicative one on 32 bits, so that neighbouring ids spread over the experts.
    """
    mixed = (tokens_T * 2654435769) & 0xFFFFFFFF
    experts = (mixed * count) >> 32
    return Routing(None, torch.ones(len(tokens_T), 1, dtype=dtype, device=tokens_T.device), experts[:, None])


def load_fractions(counts_N: Tensor) -> Tensor:
    """f of DeepSeekMoE eq. 13, float64 ``[N']``: each expert's share of the chosen slots over the even share."""
    counts = counts_N.to(torch.float64)
    return counts * (len(counts) / counts.sum().clamp(min=1.0))


def balance_loss(sums_N: Tensor, fractions_N: Tensor, tokens: int, expert: float, device: float, groups: int) -> Tensor:
    """Expert- and device-level balance losses (eq. 12-17): this rank's part of them, a scalar.

    sums: of the scores over this rank's tokens. fractions: f over everything the losses are taken over; tokens: its
    number of tokens T. P is linear in the scores, so the parts of all ranks and micro-batches add up to the loss.
    Device groups are equal runs of experts.
    """
    mean_of_group = fractions_N.view(groups, -1).mean(-1, keepdim=True).expand(groups, len(fractions_N) // groups)
    weight = expert * fractions_N + device * mean_of_group.reshape(-1)
    return (sums_N * weight.to(sums_N.dtype)).sum() / tokens
