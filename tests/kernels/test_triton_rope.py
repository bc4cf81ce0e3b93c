"""RoPE in Triton against PyTorch's operations, forward and backward, bit by bit."""

from __future__ import annotations

import pytest
import torch
import triton_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, ON_GPU, draw

triton_on_cpu.prepare()

from shoal.kernels.rope import rope_tables  # noqa: E402
from shoal.kernels.triton_rope import triton_rotate  # noqa: E402


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``rotate`` as PyTorch computes it, whatever the device."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def compare(tokens: int, heads: int, half: int, others: int, dtype: torch.dtype) -> None:
    """Heads that stand beside ``others`` in memory, and gradients that do as well."""
    cos, sin = (x.to(DEVICE) for x in rope_tables(torch.arange(tokens) * 37 + 5, 2 * half, 10000.0))
    whole, above = (draw(tokens, heads + others, 2 * half, dtype=dtype, seed=seed) for seed in (0, 1))
    results = []
    for turn in (triton_rotate, plain):
        x = whole.clone().requires_grad_()
        out = turn(x[:, others:], cos, sin)
        (grad,) = torch.autograd.grad(out, x, above[:, :heads])
        results.append((out.detach(), grad))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs)


@settings(max_examples=40)
@given(
    st.integers(0, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 2), st.sampled_from(["float32", "float16"])
)
def test_the_bits_are_pytorchs(tokens: int, heads: int, half: int, others: int, name: str) -> None:
    """Not in bfloat16, to which Triton's interpreter cuts off."""
    compare(tokens, heads, half, others, getattr(torch, name))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 96, 128, 192])
def test_many_heads_on_a_gpu(dim: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        compare(3001, 32, dim // 2, 4, dtype)
