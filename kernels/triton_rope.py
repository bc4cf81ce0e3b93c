"""Rotary position embedding in Triton: one launch that reads heads once, forward and backward.

PyTorch's operations pass some ten times over float32 copies of them. Results are the same bits: products and sums are
rounded one by one, which ``enable_fp_fusion=False`` asks for.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2, tiles

ROWS = 32
"""Heads of a program."""


def triton_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What :func:`shoal.kernels.rope.rotate` returns, with x's gradient; the tables get none.

    x: ``[T, heads, dim]`` with contiguous last dimension, cos, sin: ``[T, dim/2]``, contiguous.
    """
    out = _Rotate.apply(x, cos.contiguous(), sin.contiguous())
    assert isinstance(out, Tensor)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _turn(grad, *ctx.saved_tensors, back=True), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    tokens, heads, dim = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        launch(
            _rotate_kernel,
            (tiles(tokens * heads, ROWS),),
            *(x, cos, sin, out, tokens * heads, x.stride(0), x.stride(1)),
            HEADS=heads,
            HALF=dim // 2,
            HALFP=power_of_2(dim // 2),
            ROWS=ROWS,
            BACK=back,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def turned(first, second, cos, sin, BACK: tl.constexpr = False):
    """Halves of heads, in the type of their angles, as :func:`shoal.kernels.rope.rotate` turns them. BACK: gradients,
    which are turned the other way."""
    if BACK:
        left, right = first * cos + second * sin, second * cos - first * sin
    else:
        left, right = first * cos - second * sin, second * cos + first * sin
    return left, right


@triton.jit(do_not_specialize=["rows"])
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    rows,
    stride_t,
    stride_h,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALFP: tl.constexpr,
    ROWS: tl.constexpr,
    BACK: tl.constexpr,
):
    """Rows are heads of tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, HALFP)
    t = row // HEADS
    inside = (row < rows)[:, None] & (o_d < HALF)[None, :]
    p_x = x + (t * stride_t + row % HEADS * stride_h)[:, None] + o_d[None, :]
    angle = t[:, None] * HALF + o_d[None, :]
    b_cos = tl.load(cos + angle, mask=inside, other=0.0)
    b_sin = tl.load(sin + angle, mask=inside, other=0.0)
    first = tl.load(p_x, mask=inside, other=0.0).to(b_cos.dtype)
    second = tl.load(p_x + HALF, mask=inside, other=0.0).to(b_cos.dtype)
    first, second = turned(first, second, b_cos, b_sin, BACK)
    p_out = out + row[:, None] * (2 * HALF) + o_d[None, :]
    tl.store(p_out, first.to(out.dtype.element_ty), mask=inside)
    tl.store(p_out + HALF, second.to(out.dtype.element_ty), mask=inside)
