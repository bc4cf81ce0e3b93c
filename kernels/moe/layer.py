"""A whole DeepSeekMoE layer on one device, from tokens to output, that keeps little for its backward pass.

Kept are the tokens, the output of the first GEMM of routed and shared experts, and the routing: rows are copied to
their experts again, and activations computed again, when the backward pass needs them. No count is read by the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.moe import gemms as ffn
from shoal.kernels.moe.gemms import Gemms, apart
from shoal.kernels.moe.triton_gemms import TritonGemms
from shoal.kernels.moe.triton_route import Choice, choose, choose_backward
from shoal.kernels.moe.triton_rows import combine, expand


class MoEOutput(NamedTuple):
    """out: ``[T, H]``, without the residual. counts: ``[N]`` int32, tokens of each expert. sums: ``[N]`` float32, of
    the scores over tokens, with a gradient: what the balance losses are made of. experts: ``[T, K]`` int32, chosen.
    squares: float32, a scalar, and scores: ``[T, N]`` float32, with gradients, where they were asked for."""

    out: Tensor
    counts: Tensor
    sums: Tensor
    experts: Tensor
    squares: Tensor | None
    scores: Tensor | None


def moe_layer(
    x: Tensor,
    centroids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool = False,
    bias: Tensor | None = None,
    groups: int = 1,
    most: int = 0,
    squares: bool = False,
    scores: bool = False,
    kind: type[Gemms] = TritonGemms,
) -> MoEOutput:
    """DeepSeekMoE (eq. 9-11): shared experts for every token, and the ``top_k`` best routed ones, weighted.

    x: ``[T, H]``, centroids: ``[N, H]``. gate_up: ``[N, H, 2F]`` (gate first), down: ``[N, F, H]``; shared: the same
    of the shared experts, ``[S, H, 2F']`` and ``[S, F', H]``, or of all of them as one, ``[H, 2·S·F']`` and
    ``[S·F', H]`` (:func:`shoal.kernels.moe.gemms.side_by_side`), which may save a copy. score, normalize, bias, groups,
    most: as in :func:`shoal.kernels.moe.triton_route.choose`. All of one dtype; bias float32. squares, scores: ask for
    them. kind: who computes the experts' products.
    """
    shared_up, shared_down = shared or (None, None)
    options = _Options(top_k, score, normalize, groups, most, squares, scores, kind)
    return MoEOutput(*_MoELayer.apply(x, centroids, gate_up, down, shared_up, shared_down, bias, options))


class _Options(NamedTuple):
    top_k: int
    score: str
    normalize: bool
    groups: int
    most: int
    squares: bool
    scores: bool
    kind: type[Gemms]


class _MoELayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        centroids: Tensor,
        gate_up: Tensor,
        down: Tensor,
        shared_up: Tensor | None,
        shared_down: Tensor | None,
        bias: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor | None, ...]:
        kind, x, centroids = options.kind, x.contiguous(), centroids.contiguous()
        choice = choose(
            x,
            centroids,
            options.top_k,
            score=options.score,
            normalize=options.normalize,
            bias=bias,
            groups=options.groups,
            most=options.most,
            lse=options.squares,
        )
        ctx.set_materialize_grads(False)
        ctx.products, ctx.shared = kind(choice.ends), kind(None)
        hidden, results = ffn.forward(ctx.products, expand(x, choice.rows), gate_up, down)
        shared_hidden = base = None
        if shared_up is not None and shared_down is not None:
            shared_hidden, base = ffn.forward(ctx.shared, x, shared_up, _flat(shared_down))
        out = combine(results, choice.rows, choice.gates, base)
        ctx.save_for_backward(
            x, centroids, gate_up, down, shared_up, shared_down, hidden, shared_hidden, *vars(choice).values()
        )
        ctx.options = options
        ctx.mark_non_differentiable(choice.counts, choice.experts)
        scores = choice.scores if options.scores else None
        return out, choice.counts, choice.sums, choice.experts, choice.squares, scores

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        grad: Tensor | None,
        _counts: None,
        sum_grads: Tensor | None,
        _experts: None,
        square_grad: Tensor | None,
        score_grads: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, centroids, gate_up, down, shared_up, shared_down, hidden, shared_hidden, *tables = ctx.saved_tensors
        choice = Choice(*tables)
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        d_rows, d_gate_up, d_down, d_gates = ffn.backward(
            ctx.products,
            expand(grad, choice.rows),
            lambda: expand(x, choice.rows),
            hidden,
            gate_up,
            down,
            choice.gates,
            choice.order,
        )
        assert d_gates is not None
        d_logits = choose_backward(
            choice,
            d_gates,
            None if sum_grads is None else sum_grads.contiguous(),
            x.dtype,
            score=ctx.options.score,
            normalize=ctx.options.normalize,
            score_grads=None if score_grads is None else score_grads.contiguous(),
            square_grad=square_grad,
        )
        base: Tensor | None = None
        d_shared_up: Tensor | None = None
        d_shared_down: Tensor | None = None
        if shared_up is not None:
            down = _flat(shared_down)
            base, d_up, d_wide_down, _ = ffn.backward(ctx.shared, grad, lambda: x, shared_hidden, shared_up, down)
            d_shared_up = d_up if shared_up.dim() == 2 else apart(d_up, len(shared_up))
            d_shared_down = d_wide_down.view_as(shared_down)
        d_x = combine(d_rows, choice.rows, None, base, d_logits, centroids)
        # cuBLAS takes three times as long where rows do not begin at multiples of 16 bytes.
        rest = -len(centroids) % 8
        d_centroids = ((F.pad(d_logits, (0, rest)) if rest else d_logits).T @ x)[: len(centroids)]
        return d_x, d_centroids, d_gate_up, d_down, d_shared_up, d_shared_down, None, None


def _flat(shared_down: Tensor) -> Tensor:
    """``[S, F, H] -> [S·F, H]``, where it is not that already."""
    return shared_down.flatten(0, -2)
