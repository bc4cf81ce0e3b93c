"""What grouped products in Gluon share: when they can be used, descriptors for TMA, halves of accumulators."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shoal.kernels import launches
from shoal.kernels.hopper import multiprocessors, on_hopper


def supported(x: Tensor, *widths: int) -> bool:
    """Whether these kernels take bf16 rows like ``x`` and weights of these widths: on Hopper, multiples of 8."""
    return on_hopper(x) and x.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def launch(kernel: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Run a kernel of 4 warps, besides its specialized ones, on every multiprocessor of the first argument's GPU."""
    device = arguments[0].base.device
    here = device.index == launches.current_device()
    with nullcontext() if here else torch.cuda.device(device):
        launches.launch(kernel, (multiprocessors(device),), *arguments, **constants, num_warps=4)


@gluon.jit
def split_columns(x):
    """The left and the right half of the columns."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1] // 2
    return x.reshape([M, 2, N]).permute((0, 2, 1)).split()


@gluon.jit
def sigmoid_of(x):
    """Of float32, to some 1e-7: by 4 instructions instead of the 12 that are right for all numbers of all sizes."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, t; }",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
