"""Gradients where some blocks are chosen and others are not, against dense masked attention in float64 by autograd:
blocks at random for the selected branch alone, and those that the forward pass chose for all of NSA."""

from __future__ import annotations

from itertools import accumulate
from typing import cast

import pytest
import torch
import triton_on_cpu
from torch import Tensor
from triton_on_cpu import DEVICE, draw

triton_on_cpu.prepare()

from test_nsa_triton_backward import GPU_TOLERANCE, NAMES, TINY, Inputs, inputs  # noqa: E402
from test_nsa_triton_select import random_blocks, sizes  # noqa: E402

from shoal.kernels.nsa import BlockSizes, Layout, make_layout  # noqa: E402
from shoal.kernels.nsa.triton_attention import Tunings  # noqa: E402
from shoal.kernels.nsa.triton_backward import BackwardTuning, nsa_backward  # noqa: E402
from shoal.kernels.nsa.triton_forward import ForwardTuning, nsa_forward  # noqa: E402
from shoal.kernels.nsa.triton_gather_grad import GatherGradTuning, selected_backward  # noqa: E402
from shoal.kernels.nsa.triton_select import LOG2E, selected_by_query  # noqa: E402
from shoal.kernels.nsa.triton_span_grad import Grads  # noqa: E402
from shoal.kernels.nsa.triton_tables import make_tables  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, **GPU_TOLERANCE}
SOME = [
    (2, 16, (128, 128), torch.bfloat16),
    (1, 8, (64, 64), torch.float16),
    (1, 4, (96, 96), torch.bfloat16),
    (2, 2, (192, 192), torch.float16),
    (4, 1, (192, 128), torch.bfloat16),
    (2, 16, (192, 128), torch.float16),
]
on_a_gpu = pytest.mark.parametrize(("kv", "group", "dims", "dtype"), SOME, ids=str)
either_way = pytest.mark.parametrize("deterministic", [False, True])


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Of ``q [T, H, D]`` over the keys ``seen [T, KV, S]``; 0 where there are none."""
    tokens, kv = seen.shape[:2]
    scores = scale * torch.einsum("tkgd,skd->tkgs", q.view(tokens, kv, -1, q.shape[2]), k)
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    p = torch.where(seen.any(-1)[:, :, None, None], torch.softmax(scores, -1), 0.0)
    return torch.einsum("tkgs,ske->tkge", p, v).reshape(tokens, q.shape[1], v.shape[2])


def documents(layout: Layout) -> tuple[Tensor, Tensor]:
    """Of each token its document, and its position there."""
    cu = torch.tensor(layout.cu_seqlens, device=DEVICE)
    token = torch.arange(layout.tokens, device=DEVICE)
    document = torch.searchsorted(cu[1:], token, right=True)
    return document, token - cu[document]


def seen_in(blocks: Tensor, document: Tensor, position: Tensor, block: int) -> Tensor:
    """Keys ``[T, KV, T]`` of ``blocks [T, KV, n]``, up to each query."""
    chosen = (position // block == blocks[..., None]).any(2)
    before = (document == document[:, None]) & (position <= position[:, None])
    return chosen & before[:, None]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, name: str) -> None:
    assert not got.isnan().any(), name
    error, size = (got.double() - want).norm().item(), want.norm().item()
    assert error <= TOLERANCE[dtype] * size, f"{name}: error {error:.2e} of {size:.2e}"


def check_random(
    lengths: list[int],
    size: BlockSizes,
    kv: int,
    group: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    tuning: GatherGradTuning,
    deterministic: bool,
) -> None:
    layout = make_layout(tuple(accumulate(lengths, initial=0)), size, DEVICE)
    tables, tokens, scale = make_tables(layout), layout.tokens, dims[0] ** -0.5
    q, d_out = (draw(tokens, kv * group, dim, dtype=dtype, seed=dim + i) for i, dim in enumerate(dims))
    k, v = (draw(tokens, kv, dim, dtype=dtype, seed=dim + i) for i, dim in enumerate(dims, 5))
    blocks = random_blocks(tables, kv)
    exact = q_64, k_64, v_64 = [x.double().requires_grad_() for x in (q, k, v)]
    attend(q_64, k_64, v_64, seen_in(blocks, *documents(layout), size.slc_block), scale).backward(d_out.double())
    out, lse = selected_by_query(q, k, v, blocks, tables, scale)
    base = torch.where(lse.isinf(), torch.inf, lse * LOG2E)
    dots = (out.float() * d_out.float()).sum(-1)
    grads = Grads(*(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)))
    operands = (q, k, v, d_out, base, dots, blocks, tables, scale, grads)
    d_q = selected_backward(*operands, deterministic=deterministic, tuning=tuning)
    for name, got, leaf in zip("qkv", (d_q, scale * grads.d_k, grads.d_v), exact, strict=True):
        assert leaf.grad is not None
        close(got, leaf.grad, dtype, name)


@either_way
@pytest.mark.parametrize(
    ("lengths", "block", "count", "kv", "group", "dims"),
    [([3, 37, 1, 16], 16, 2, 2, 2, (8, 4)), ([50], 4, 3, 1, 3, (24, 8)), ([9, 21], 6, 2, 1, 16, (8, 8))],
)
def test_blocks_at_random(
    lengths: list[int], block: int, count: int, kv: int, group: int, dims: tuple[int, int], deterministic: bool
) -> None:
    tuning = GatherGradTuning(chunk=20, item=4, rows=16)
    check_random(lengths, sizes(block, count), kv, group, dims, torch.float32, tuning, deterministic)


@pytest.mark.gpu
@either_way
@on_a_gpu
def test_blocks_at_random_on_a_gpu(
    kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype, deterministic: bool
) -> None:
    size = BlockSizes(32, 16, 64, 4, 1, 2, 100)
    check_random([700, 1, 63, 64, 500], size, kv, group, dims, dtype, GatherGradTuning(), deterministic)


def check_chosen(
    lengths: list[int],
    size: BlockSizes,
    kv: int,
    group: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    tunings: Tunings,
    deterministic: bool,
) -> None:
    layout, scale = make_layout(tuple(accumulate(lengths, initial=0)), size, DEVICE), dims[0] ** -0.5
    *args, d_out = inputs(layout, kv, group, dims, dtype)
    tensors = cast(Inputs, tuple(args))
    f = nsa_forward(*tensors, layout, scale, tunings[0])
    document, position = documents(layout)
    assert (f.blocks >= 0).sum() < kv * (position // size.slc_block + 1).sum(), "every block is chosen"
    token = torch.arange(layout.tokens, device=DEVICE)
    same = document == document[:, None]
    window = same & (token <= token[:, None]) & (token > token[:, None] - size.window)
    ended = layout.cmp_starts + size.cmp_block - 1 <= token[:, None]
    cmp = (layout.cmp_documents == document[:, None]) & ended
    masks = (cmp[:, None].expand(-1, kv, -1), seen_in(f.blocks, document, position, size.slc_block),
             window[:, None].expand(-1, kv, -1))  # fmt: skip
    q, *keys, gates = exact = [x.double().requires_grad_() for x in args]
    branches = [attend(q, keys[2 * i], keys[2 * i + 1], seen, scale) for i, seen in enumerate(masks)]
    want = sum(gates[..., i : i + 1] * out for i, out in enumerate(branches))
    assert isinstance(want, Tensor)
    close(f.out, want.detach(), dtype, "output")
    want.backward(d_out.double())
    settings = {"deterministic": deterministic, "tuning": tunings[1]}
    got = nsa_backward(d_out, *tensors, list(f.kept), layout, scale, **settings)  # type: ignore[arg-type]
    for name, mine, leaf in zip(NAMES, got, exact, strict=True):
        assert leaf.grad is not None
        close(mine, leaf.grad, dtype, name)


@pytest.mark.parametrize(
    ("kv", "group", "dims", "deterministic"),
    [
        (2, 2, (8, 4), True),
        (1, 4, (24, 8), False),
        pytest.param(2, 2, (8, 4), False, marks=pytest.mark.slow),
        pytest.param(1, 4, (24, 8), True, marks=pytest.mark.slow),
    ],
)
def test_chosen_blocks(kv: int, group: int, dims: tuple[int, int], deterministic: bool) -> None:
    size = BlockSizes(4, 2, 8, 3, 1, 1, 11)
    check_chosen([37, 2, 30], size, kv, group, dims, torch.float32, TINY, deterministic)


@pytest.mark.gpu
@either_way
@on_a_gpu
def test_chosen_blocks_on_a_gpu(
    kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype, deterministic: bool
) -> None:
    size, tunings = BlockSizes(32, 16, 64, 6, 1, 2, 100), (ForwardTuning(), BackwardTuning())
    check_chosen([700, 1, 63, 64, 900], size, kv, group, dims, dtype, tunings, deterministic)
