"""Which experts a token goes to, and the losses that keep their load even (DeepSeekMoE eq. 9-17)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Routing:
    """scores: ``[T, N']`` of the routed experts (None for the hash router). gates, experts: ``[T, K']``; experts int64.

    squares: a scalar, the squares of the logits' log-sum-exp added up over the tokens, where it was asked for.
    """

    scores: Tensor | None
    gates: Tensor
    experts: Tensor
    squares: Tensor | None = None


def route(
    x_TH: Tensor,
    centroids_NH: Tensor,
    top_k: int,
    normalize: bool = False,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    most: int = 0,
    squares: bool = False,
) -> Routing:
    """Affinity to every expert's centroid, and the ``top_k`` best of them (DeepSeekMoE eq. 10-11).

    x: ``[T, H]``, centroids: ``[N', H]``. score: softmax, or sigmoid of each logit alone (DeepSeek-V3 eq. 15). Logits
    and scores are float32 (float64 for float64 inputs). Gates are the scores themselves; ``normalize`` divides them by
    their sum, as GShard does. bias: ``[N']`` float32, added to the scores for the choice only. groups, most: experts
    lie in so many equal runs, and a token's experts in the ``most`` of them with the best scores (0: in any). squares:
    compute what the router's z-loss is made of. Raises ValueError for another score.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r}: one of {SCORES}")
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    logits = x_TH.to(wide) @ centroids_NH.to(wide).T
    scores = torch.softmax(logits, dim=-1) if score == "softmax" else torch.sigmoid(logits)
    if bias is None and not most:
        gates, experts = scores.topk(top_k, dim=-1)
    else:
        experts = _wanted(scores.detach(), bias, groups, most).topk(top_k, dim=-1).indices
        gates = scores.gather(1, experts)
    if normalize:
        gates = gates / gates.sum(-1, keepdim=True)
    return Routing(scores, gates, experts, logits.logsumexp(-1).square().sum() if squares else None)


class Router(NamedTuple):
    """Who chooses. centroids: ``[N, H]``; the others as :func:`route` has them. scores: whether those of each token are
    asked for, not their sums alone."""

    centroids: Tensor
    top_k: int
    normalize: bool = False
    bias: Tensor | None = None
    groups: int = 1
    most: int = 0
    squares: bool = False
    scores: bool = False
    score: str = "softmax"

    def route(self, x: Tensor) -> Routing:
        """Of ``[T, H]``, in PyTorch's operations."""
        return route(
            x,
            self.centroids,
            self.top_k,
            self.normalize,
            score=self.score,
            bias=self.bias,
            groups=self.groups,
            most=self.most,
            squares=self.squares,
        )


def _wanted(scores: Tensor, bias: Tensor | None, groups: int, most: int) -> Tensor:
    """What experts are chosen by, ``[T, N']``: minus infinity in groups that are not a token's best ones."""
    wanted = scores if bias is None else scores + bias
    if not most:
        return wanted
    by_group = wanted.unflatten(1, (groups, -1))
    best = by_group.amax(-1).topk(most, dim=-1).indices
    out = torch.ones(by_group.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
    return by_group.masked_fill(out[..., None], -torch.inf).flatten(1)


def hash_route(tokens_T: Tensor, count: int, dtype: torch.dtype) -> Routing:
    """The Hash layer: a token's expert is a fixed hash of its id, its gate is 1. Experts are int64 ``[T, 1]``.

    The hash is Fibonacci's multiplicative one on 32 bits, so that neighbouring ids spread over the experts.
    """
    mixed = (tokens_T * 2654435769) & 0xFFFFFFFF
    experts = (mixed * count) >> 32
    return Routing(None, torch.ones(len(tokens_T), 1, dtype=dtype, device=tokens_T.device), experts[:, None])


def load_fractions(counts_N: Tensor) -> Tensor:
    """f of DeepSeekMoE eq. 13, float64 ``[…, N']``: each expert's share of the chosen slots over the even share."""
    counts = counts_N.to(torch.float64)
    return counts * (counts.shape[-1] / counts.sum(-1, keepdim=True).clamp(min=1.0))


def shares_of(scores_TN: Tensor) -> Tensor:
    """Scores ``[T, N']`` that do not add up to 1, as parts of their sum: what balance losses are made of (DeepSeek-V3
    eq. 19)."""
    # all of them may be too small for their dtype
    return scores_TN / scores_TN.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TN.dtype).tiny)


def balance_loss(sums_N: Tensor, fractions_N: Tensor, tokens: int, expert: float, device: float, groups: int) -> Tensor:
    """Expert- and device-level balance losses (eq. 12-17): this rank's part of them, a scalar, or ``[…]`` of layers.

    sums: ``[…, N']`` float32, of the scores over this rank's tokens. fractions: ``[…, N']``, f over everything the
    losses are taken over (:func:`load_fractions`); tokens: its number of tokens T. expert, device: factors of the two.
    P is linear in the scores, so the parts of all ranks and micro-batches add up to the loss. Device groups are equal
    runs of experts.
    """
    weight = expert * fractions_N
    if device:
        by_group = fractions_N.unflatten(-1, (groups, -1))
        weight = weight + device * by_group.mean(-1, keepdim=True).expand_as(by_group).flatten(-2)
    return (sums_N * weight.to(sums_N.dtype)).sum(-1) / tokens


def sequence_counts(experts_TK: Tensor, sequence_T: Tensor, sequences: int, count: int) -> Tensor:
    """``[sequences, N']`` int64: tokens of each sequence that chose each expert. sequence: ``[T]`` int, a token's."""
    keys = sequence_T.long()[:, None] * count + experts_TK.long()
    empty = torch.zeros(sequences * count, dtype=torch.int64, device=keys.device)
    return empty.index_add_(0, keys.flatten(), torch.ones_like(keys.flatten())).view(sequences, count)


def sequence_loss(scores_TN: Tensor, fractions_SN: Tensor, sequence_T: Tensor, tokens: int, alpha: float) -> Tensor:
    """The expert-level loss of each sequence alone, their mean (DeepSeek-V3 eq. 17-20): this rank's part, a scalar.

    scores: ``[T, N']``. fractions: ``[sequences, N']``, f of each. sequence: ``[T]`` int64, a token's. tokens: of the
    global batch, whose sequences are equally long. alpha: the loss's factor.
    """
    return (scores_TN * fractions_SN.to(scores_TN.dtype)[sequence_T]).sum() * (alpha / tokens)
