"""The router in Triton: logits, scores, choice, counts and sums in one pass, and a counting sort of the choices.

Nothing is read by the host, and nothing depends on the order in which programs run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2, tiles
from shoal.kernels.moe.router import SCORES
from shoal.kernels.moe.triton_best import best_of, scores_of

MOST = 128
"""Experts whose logits fit into the kernel that chooses; of more, they are computed before it."""


@dataclass(frozen=True)
class Choice:
    """Where tokens go. scores: ``[T, N]`` float32. gates: ``[T, K]`` float32, experts: ``[T, K]`` int32.

    counts: ``[N]`` int32, tokens of each expert; ends: ``[N]`` int32, where its rows end once sorted. sums: ``[N]``
    float32, of the scores over tokens. rows: ``[T, K]`` int32, the place of each choice among rows sorted by expert
    and then by token. order: ``[T·K]`` int32, the inverse: the choice (token times K plus k) that each row belongs to.
    lse: ``[T]`` float32, log-sum-exp of the logits, where it was asked for.
    """

    scores: Tensor
    gates: Tensor
    experts: Tensor
    counts: Tensor
    ends: Tensor
    sums: Tensor
    rows: Tensor
    order: Tensor
    lse: Tensor | None = None

    @property
    def squares(self) -> Tensor | None:
        """A scalar: the squares of ``lse`` added up, what the router's z-loss is made of."""
        return None if self.lse is None else self.lse.square().sum()


def choose(
    x: Tensor,
    centroids: Tensor | None,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool = False,
    bias: Tensor | None = None,
    groups: int = 1,
    most: int = 0,
    lse: bool = False,
    sort: bool = True,
) -> Choice:
    """Scores of all experts for every token, the best ``top_k`` of them, and those sorted (DeepSeekMoE eq. 10-11).

    x: ``[T, H]``, centroids: ``[N, H]`` of the same dtype, contiguous; or x: the logits themselves, ``[T, N]``, and no
    centroids. Logits and scores are float32. score: softmax, or sigmoid of each logit alone. Gates are scores;
    normalize: divided by their sum. bias: ``[N]`` float32, added to the scores for the choice only. Of equals the lower
    expert is chosen; a score that is not a number counts as the least. groups, most: experts lie in so many equal runs,
    and a token's experts in the ``most`` of them that hold the best ones (0: in any). lse: compute it, for softmax.
    sort: whether choices are to be sorted; otherwise ends, rows and order have no elements.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r}: one of {SCORES}")
    if lse and score != "softmax":
        raise ValueError(f"score={score!r} with lse, whose gradient is that of softmax")
    if centroids is not None and len(centroids) > MOST:
        x, centroids = x.float() @ centroids.float().T, None
    tokens, width = x.shape
    experts = width if centroids is None else len(centroids)
    tile = 64 if tokens >= 16384 else 16
    blocks = tiles(tokens, tile)
    choice = _unwritten(x, tokens, experts, top_k, lse, sort)
    scores, counts, places = choice.scores, choice.counts, (choice.ends, choice.rows, choice.order)
    alone = blocks == 1  # as in steps of a few tokens, which are short of time for launches: one does it all
    block_counts = counts if alone else _ints(x, blocks, experts)
    block_sums = choice.sums if alone else _floats(x, blocks, experts)
    shape = {"N": experts, "NP": max(16, power_of_2(experts)), "K": top_k, "TILE": tile}
    if tokens:
        launch(
            _choose_kernel,
            (blocks,),
            *(x, x if centroids is None else centroids, scores if bias is None else bias),
            *(scores, choice.gates, choice.experts, block_counts, block_sums),
            *(scores if choice.lse is None else choice.lse, *places, tokens),
            H=width,
            KP=power_of_2(top_k),
            BH=128,
            GIVEN=centroids is None,
            SIGMOID=score == "sigmoid",
            NORMALIZE=normalize,
            BIAS=bias is not None,
            GROUP=experts // groups,
            MOST=most if most < groups else 0,
            LSE=lse,
            ALONE=alone and sort,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=3,
            **shape,
        )
    if not alone:
        launch(_scan_kernel, (experts,), block_counts, block_sums, counts, choice.sums, blocks, N=experts, TILE=1024)
    if sort and not alone:
        launch(_place_kernel, (max(blocks, 1),), choice.experts, block_counts, counts, *places, tokens, **shape)
    return choice


def _unwritten(x: Tensor, tokens: int, experts: int, top_k: int, lse: bool, sort: bool) -> Choice:
    """Memory for a choice, on the device of x."""
    if sort:
        ends, rows, order = _ints(x, experts), _ints(x, tokens, top_k), _ints(x, tokens * top_k)
    else:
        ends = rows = order = _ints(x, 0)
    scores, gates, chosen = _floats(x, tokens, experts), _floats(x, tokens, top_k), _ints(x, tokens, top_k)
    counts, sums, lses = _ints(x, experts), _floats(x, experts), _floats(x, tokens) if lse else None
    return Choice(scores, gates, chosen, counts, ends, sums, rows, order, lses)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _ints(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=like.device)


def choose_backward(
    choice: Choice,
    row_grads: Tensor,
    sum_grads: Tensor | None,
    dtype: torch.dtype,
    *,
    score: str,
    normalize: bool,
    score_grads: Tensor | None = None,
    square_grad: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits, ``[T, N]`` in ``dtype``.

    row_grads: ``[T·K]`` float32, gradients of the gates in the order of the sorted rows, or of the choices where these
    were not sorted. sum_grads: ``[N]`` float32, of the sums; None: zeros. score_grads: ``[T, N]`` float32, contiguous,
    of the scores themselves. square_grad: float32, one number, of ``choice.squares``.
    """
    tokens, experts = choice.scores.shape
    top_k = choice.gates.shape[1]
    out = torch.empty(tokens, experts, dtype=dtype, device=row_grads.device)
    if tokens:
        tile = 16
        launch(
            _choose_backward_kernel,
            (tiles(tokens, tile),),
            choice.scores,
            choice.gates,
            choice.experts,
            choice.rows,
            row_grads,
            row_grads if sum_grads is None else sum_grads,
            row_grads if score_grads is None else score_grads,
            row_grads if choice.lse is None else choice.lse,
            row_grads if square_grad is None else square_grad,
            out,
            tokens,
            N=experts,
            NP=max(16, power_of_2(experts)),
            K=top_k,
            TILE=tile,
            SIGMOID=score == "sigmoid",
            NORMALIZE=normalize,
            SORTED=choice.rows.numel() > 0,
            SUMS=sum_grads is not None,
            SCORES=score_grads is not None,
            SQUARES=square_grad is not None and choice.lse is not None,
            num_warps=2,
        )
    return out


@triton.jit
def _logits(x, centroids, t, e, there, H: tl.constexpr, N: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr):
    acc = tl.zeros([t.shape[0], e.shape[0]], tl.float32)
    for start in range(0, H, BH):
        o = start + tl.arange(0, BH)
        b_x = tl.load(x + t[:, None] * H + o[None, :], mask=there[:, None] & (o[None, :] < H), other=0.0)
        b_c = tl.load(centroids + e[None, :] * H + o[:, None], mask=(e[None, :] < N) & (o[:, None] < H), other=0.0)
        acc = tl.dot(b_x, b_c, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _sort(taken, b_experts, t, e, k, there, ends, rows, order, N: tl.constexpr, K: tl.constexpr):
    """Of a tile that holds all tokens what ``_scan_kernel`` and ``_place_kernel`` make of many."""
    b_counts = tl.sum(taken, 0)
    b_ends = tl.cumsum(b_counts, 0)
    tl.store(ends + e, b_ends, mask=e < N)
    place = (b_ends - b_counts)[None, :] + tl.cumsum(taken, 0) - taken
    for i in tl.static_range(K):
        b_e = tl.sum(tl.where(k[None, :] == i, b_experts, 0), 1)
        row = tl.sum(tl.where(e[None, :] == b_e[:, None], place, 0), 1)
        tl.store(rows + t * K + i, row, mask=there)
        tl.store(order + row, t * K + i, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _choose_kernel(
    x,
    centroids,
    bias,
    scores,
    gates,
    experts,
    block_counts,
    block_sums,
    lse,
    ends,
    rows,
    order,
    tokens,
    H: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    TILE: tl.constexpr,
    BH: tl.constexpr,
    GIVEN: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    MOST: tl.constexpr,
    LSE: tl.constexpr,
    ALONE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of tokens: its scores, its choices, how many chose each expert and the sums of the scores. ALONE: there is
    no other tile, and its choices are to be sorted too."""
    block = tl.program_id(0).to(tl.int64)
    t = block * TILE + tl.arange(0, TILE)
    e = tl.arange(0, NP)
    k = tl.arange(0, KP)
    there = t < tokens
    real = e[None, :] < N
    if GIVEN:
        logits = tl.load(x + t[:, None] * N + e[None, :], mask=there[:, None] & real, other=0.0).to(tl.float32)
    else:
        logits = _logits(x, centroids, t, e, there, H, N, BH, PRECISION)
    b_scores, b_lse = scores_of(logits, real, SIGMOID)
    if LSE:
        tl.store(lse + t, b_lse, mask=there)
    tl.store(scores + t[:, None] * N + e[None, :], b_scores, mask=there[:, None] & real)
    tl.store(block_sums + block * N + e, tl.sum(tl.where(there[:, None], b_scores, 0.0), 0), mask=e < N)
    b_gates, b_experts, left = best_of(b_scores, bias, e, k, N, K, BIAS, GROUP, MOST, NORMALIZE)
    at = t[:, None] * K + k[None, :]
    inside = there[:, None] & (k[None, :] < K)
    tl.store(gates + at, b_gates, mask=inside)
    tl.store(experts + at, b_experts, mask=inside)
    taken = (real & (left == float("-inf")) & there[:, None]).to(tl.int32)
    tl.store(block_counts + block * N + e, tl.sum(taken, 0), mask=e < N)
    if ALONE:
        _sort(taken, b_experts, t, e, k, there, ends, rows, order, N, K)


@triton.jit(do_not_specialize=["blocks"])
def _scan_kernel(block_counts, block_sums, counts, sums, blocks, N: tl.constexpr, TILE: tl.constexpr):
    """Of one expert: the number of tokens before each block, in place of the block's own; and both totals."""
    e = tl.program_id(0)
    count = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.float32)
    for start in range(0, blocks, TILE):
        b = start + tl.arange(0, TILE)
        own = tl.load(block_counts + b * N + e, mask=b < blocks, other=0)
        total += tl.sum(tl.load(block_sums + b * N + e, mask=b < blocks, other=0.0), 0)
        tl.store(block_counts + b * N + e, count + tl.cumsum(own, 0) - own, mask=b < blocks)
        count += tl.sum(own, 0)
    tl.store(counts + e, count)
    tl.store(sums + e, total)


@triton.jit(do_not_specialize=["tokens"])
def _place_kernel(
    experts,
    before,
    counts,
    ends,
    rows,
    order,
    tokens,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """The place of each choice: behind all lower experts, and behind earlier tokens with the same one."""
    block = tl.program_id(0)
    t = block * TILE + tl.arange(0, TILE)
    e = tl.arange(0, NP)
    there = t < tokens
    b_counts = tl.load(counts + e, mask=e < N, other=0)
    b_ends = tl.cumsum(b_counts, 0)
    tl.store(ends + e, b_ends, mask=(e < N) & (block == 0))
    chose = tl.zeros([TILE, NP], tl.int32)
    for i in tl.static_range(K):
        b_e = tl.load(experts + t * K + i, mask=there, other=-1)
        chose += (e[None, :] == b_e[:, None]).to(tl.int32)
    first = b_ends - b_counts + tl.load(before + block * N + e, mask=(e < N) & (block * TILE < tokens), other=0)
    place = first[None, :] + tl.cumsum(chose, 0) - chose
    for i in tl.static_range(K):
        b_e = tl.load(experts + t * K + i, mask=there, other=-1)
        row = tl.sum(tl.where(e[None, :] == b_e[:, None], place, 0), 1)
        tl.store(rows + t * K + i, row, mask=there)
        tl.store(order + row, t * K + i, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _choose_backward_kernel(
    scores,
    gates,
    experts,
    rows,
    row_grads,
    sum_grads,
    score_grads,
    lse,
    square_grad,
    out,
    tokens,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SORTED: tl.constexpr,
    SUMS: tl.constexpr,
    SCORES: tl.constexpr,
    SQUARES: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    e = tl.arange(0, NP)
    there = t < tokens
    inside = there[:, None] & (e[None, :] < N)
    s = tl.load(scores + t[:, None] * N + e[None, :], mask=inside, other=0.0)
    ds = tl.zeros([TILE, NP], tl.float32)
    if SUMS:
        ds += tl.load(sum_grads + e, mask=e < N, other=0.0)[None, :]
    if SCORES:
        ds += tl.load(score_grads + t[:, None] * N + e[None, :], mask=inside, other=0.0)
    total = tl.zeros([TILE], tl.float32)
    mean = tl.zeros([TILE], tl.float32)
    if NORMALIZE:
        for i in tl.static_range(K):
            b_e = tl.load(experts + t * K + i, mask=there, other=-1)
            row = tl.load(rows + t * K + i, mask=there, other=0) if SORTED else t * K + i
            total += tl.sum(tl.where(e[None, :] == b_e[:, None], s, 0.0), 1)
            dg = tl.load(row_grads + row, mask=there, other=0.0)
            mean += dg * tl.load(gates + t * K + i, mask=there, other=0.0)
    for i in tl.static_range(K):
        b_e = tl.load(experts + t * K + i, mask=there, other=-1)
        row = tl.load(rows + t * K + i, mask=there, other=0) if SORTED else t * K + i
        dg = tl.load(row_grads + row, mask=there, other=0.0)
        if NORMALIZE:
            dg = (dg - mean) / total
        ds += tl.where(e[None, :] == b_e[:, None], dg[:, None], 0.0)
    if SIGMOID:
        d_logits = ds * s * (1.0 - s)
    else:
        d_logits = s * (ds - tl.sum(s * ds, 1)[:, None])
        if SQUARES:
            d_logits += s * (2.0 * tl.load(square_grad) * tl.load(lse + t, mask=there, other=0.0))[:, None]
    tl.store(out + t[:, None] * N + e[None, :], d_logits.to(out.dtype.element_ty), mask=inside)
