"""NSA on a GPU: forward and backward pass in Triton behind one differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.kernels.nsa.attention import Arrive, Tensors, unpacked
from shoal.kernels.nsa.layout import Layout
from shoal.kernels.nsa.triton_backward import BackwardTuning, nsa_backward
from shoal.kernels.nsa.triton_forward import ForwardTuning, nsa_forward

Tunings = tuple[ForwardTuning, BackwardTuning]


def narrow_tunings() -> Tunings:
    """Those that leave 96 and 192 dimensions of queries and keys to Triton on Hopper too: to measure Gluon beside."""
    forward, backward = ForwardTuning(), BackwardTuning()
    cmp, near = replace(forward.cmp, wide=False), replace(forward.near, wide=False)
    choose = replace(forward.choose, wide=False)
    cmp_grad, window_grad = replace(backward.cmp, wide=False), replace(backward.window, wide=False)
    gradients = replace(backward, cmp=cmp_grad, window=window_grad, selected=replace(backward.selected, wide=False))
    return replace(forward, cmp=cmp, near=near, choose=choose), gradients


def nsa_triton(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    layout: Layout,
    scale: float,
    *,
    deterministic: bool | None = None,
    tunings: Tunings | None = None,
) -> Tensor:
    """What :func:`shoal.kernels.nsa.nsa_attention` returns, from the same arguments, in bfloat16, float16 or float32.

    gates: not negative. deterministic: gradients that are the same bits in every run; None: as torch is set
    (``torch.use_deterministic_algorithms``).
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    out: Tensor = _Triton.apply(*tensors, layout, scale, deterministic, tunings or (ForwardTuning(), BackwardTuning()))
    return out


def forward(tensors: Tensors, layout: Layout, scale: float, arrive: Arrive | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`shoal.kernels.nsa.attention.nsa_forward`."""
    f = nsa_forward(*tensors, layout, scale, arrive=arrive)
    return f.out, f.kept


def backward(
    d_out: Tensor,
    tensors: Tensors,
    kept: list[Tensor],
    layout: Layout,
    scale: float,
    arrive: Callable[[], object] | None,
    wide: bool,
) -> tuple[Tensor, ...]:
    """:func:`shoal.kernels.nsa.attention.nsa_backward`, deterministic as torch is set."""
    exact = torch.are_deterministic_algorithms_enabled()
    return nsa_backward(d_out, *tensors, kept, layout, scale, deterministic=exact, arrive=arrive, wide=wide)


class _Triton(torch.autograd.Function):
    """Forward keeps the inputs, the three branches' outputs with their log-sum-exps, and the chosen blocks."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        layout, scale, deterministic, tunings = args[8:]
        tensors = cast(Tensors, args[:8])
        f = nsa_forward(*tensors, layout, scale, tunings[0])
        ctx.save_for_backward(*tensors, *f.kept)
        ctx.settings = layout, scale, deterministic, tunings[1]
        return f.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, kept = unpacked(ctx)
        layout, scale, deterministic, tuning = ctx.settings
        back = nsa_backward(grads[0], *tensors, kept, layout, scale, deterministic=deterministic, tuning=tuning)
        return (*back, None, None, None, None)
