"""Means of compression blocks: PyTorch's and Triton's, outputs and gradients, against the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import triton_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, close, draw

triton_on_cpu.prepare()

from nsa_packs import compressing, hyper  # noqa: E402

from shoal.kernels.nsa import BlockSizes, Layout, compress_mean, make_layout, oracle  # noqa: E402
from shoal.kernels.nsa.compress import own_blocks  # noqa: E402
from shoal.kernels.nsa.rows import Rows  # noqa: E402
from shoal.kernels.nsa.triton_mean import triton_compress_mean  # noqa: E402

Mean = Callable[[Tensor, Layout], Tensor]
PAPER = BlockSizes(32, 16, 64, 16, 1, 2, 512)


def check(
    mean: Mean, lengths: list[int], sizes: BlockSizes, kv: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    """Relative errors of the output and of the gradient, with tokens that no block holds among them."""
    cu = tuple(accumulate(lengths, initial=0))
    layout = make_layout(cu, sizes, device)
    x = draw(cu[-1], kv, dim, dtype=dtype, seed=1).to(device).requires_grad_()
    upstream = draw(layout.cmp_starts.numel(), kv, dim, dtype=dtype, seed=2).to(device)
    exact = x.detach().cpu().double().requires_grad_()
    out, want = mean(x, layout), oracle.compress_mean(exact, cu, hyper(sizes))
    close(out, want.detach(), dtype)
    out.backward(upstream)
    assert x.grad is not None
    if len(want):
        want.backward(upstream.cpu().double())
    close(x.grad, torch.zeros_like(exact) if exact.grad is None else exact.grad, dtype)


packs = given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    sizes=compressing(),
    kv=st.integers(1, 3),
    dim=st.integers(1, 20),
)


@packs
def test_pytorch(lengths: list[int], sizes: BlockSizes, kv: int, dim: int) -> None:
    check(compress_mean, lengths, sizes, kv, dim, torch.float32, "cpu")


@settings(max_examples=10)
@packs
def test_triton(lengths: list[int], sizes: BlockSizes, kv: int, dim: int) -> None:
    check(triton_compress_mean, lengths, sizes, kv, dim, torch.float32, DEVICE)


def test_rows_wider_than_a_program() -> None:
    check(triton_compress_mean, [1, 100, 31, 64], PAPER, 2, 96, torch.float32, DEVICE)


@pytest.mark.parametrize("mean", [compress_mean, triton_compress_mean])
def test_of_a_part_of_the_queries(mean: Callable[..., Tensor]) -> None:
    """The blocks that end with them, from the tokens that they need."""
    sizes, cu = BlockSizes(4, 2, 8, 4, 1, 2, 11), (0, 10, 100)
    whole = make_layout(cu, sizes, DEVICE)
    part = make_layout(cu, sizes, DEVICE, queries=Rows.of([(14, 33), (71, 90)]))
    x = draw(100, 2, 8, dtype=torch.float32, seed=1).requires_grad_()
    got = mean(x[part.needs.raw.indices(x.device)], own_blocks(part))
    want = compress_mean(x, whole)[part.needs.own.indices(x.device)]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    upstream = torch.randn_like(want)
    mine, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (got, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_triton_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on a GPU, and x is torch\.float32 on cpu"):
        compress_mean(torch.zeros(40, 1, 8), make_layout((0, 40), PAPER, "cpu"), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv", "dim"), [(4, 128), (1, 64), (2, 96), (3, 192)])
def test_on_a_gpu(dtype: torch.dtype, kv: int, dim: int) -> None:
    check(compress_mean, [700, 1, 63, 31, 900], PAPER, kv, dim, dtype, DEVICE)
