"""What the kernels that route have in common: scores of logits, and the best of them."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores_of(logits, real, SIGMOID: tl.constexpr):
    """Scores of logits ``[T, NP]``, 0 of experts that are not ``real``; and with softmax the log-sum-exp ``[T]``."""
    if SIGMOID:
        b_scores = tl.where(real, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
        b_lse = tl.sum(b_scores, 1)
    else:
        logits = tl.where(real, logits, float("-inf"))
        top = tl.max(logits, 1)
        shares = tl.exp(logits - top[:, None])
        total = tl.sum(shares, 1)
        b_scores = shares / total[:, None]
        b_lse = top + tl.log(total)
    return b_scores, b_lse


@triton.jit
def _of_best_groups(left, e, GROUP: tl.constexpr, MOST: tl.constexpr):
    """Experts of other groups than the MOST with the best experts fall below all others, but stay above those taken."""
    search = left
    allowed = left != left
    for _ in tl.static_range(MOST):
        best = tl.argmax(search, 1, tie_break_left=True)
        mine = (e // GROUP)[None, :] == (best // GROUP)[:, None]
        allowed = allowed | mine
        search = tl.where(mine, float("-inf"), search)
    return tl.where(allowed, left, tl.minimum(left, -2e38))


@triton.jit
def best_of(
    b_scores,
    bias,
    e,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    MOST: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The best K of scores ``[T, NP]``: gates and experts ``[T, KP]``, and what is left, -inf where one was taken."""
    left = b_scores
    if BIAS:
        left += tl.load(bias + e, mask=e < N, other=0.0)[None, :]
    # An expert that is not there or is taken must stand below every other one, whatever that one's score.
    left = tl.where(left > -1e38, left, -1e38)
    left = tl.where(e[None, :] < N, left, float("-inf"))
    if MOST:
        left = _of_best_groups(left, e, GROUP, MOST)
    b_gates = tl.zeros([b_scores.shape[0], k.shape[0]], tl.float32)
    b_experts = tl.zeros([b_scores.shape[0], k.shape[0]], tl.int32)
    for i in tl.static_range(K):
        best = tl.argmax(left, 1, tie_break_left=True)
        hit = e[None, :] == best[:, None]
        gate = tl.sum(tl.where(hit, b_scores, 0.0), 1)
        left = tl.where(hit, float("-inf"), left)
        b_gates = tl.where(k[None, :] == i, gate[:, None], b_gates)
        b_experts = tl.where(k[None, :] == i, best[:, None], b_experts)
    if NORMALIZE:
        b_gates = b_gates / tl.sum(b_gates, 1)[:, None]
    return b_gates, b_experts, left
