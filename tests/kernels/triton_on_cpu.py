"""Lets one test of Triton kernels run with a GPU and without: in Triton's interpreter, which is slow and exact."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Relative error of an output, ``‖out - oracle‖ / ‖oracle‖``: some three times what rounding the output alone costs."""

GROUPS = [(2, 16), (1, 8), (1, 4), (2, 2), (4, 1), (1, 6)]
HEADS = [(64, 64), (128, 128), (192, 128), (96, 96), (192, 192)]
SHAPES = [
    (kv, group, dims, (torch.bfloat16, torch.float16)[(i + j) % 2])
    for i, (kv, group) in enumerate(GROUPS)
    for j, dims in enumerate(HEADS)
]
"""KV heads, group, dimensions of queries and of values, and a type, for tests on a GPU: every group with every head. In
both types each takes a minute of compiling more."""


def prepare() -> None:
    """Turn the interpreter on where there is no GPU. Call before anything imports Triton; otherwise the module skips.

    Triton's own functions are compiled or interpreted as the environment says while triton is imported.
    """
    if ON_GPU:
        return
    if "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("triton was imported without its interpreter", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if patch.__module__ != interpreter.__name__:
        return

    def patch_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 takes ``int`` of an array ``[1]`` as a loop's bound, which numpy 2.4 refuses."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index
    _patch_once(interpreter)


def _patch_once(interpreter: Any) -> None:
    """A launch replaces Triton's operations by interpreted ones; each call of a function within it would look for them
    all again, which takes a third of the time: once for each module that is called is enough."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_module(fn: Any) -> Any:
        if fn.__module__ in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        patched.add(fn.__module__)
        return patch(fn)

    def launch_anew(executor: Any, *arguments: Any, **named: Any) -> None:
        patched.clear()  # the launch before has restored them
        launch(executor, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_module, launch_anew


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers that ``dtype`` holds, on the device of the tests; the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """``got``, in ``dtype`` and whole, against ``want`` in float64; empty where there is nothing to compare."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert not got.isnan().any(), "not every element was written"
    error, size = (got.cpu().double() - want).norm().item(), want.norm().item()
    assert error <= TOLERANCE[dtype] * size, f"error {error:.2e} of {size:.2e}"
