"""What grouped products in Gluon share: when they can be used, descriptors for TMA, halves of accumulators."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
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


_compiled: dict[tuple[Any, ...], tuple[Callable[..., None], Any]] = {}
"""What launches a kernel, and the kernel, whose id no other one must get."""


def launch(kernel: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Run a kernel of 4 warps, besides its specialized ones, on every multiprocessor.

    Triton's own way takes 0.2 ms of the host's time with five descriptors, which is longer than a small product: a
    kernel that was compiled for these constants is launched directly. Nothing else of the arguments may be specialized.
    """
    device = arguments[0].base.device
    if device.index == launches.current_device():
        _launch_here(kernel, arguments, device, constants)
    else:
        with torch.cuda.device(device):
            _launch_here(kernel, arguments, device, constants)


def _launch_here(kernel: Any, arguments: tuple[Any, ...], device: torch.device, constants: dict[str, Any]) -> None:
    key = (id(kernel), device.index, *constants.values())  # Triton computes a kernel's hash in Python
    found = _compiled.get(key)
    grid = (multiprocessors(device), 1, 1)
    if found is None:
        compiled = kernel[grid](*arguments, **constants, num_warps=4)
        if compiled is not None:
            _compiled[key] = launches.starter(compiled), kernel
    else:
        # of a tensor CUDA would be asked where it lies
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        start, _ = found
        start(device.index, grid, *values, *constants.values())


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
