"""Span attention in Gluon against the oracle in float64; on a Hopper GPU only: there is no interpreter for it."""

from __future__ import annotations

import pytest
import torch
from triton_on_cpu import DEVICE, ON_GPU, close, draw

if not ON_GPU or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from shoal.kernels.nsa import BlockSizes, make_layout, oracle
from shoal.kernels.nsa.gluon_span import gluon_span_attention, supported
from shoal.kernels.nsa.triton_span import span_attention
from shoal.kernels.nsa.triton_tables import Span, make_tables

SCALE = 0.2


def rising(tokens: int, keys: int) -> Span:
    """Spans as of three documents of compressed keys, the first queries of each with none; and some that jump."""
    third = tokens // 3
    low = torch.arange(tokens) // third * (keys // 3)
    high = low + (torch.arange(tokens) % third - 5).clamp(min=0) * keys // tokens
    low[40:44], high[40:44] = torch.tensor([3, 200, 9, 9]), torch.tensor([3, keys, 8, 10])
    return Span(*(x.to(torch.int32).to(DEVICE) for x in (low, high)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv", "group"), [(2, 16), (4, 1), (1, 64)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128), (192, 128), (96, 64), (192, 64)], ids=str)
def test_against_the_oracle(dtype: torch.dtype, kv: int, group: int, dims: tuple[int, int]) -> None:
    tokens, keys = 203, 1000
    q, k = draw(tokens, kv * group, dims[0], dtype=dtype, seed=1), draw(keys, kv, dims[0], dtype=dtype, seed=2)
    v, span = draw(keys, kv, dims[1], dtype=dtype, seed=3), rising(tokens, keys)
    assert supported(q, k, v, wide=dims[0] in (96, 192))
    out, lse = gluon_span_attention(q, k, v, span, SCALE)
    want, want_lse = torch.zeros(*out.shape).double(), torch.full(lse.shape, -torch.inf).double()
    exact = [x.cpu().double() for x in (q, k, v)]
    for t, (low, high) in enumerate(zip(span.low.tolist(), span.high.tolist(), strict=True)):
        for head in range(kv * group):
            seen = [x[low : max(low, high), head // group] for x in exact[1:]]
            want[t, head] = oracle.attend(exact[0][t, head], seen[0], seen[1], SCALE)
            want_lse[t, head] = torch.logsumexp(SCALE * (seen[0] @ exact[0][t, head]), 0)
    close(out, want, dtype)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 192])
@pytest.mark.parametrize("lengths", [[5000], [700, 1, 63, 64, 900], [40], [20]])
def test_compressed_keys_like_triton(lengths: list[int], dim: int) -> None:
    """Also packs with fewer keys than a tile has, or none."""
    stops = torch.tensor([0, *lengths]).cumsum(0).tolist()
    layout = make_layout(tuple(stops), BlockSizes(32, 16, 64, 6, 1, 2, 100), DEVICE)
    tables = make_tables(layout)
    q = draw(layout.tokens, 32, dim, dtype=torch.bfloat16, seed=1)
    k, v = (draw(layout.cmp_starts.numel(), 2, size, dtype=torch.bfloat16, seed=size) for size in (dim, 64))
    out, lse = gluon_span_attention(q, k, v, tables.cmp, SCALE)
    want, want_lse = span_attention(q, k, v, tables.cmp, SCALE)
    close(out, want.cpu().double(), torch.bfloat16)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_what_it_does_not_take() -> None:
    q, k = draw(10, 6, 64, dtype=torch.bfloat16, seed=1), draw(10, 1, 64, dtype=torch.bfloat16, seed=2)
    with pytest.raises(ValueError, match="not for"):
        gluon_span_attention(q, k, k, rising(203, 10), SCALE)
