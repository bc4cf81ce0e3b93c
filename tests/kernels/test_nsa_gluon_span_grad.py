"""Gradients of span attention in Gluon beside the deterministic ones in Triton; on a Hopper GPU only."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from triton_on_cpu import DEVICE, ON_GPU, draw

if not ON_GPU or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from shoal.kernels.nsa import BlockSizes, make_layout
from shoal.kernels.nsa.gluon_span_grad import gluon_span_backward, supported
from shoal.kernels.nsa.triton_span_grad import Grads, span_backward
from shoal.kernels.nsa.triton_tables import PackTables, make_tables

SCALE = 0.1


def drawn(
    tables: PackTables, branch: str, kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q, k, v, d_out, base and dots, with bases that make the weights of a row sum up to about one."""
    rows, keys = tables.starts.numel(), getattr(tables, f"{branch}_seen").low.numel()
    q, k = draw(rows, kv * group, dims[0], dtype=dtype, seed=1), draw(keys, kv, dims[0], dtype=dtype, seed=2)
    v, d_out = draw(keys, kv, dims[1], dtype=dtype, seed=3), draw(rows, kv * group, dims[1], dtype=dtype, seed=4)
    span = getattr(tables, branch)
    some = (span.high > span.low)[:, None].expand(-1, kv * group)
    base = 5 + draw(rows, kv * group, dtype=torch.float32, seed=5)
    return q, k, v, d_out, torch.where(some, base, torch.inf), draw(rows, kv * group, dtype=torch.float32, seed=6)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", ["cmp", "window"])
@pytest.mark.parametrize("lengths", [[5000], [700, 1, 63, 64, 900], [40], [20]])
@pytest.mark.parametrize(
    ("kv", "group", "dims", "dtype"),
    [
        (2, 16, (128, 128), torch.bfloat16),
        (1, 64, (128, 64), torch.bfloat16),
        (3, 4, (128, 128), torch.float16),
        (2, 16, (192, 128), torch.bfloat16),
        (1, 64, (192, 64), torch.bfloat16),
        (3, 4, (192, 128), torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [0, 320])
def test_like_triton(
    branch: str, lengths: list[int], kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype, chunk: int
) -> None:
    layout = make_layout(tuple(accumulate(lengths, initial=0)), BlockSizes(32, 16, 64, 6, 1, 2, 300), DEVICE)
    tables = make_tables(layout)
    q, k, v, d_out, base, dots = drawn(tables, branch, kv, group, dims, dtype)
    span, seen = getattr(tables, branch), getattr(tables, f"{branch}_seen")
    assert supported(q, v, wide=dims[0] == 192)
    mine, want = (Grads(*(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))) for _ in range(2))
    gluon_span_backward(q, k, v, d_out, base, dots, span, seen, SCALE, mine, chunk=chunk, lap=640)
    span_backward(q, k, v, d_out, base, dots, span, seen, SCALE, want, deterministic=True)
    for name in ("d_q", "d_k", "d_v"):
        got, expected = getattr(mine, name).double(), getattr(want, name).double()
        error = ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()
        assert error <= 1e-3, f"{name}: {error:.2e}"


@pytest.mark.gpu
def test_what_it_does_not_take() -> None:
    x = draw(10, 6, 64, dtype=torch.bfloat16, seed=1)
    assert not supported(x, x[:, :3])
