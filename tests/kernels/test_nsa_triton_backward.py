"""NSA's backward pass in Triton against float64: the oracle's gradients by autograd, and PyTorch operations."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import cast

import pytest
import torch
import triton_on_cpu
from torch import Tensor
from triton_on_cpu import DEVICE, close, draw

triton_on_cpu.prepare()

from nsa_packs import hyper  # noqa: E402

from shoal.kernels.nsa import BlockSizes, Layout, make_layout, nsa_attention, oracle  # noqa: E402
from shoal.kernels.nsa.triton_attention import Tunings, narrow_tunings, nsa_triton  # noqa: E402
from shoal.kernels.nsa.triton_backward import BackwardTuning, nsa_backward  # noqa: E402
from shoal.kernels.nsa.triton_choose import ChooseTuning  # noqa: E402
from shoal.kernels.nsa.triton_forward import ForwardTuning, nsa_forward  # noqa: E402
from shoal.kernels.nsa.triton_gather import Tuning  # noqa: E402
from shoal.kernels.nsa.triton_gather_grad import GatherGradTuning  # noqa: E402
from shoal.kernels.nsa.triton_inverse import lists_by_block  # noqa: E402
from shoal.kernels.nsa.triton_span import SpanTuning  # noqa: E402
from shoal.kernels.nsa.triton_span_grad import SpanGradTuning  # noqa: E402
from shoal.kernels.nsa.triton_tables import make_tables  # noqa: E402

SCALE = 0.5
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # as NAMES
NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
SPAN = SpanTuning(rows=16, keys=16)
TINY: Tunings = (
    ForwardTuning(SPAN, SPAN, ChooseTuning(chunk=64, rows=16, blocks=16), Tuning(chunk=50, rows=16, steps=2, direct=1)),
    BackwardTuning(
        SpanGradTuning(rows=16, keys=16, chunk=24),
        SpanGradTuning(rows=16, keys=16, lap=13),
        GatherGradTuning(chunk=30, item=4, rows=16),
    ),
)


def inputs(layout: Layout, kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, three pairs of keys and values, gates, and last the gradient of the output."""
    q = draw(layout.tokens, kv * group, dims[0], dtype=dtype, seed=1)
    rows = (layout.cmp_starts.numel(), layout.tokens, layout.tokens)
    keys = [draw(n, kv, dims[side], dtype=dtype, seed=2 + side + 2 * i) for i, n in enumerate(rows) for side in (0, 1)]
    gates = draw(layout.tokens, kv * group, 3, dtype=dtype, seed=9).sigmoid()
    gates[layout.tokens // 2] = 0
    return [q, *keys, gates, draw(layout.tokens, kv * group, dims[1], dtype=dtype, seed=10)]


def passes(args: list[Tensor], layout: Layout, scale: float, deterministic: bool, tunings: Tunings | None = None):
    """The output, and the gradients of all NAMES."""
    leaves = [x.detach().clone().requires_grad_() for x in args[:-1]]
    out = nsa_triton(*cast(Inputs, leaves), layout, scale, deterministic=deterministic, tunings=tunings)
    out.backward(args[-1])
    return out.detach(), [x.grad for x in leaves]


def gradients(args: list[Tensor], layout: Layout, scale: float, deterministic: bool, tunings: Tunings | None = None):
    return passes(args, layout, scale, deterministic, tunings)[1]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("lengths", "sizes", "kv", "group", "dims"),
    [
        ([37, 2, 20], BlockSizes(4, 2, 8, 4, 1, 2, 11), 2, 2, (8, 4)),
        ([1, 1, 3, 28], BlockSizes(6, 2, 8, 3, 0, 1, 100), 1, 3, (24, 6)),
        ([21], BlockSizes(4, 4, 4, 4, 2, 1, 2), 1, 1, (16, 16)),
    ],
)
def test_against_the_oracle(
    lengths: list[int], sizes: BlockSizes, kv: int, group: int, dims: tuple[int, int], deterministic: bool
) -> None:
    """Also windows of two keys, documents without compressed keys, gates of 0, dimensions of two parts."""
    layout = make_layout(tuple(accumulate(lengths, initial=0)), sizes, DEVICE)
    args = inputs(layout, kv, group, dims, torch.float32)
    got = gradients(args, layout, SCALE, deterministic, TINY)
    exact = [x.cpu().double().requires_grad_() for x in args[:-1]]
    oracle.nsa(*cast(Inputs, exact), layout.cu_seqlens, hyper(sizes), SCALE).backward(args[-1].cpu().double())
    for name, mine, leaf in zip(NAMES, got, exact, strict=True):
        assert mine is not None and leaf.grad is not None, name
        close(mine, leaf.grad, torch.float32)


@pytest.mark.parametrize("deterministic", [False, True])
def test_selected_keys_may_arrive_last(deterministic: bool) -> None:
    """They are not read before, and gradients are those of keys that are there; what was kept is let go of."""
    layout = make_layout((0, 37, 39), BlockSizes(4, 2, 8, 4, 1, 2, 11), DEVICE)
    args = inputs(layout, 1, 2, (8, 4), torch.float32)
    want = gradients(args, layout, SCALE, deterministic, TINY)
    *tensors, d_out = args
    kept = list(nsa_forward(*cast(Inputs, tuple(tensors)), layout, SCALE, TINY[0]).kept)
    tensors[3:5] = [torch.full_like(x, float("nan")) for x in tensors[3:5]]
    found = []

    def arrive() -> None:
        found.append(len(kept))
        for mine, there in zip(tensors[3:5], args[3:5], strict=True):
            mine.copy_(there)

    fixed = (d_out, *cast(Inputs, tuple(tensors)), kept, layout, SCALE)
    got = nsa_backward(*fixed, deterministic=deterministic, tuning=TINY[1], arrive=arrive)
    assert found == [0]
    for mine, other in zip(got, want, strict=True):
        assert other is not None
        close(mine, other.cpu().double(), torch.float32)


def test_a_retained_graph_gives_its_gradients_again() -> None:
    layout = make_layout((0, 40), BlockSizes(4, 2, 8, 4, 1, 2, 11), DEVICE)
    *args, d_out = inputs(layout, 1, 2, (8, 4), torch.float32)
    leaves = cast(Inputs, tuple(x.requires_grad_() for x in args))
    out = nsa_triton(*leaves, layout, SCALE, deterministic=True, tunings=TINY)
    first, again = (torch.autograd.grad(out, leaves, d_out, retain_graph=keep) for keep in (True, False))
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, d_out)


def test_no_tokens() -> None:
    layout = make_layout((0, 0), BlockSizes(4, 2, 8, 4, 1, 2, 11), DEVICE)
    for grad in gradients(inputs_of_nothing(layout), layout, SCALE, False, TINY):
        assert grad is not None
        assert not grad.numel()


def inputs_of_nothing(layout: Layout) -> list[Tensor]:
    shapes = ((4, 8), (2, 8), (2, 4), (2, 8), (2, 4), (2, 8), (2, 4), (4, 3), (4, 4))
    return [torch.zeros(0, *shape, device=DEVICE) for shape in shapes]


@pytest.mark.parametrize("chunk", [10, 16, 1000])
def test_every_query_stands_in_the_lists_of_its_blocks(chunk: int) -> None:
    tables = make_tables(make_layout((0, 30, 31, 76), BlockSizes(4, 2, 8, 3, 1, 1, 5), DEVICE))
    generator = torch.Generator().manual_seed(1)
    position = torch.arange(76) - tables.starts.cpu()
    own = (position // 8)[:, None, None]
    blocks = (torch.rand(76, 2, 3, generator=generator) * (own + 1)).floor().to(torch.int32)
    blocks[::5, :, 1] = -1
    pairs, first, chunks = lists_by_block(blocks.to(DEVICE), tables, chunk)
    assert first.numel() == 2 * chunks * tables.blocks + 1
    got = []
    edges = first.tolist()
    for counter, (begin, stop) in enumerate(pairwise(edges)):
        here = pairs[begin:stop].tolist()
        assert here == sorted(here)
        h, rest = divmod(counter, chunks * tables.blocks)
        got += [(h, rest // tables.blocks, rest % tables.blocks, pair) for pair in here]
    base = tables.block_base.tolist()
    want = [
        (h, t // chunk, base[t] + block, t * 3 + i)
        for t, row in enumerate(blocks.tolist())
        for h, chosen in enumerate(row)
        for i, block in enumerate(chosen)
        if block >= 0
    ]
    assert sorted(got) == sorted(want)


GPU_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv", "group"), [(2, 16), (1, 8), (1, 4), (2, 2), (4, 1), (1, 6)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (96, 96), (192, 192)], ids=str)
def test_on_a_gpu(dtype: torch.dtype, kv: int, group: int, dims: tuple[int, int]) -> None:
    """Against the PyTorch operations in float64, with the blocks that both chose alike."""
    sizes = BlockSizes(32, 16, 64, 16, 1, 2, 100)  # every block is chosen: no rounding decides which
    layout = make_layout(tuple(accumulate([700, 1, 63, 64, 900], initial=0)), sizes, DEVICE)
    args = inputs(layout, kv, group, dims, dtype)
    scale = dims[0] ** -0.5
    exact = [x.cpu().double().requires_grad_() for x in args[:-1]]
    cpu = make_layout(layout.cu_seqlens, sizes, "cpu")
    want = nsa_attention(*cast(Inputs, exact), cpu, scale)
    want.backward(args[-1].cpu().double())
    close(nsa_triton(*cast(Inputs, args[:-1]), layout, scale), want.detach(), dtype)
    for deterministic, tunings in ((False, None), (True, None), (False, narrow_tunings())):
        got = gradients(args, layout, scale, deterministic, tunings)
        for name, mine, leaf in zip(NAMES, got, exact, strict=True):
            assert mine is not None and leaf.grad is not None
            assert mine.dtype == dtype
            error = ((mine.cpu().double() - leaf.grad).norm() / leaf.grad.norm()).item()
            assert error <= GPU_TOLERANCE[dtype], f"{name}: {error:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(128, 128), (192, 128)], ids=str)
def test_long_documents_give_the_same_gradients_both_ways(dims: tuple[int, int]) -> None:
    """Over many chunks of queries, with blocks to choose: the atomic sums beside the deterministic ones."""
    layout = make_layout((0, 9000, 20000), BlockSizes(32, 16, 64, 16, 1, 2, 512), DEVICE)
    args = inputs(layout, 2, 16, dims, torch.bfloat16)
    one, other = (gradients(args, layout, 0.1, deterministic) for deterministic in (False, True))
    for name, first, second in zip(NAMES, one, other, strict=True):
        error = ((first.double() - second.double()).norm() / second.double().norm()).item()
        assert error <= 4e-3, f"{name}: {error:.2e}"


@pytest.mark.gpu
def test_deterministic_gradients_repeat_their_bits() -> None:
    sizes = BlockSizes(32, 16, 64, 8, 1, 2, 200)
    layout = make_layout((0, 3000, 5000), sizes, DEVICE)
    args = inputs(layout, 2, 16, (128, 128), torch.bfloat16)
    first, again = (gradients(args, layout, 0.1, True) for _ in range(2))
    for name, one, other in zip(NAMES, first, again, strict=True):
        assert torch.equal(one, other), name
