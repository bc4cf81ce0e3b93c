"""Every group and head dimension that NSA's Triton kernels are for: passes and decode against the oracle in float64."""

from __future__ import annotations

from itertools import accumulate
from typing import cast

import pytest
import torch
import triton_on_cpu
from triton_on_cpu import DEVICE, close

triton_on_cpu.prepare()

from test_nsa_triton_backward import GPU_TOLERANCE, NAMES, TINY, Inputs, inputs  # noqa: E402
from test_nsa_triton_paged import case  # noqa: E402
from test_nsa_triton_paged import exact as decoded  # noqa: E402

from shoal.kernels.nsa import BlockSizes, make_layout, oracle  # noqa: E402
from shoal.kernels.nsa.triton_attention import nsa_triton  # noqa: E402
from shoal.kernels.nsa.triton_paged import PagedTuning, triton_paged_decode  # noqa: E402

SIZES = BlockSizes(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=3, slc_initial=1, slc_local=1, window=5)
GROUPS = [1, 2, 4, 8, 16]
HEADS = [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128)]
each_group = pytest.mark.parametrize("group", GROUPS)
each_head = pytest.mark.parametrize("dims", HEADS, ids=str)
TWICE = {(1, HEADS[0]), (1, HEADS[4]), (2, HEADS[1]), (2, HEADS[3]), (4, HEADS[0]), (4, HEADS[2]), (8, HEADS[1])}
TWICE |= {(8, HEADS[3]), (16, HEADS[2]), (16, HEADS[4])}
"""Pairs of a group and a head in which each comes twice; what one asks of a kernel is not what the other does."""
pairs = [
    pytest.param(group, dims, marks=() if (group, dims) in TWICE else pytest.mark.slow, id=f"{dims}-{group}")
    for dims in HEADS
    for group in GROUPS
]


def check(group: int, dims: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """The output and all gradients of a document of one token and one in which blocks are chosen."""
    layout = make_layout(tuple(accumulate([1, 15], initial=0)), SIZES, DEVICE)
    *args, d_out = inputs(layout, 1, group, dims, dtype)
    leaves = [x.detach().clone().requires_grad_() for x in args]
    exact = [x.detach().cpu().double().requires_grad_() for x in args]
    scale, s = dims[0] ** -0.5, SIZES
    hyper = oracle.Hyper(s.cmp_block, s.cmp_stride, s.slc_block, s.slc_count, s.slc_initial, s.slc_local, s.window)
    out = nsa_triton(*cast(Inputs, leaves), layout, scale, tunings=TINY)
    want = oracle.nsa(*cast(Inputs, exact), layout.cu_seqlens, hyper, scale)
    close(out.detach(), want.detach(), dtype)
    out.backward(d_out)
    want.backward(d_out.cpu().double())
    for name, mine, leaf in zip(NAMES, leaves, exact, strict=True):
        assert mine.grad is not None and leaf.grad is not None, name
        error = ((mine.grad.cpu().double() - leaf.grad).norm() / leaf.grad.norm()).item()
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("group", "dims"), pairs)
def test_passes(group: int, dims: tuple[int, int]) -> None:
    check(group, dims, torch.float32, 1e-6)


@pytest.mark.parametrize(("group", "dims"), [(4, (96, 96)), (16, (192, 128))], ids=str)
def test_passes_in_float16(group: int, dims: tuple[int, int]) -> None:
    check(group, dims, torch.float16, GPU_TOLERANCE[torch.float16])


@each_group
@each_head
def test_decode(group: int, dims: tuple[int, int]) -> None:
    """Sequences of one token, and of so many that blocks are chosen."""
    args = case([0, 40], SIZES, 1, group, dims, torch.float32)
    scale = dims[0] ** -0.5
    close(triton_paged_decode(*args, SIZES, scale, PagedTuning(rows=16)), decoded(*args, SIZES, scale), torch.float32)
