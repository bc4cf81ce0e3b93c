"""What :mod:`shoal.kernels.moe.few` computes, in Triton: three launches for a layer, of which one routes.

A program takes some columns of one expert's weights, for all tokens that chose it: it finds them in the choices itself.
Of the choices of one expert the first does the work. Every sum has one order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.few import MOST
from shoal.kernels.moe.few import FewChoice
from shoal.kernels.moe.router import Router
from shoal.kernels.moe.triton_best import best_of, scores_of
from shoal.kernels.triton_few import FewTuning, norm_shape, sum_and_norm

UP = FewTuning(columns=64, depth=64)
DOWN = FewTuning(columns=64, depth=128)
ELEMENTS = (
    131072  # of the centroids that a program reads at a time: as many loads as its registers hold are on their way
)


def triton_choices(base: Tensor, parts: Tensor, weight: Tensor, eps: float, live: Tensor, router: Router) -> FewChoice:
    """What :func:`shoal.kernels.moe.few.few_choices` returns."""
    (tokens, hidden), r = base.shape, router
    experts = len(r.centroids)
    width = max(16, triton.next_power_of_2(experts))
    total, normed = torch.empty_like(base), torch.empty_like(base)
    gates = torch.empty(tokens, r.top_k, dtype=torch.float32, device=base.device)
    chosen = torch.empty(tokens, r.top_k, dtype=torch.int32, device=base.device)
    if tokens:
        shape = norm_shape(hidden, parts.shape[1], eps, each=128)
        _choices_kernel[(tokens,)](
            *(base, parts.contiguous(), weight, r.centroids.contiguous(), base if r.bias is None else r.bias, live),
            *(total, normed, gates, chosen),
            N=experts,
            NP=width,
            EB=max(1, min(width, ELEMENTS // int(shape["HP"]))),
            K=r.top_k,
            KP=triton.next_power_of_2(r.top_k),
            SIGMOID=r.score == "sigmoid",
            NORMALIZE=r.normalize,
            BIAS=r.bias is not None,
            GROUP=experts // r.groups,
            MOST=r.most if r.most < r.groups else 0,
            **shape,
        )
    return FewChoice(total, normed, gates, chosen)


def triton_experts(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    up_tuning: FewTuning = UP,
    down_tuning: FewTuning = DOWN,
) -> Tensor:
    """What :func:`shoal.kernels.moe.few.few_experts` returns."""
    (tokens, hidden), choices, inner = x.shape, experts.shape[1], down.shape[1]
    assert tokens <= MOST, f"{tokens} tokens, and a tile has {MOST}"
    shared_up, shared_down = shared or (gate_up[:0], down[:0])
    own = len(shared_up)
    act = x.new_empty(tokens, choices + own, inner)
    out = torch.empty(tokens, choices + own, hidden, dtype=torch.float32, device=x.device)
    if not tokens or not choices + own:
        return out
    shape = {"K": choices, "KP": triton.next_power_of_2(choices), "S": own, "H": hidden, "F": inner, "M": MOST}
    kernels = (
        (_up_kernel, x.contiguous(), gate_up, shared_up, act, inner, up_tuning),
        (_down_kernel, act, down, shared_down, out, hidden, down_tuning),
    )
    for kernel, rows, weight, other, result, width, tuning in kernels:
        kernel[(triton.cdiv(width, tuning.columns), tokens * choices + own)](
            *(rows, experts, weight, other if own else weight, result, tokens),
            BN=tuning.columns,
            BK=tuning.depth,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **shape,
        )
    return out


@triton.jit
def _choices_kernel(
    base,
    parts,
    weight,
    centroids,
    bias,
    live,
    total,
    normed,
    gates,
    experts,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    EB: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    MOST: tl.constexpr,
):
    """One token: its residual, its norm, the logits of all experts, ``EB`` at a time, and its choices."""
    t = tl.program_id(0).to(tl.int64)
    row = sum_and_norm(base, parts, base, weight, total, normed, t, H, HP, P, 0, EPS).to(tl.float32)
    o, run, own = tl.arange(0, HP), tl.arange(0, NP // EB), tl.arange(0, EB)
    logits = tl.zeros([NP // EB, EB], tl.float32)
    for i in tl.static_range(NP // EB):
        inside = (i * EB + own < N)[:, None] & (o < H)[None, :]
        b_c = tl.load(centroids + (i * EB + own)[:, None] * H + o[None, :], mask=inside, other=0.0).to(tl.float32)
        logits = tl.where((run == i)[:, None], tl.sum(b_c * row[None, :], 1)[None, :], logits)
    e, k = tl.arange(0, NP), tl.arange(0, KP)
    b_scores, _ = scores_of(tl.reshape(logits, [1, NP]), (e < N)[None, :], SIGMOID)
    b_gates, b_experts, _ = best_of(b_scores, bias, e, k, N, K, BIAS, GROUP, MOST, NORMALIZE)
    needed = tl.load(live + t) != 0
    at = t * K + k[None, :]
    tl.store(gates + at, tl.where(needed, b_gates, 0.0), mask=(k < K)[None, :])
    tl.store(experts + at, tl.where(needed, b_experts, -1), mask=(k < K)[None, :])


@triton.jit
def _users(experts, slot, tokens, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, M: tl.constexpr):
    """What a slot stands for: the choices of all tokens, in order, then the shared experts.

    Returns its expert, whether that is a shared one, whether the slot has work to do, and of each token whether it uses
    the expert ``[M]``, and the place of its result.
    """
    o_t, o_k = tl.arange(0, M), tl.arange(0, KP)
    all_use, shared = o_t < tokens, slot >= tokens * K
    choices = (o_t * K)[:, None] + o_k[None, :]
    own = tl.load(experts + slot, mask=slot < tokens * K, other=-1)
    inside = all_use[:, None] & (o_k < K)[None, :]
    mine = inside & (tl.load(experts + choices, mask=inside, other=-1) == own)
    first = tl.min(tl.min(tl.where(mine, choices, M * K), 1), 0)
    wanted = shared | ((own >= 0) & (first == slot))
    use = tl.where(shared, all_use, tl.sum(mine.to(tl.int32), 1) > 0)
    place = o_t * (K + S) + tl.where(shared, slot - tokens * K + K, tl.sum(tl.where(mine, o_k[None, :], 0), 1))
    return tl.where(shared, slot - tokens * K, own).to(tl.int64), shared, wanted, use, place


@triton.jit(do_not_specialize=["tokens"])
def _up_kernel(
    x,
    experts,
    gate_up,
    shared_up,
    act,
    tokens,
    K: tl.constexpr,
    KP: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns of an expert's activation: silu(x G) * (x U)."""
    expert, shared, wanted, use, place = _users(experts, tl.program_id(1), tokens, K, KP, S, M)
    if not wanted:
        return
    w = gate_up
    if shared:
        w = shared_up
    o_t, column = tl.arange(0, M), tl.program_id(0) * BN + tl.arange(0, BN)
    gate, up = tl.zeros([M, BN], tl.float32), tl.zeros([M, BN], tl.float32)
    for start in range(0, H, BK):
        o_h = start + tl.arange(0, BK)
        b_x = tl.load(x + o_t[:, None] * H + o_h[None, :], mask=use[:, None] & (o_h < H)[None, :], other=0.0)
        at = w + (expert * H + o_h)[:, None] * (2 * F) + column[None, :]
        inside = (o_h < H)[:, None] & (column < F)[None, :]
        gate = tl.dot(b_x, tl.load(at, mask=inside, other=0.0), gate, input_precision=PRECISION)
        up = tl.dot(b_x, tl.load(at + F, mask=inside, other=0.0), up, input_precision=PRECISION)
    result = gate / (1.0 + tl.exp(-gate)) * up
    p_act = act + place[:, None] * F + column[None, :]
    tl.store(p_act, result.to(act.dtype.element_ty), mask=use[:, None] & (column < F)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _down_kernel(
    act,
    experts,
    down,
    shared_down,
    out,
    tokens,
    K: tl.constexpr,
    KP: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns of an expert's results."""
    expert, shared, wanted, use, place = _users(experts, tl.program_id(1), tokens, K, KP, S, M)
    if not wanted:
        return
    w = down
    if shared:
        w = shared_down
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros([M, BN], tl.float32)
    for start in range(0, F, BK):
        o_f = start + tl.arange(0, BK)
        b_a = tl.load(act + place[:, None] * F + o_f[None, :], mask=use[:, None] & (o_f < F)[None, :], other=0.0)
        inside = (o_f < F)[:, None] & (column < H)[None, :]
        b_w = tl.load(w + (expert * F + o_f)[:, None] * H + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(b_a, b_w, acc, input_precision=PRECISION)
    tl.store(out + place[:, None] * H + column[None, :], acc, mask=use[:, None] & (column < H)[None, :])
