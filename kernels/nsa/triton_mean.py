"""Means of compression blocks in Triton: keys are read once from memory, and written once in the backward pass."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.kernels.launches import launch, tiles
from shoal.kernels.nsa.compress import OwnBlocks
from shoal.kernels.nsa.layout import Layout

TILE, COLUMNS = 16, 128  # rows and columns of a program; a row has all heads


def triton_compress_mean(x: Tensor, layout: Layout | OwnBlocks) -> Tensor:
    """What :func:`shoal.kernels.nsa.compress_mean` returns, from the same arguments, in 16 bits or float32."""
    stride, block = layout.sizes.cmp_stride, layout.sizes.cmp_block
    firsts = layout.chunk_tokens.view(-1, stride)[layout.cmp_chunks, 0]
    out: Tensor = _Mean.apply(x, firsts, block, stride)
    return out


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, firsts, block, stride = args
        ctx.save_for_backward(firsts)
        ctx.shape, ctx.block, ctx.stride = x.shape, block, stride
        out = x.new_empty(len(firsts), *x.shape[1:])
        width = out[:1].numel()
        if len(firsts):
            grid = tiles(len(firsts), TILE), tiles(width, COLUMNS)
            launch(_mean_kernel, grid, x.contiguous(), firsts, out, len(firsts), L=block, W=width, R=TILE, BW=COLUMNS)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (firsts,) = ctx.saved_tensors
        d_x = grads[0].new_empty(ctx.shape)
        tokens, width = ctx.shape[0], ctx.shape[1] * ctx.shape[2]
        if tokens:
            # Blocks of other documents do not hold a token: those that begin within l tokens up to it are its own.
            token = torch.arange(tokens, device=firsts.device)
            low = torch.searchsorted(firsts, token - ctx.block, right=True).to(torch.int32)
            high = torch.searchsorted(firsts, token, right=True).to(torch.int32)
            grid = tiles(tokens, TILE), tiles(width, COLUMNS)
            launch(
                _mean_grad_kernel,
                grid,
                *(grads[0].contiguous(), low, high, d_x, tokens),
                L=ctx.block,
                MOST=ctx.block // ctx.stride,
                W=width,
                R=TILE,
                BW=COLUMNS,
            )
        return d_x, None, None, None


@triton.jit(do_not_specialize=["count"])
def _mean_kernel(x, firsts, out, count, L: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BW: tl.constexpr):
    """x ``[T, W]``, firsts ``[C]`` int64 to out ``[C, W]``: the mean of the L rows from each first one on."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    there = row < count
    mask = there[:, None] & (column < W)[None, :]
    first = tl.load(firsts + row, mask=there, other=0)
    total = tl.zeros([R, BW], tl.float32)
    for i in range(L):
        total += tl.load(x + (first + i)[:, None] * W + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * W + column[None, :], (total / L).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _mean_grad_kernel(
    d_out,
    low,
    high,
    d_x,
    count,
    L: tl.constexpr,
    MOST: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
):
    """d_out ``[C, W]`` to d_x ``[T, W]``: a token adds up blocks ``low ≤ c < high``, at most MOST, in their order."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    there = row < count
    b_low, b_high = (tl.load(low + row, mask=there, other=0).to(tl.int64), tl.load(high + row, mask=there, other=0))
    inside = (column < W)[None, :]
    total = tl.zeros([R, BW], tl.float32)
    for i in tl.static_range(MOST):
        mask = (b_low + i < b_high)[:, None] & inside
        total += tl.load(d_out + (b_low + i)[:, None] * W + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(
        d_x + row[:, None] * W + column[None, :], (total / L).to(d_x.dtype.element_ty), mask=there[:, None] & inside
    )
