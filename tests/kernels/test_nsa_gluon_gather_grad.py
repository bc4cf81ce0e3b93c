"""Gradients of selected attention in Gluon beside the deterministic ones in Triton; on a Hopper GPU only."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from triton_on_cpu import DEVICE, ON_GPU, draw

if not ON_GPU or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from shoal.kernels.nsa import BlockSizes, make_layout
from shoal.kernels.nsa.triton_gather_grad import GatherGradTuning, for_hopper, selected_backward
from shoal.kernels.nsa.triton_span_grad import Grads
from shoal.kernels.nsa.triton_tables import PackTables, make_tables

SCALE = 0.1


def choices(tables: PackTables, kv: int, n: int, block: int) -> Tensor:
    """Of each query its own block and others before it, each once, at random; -1 where there are not so many."""
    position = torch.arange(tables.starts.numel(), device=DEVICE) - tables.starts
    own = (position // block).long()
    generator = torch.Generator().manual_seed(7)
    key = torch.rand(len(own), kv, int(own.max()) + 1, generator=generator).to(DEVICE)
    index = torch.arange(key.shape[2], device=DEVICE)
    key = key.masked_fill(index > own[:, None, None], -1.0).masked_fill(index == own[:, None, None], 2.0)
    best = key.topk(min(n, key.shape[2]), dim=2)
    chosen = torch.where(best.values >= 0, best.indices, -1).to(torch.int32)
    return torch.nn.functional.pad(chosen, (0, n - chosen.shape[2]), value=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[3000], [700, 1, 63, 64, 900], [40]])
@pytest.mark.parametrize(
    ("kv", "group", "dims", "dtype", "block"),
    [
        (2, 16, (128, 128), torch.bfloat16, 64),
        (1, 64, (128, 64), torch.bfloat16, 64),
        (3, 16, (128, 64), torch.float16, 64),
        (1, 16, (128, 128), torch.bfloat16, 32),
        (2, 16, (192, 128), torch.bfloat16, 64),
        (1, 64, (192, 64), torch.float16, 64),
        (1, 16, (192, 128), torch.bfloat16, 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [2048, 320])
def test_like_triton(
    lengths: list[int], kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype, block: int, chunk: int
) -> None:
    sizes = BlockSizes(32, 16, block, 6, 1, 2, 300)
    tables = make_tables(make_layout(tuple(accumulate(lengths, initial=0)), sizes, DEVICE))
    rows, heads = sum(lengths), kv * group
    q, k = draw(rows, heads, dims[0], dtype=dtype, seed=1), draw(rows, kv, dims[0], dtype=dtype, seed=2)
    v, d_out = draw(rows, kv, dims[1], dtype=dtype, seed=3), draw(rows, heads, dims[1], dtype=dtype, seed=4)
    base, dots = (draw(rows, heads, dtype=torch.float32, seed=seed) for seed in (5, 6))
    base[::3, 0] = torch.inf  # a row of weight 0, as a gate of 0 makes it
    blocks = choices(tables, kv, 6, block)
    assert for_hopper(q, v, tables) is not None
    mine, want = (Grads(*(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))) for _ in range(2))
    operands = (q, k, v, d_out, 5 + base, dots, blocks, tables, SCALE)
    d_q = selected_backward(*operands, mine, tuning=GatherGradTuning(chunk=chunk))
    exact = selected_backward(*operands, want, deterministic=True)
    pairs = {"d_q": (d_q, exact), "d_k": (mine.d_k, want.d_k), "d_v": (mine.d_v, want.d_v)}
    for name, (got, expected) in pairs.items():
        assert not got.isnan().any(), name
        error = ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
        assert error <= 1e-3, f"{name}: {error:.2e}"
