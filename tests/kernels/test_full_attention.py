"""Full attention on packed documents, against its definition."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.full import _offsets, full_attention, full_attention_oracle


def inputs(tokens: int, heads: int, kv: int, dims: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(tokens, heads, dims[0]), (tokens, kv, dims[0]), (tokens, kv, dims[1])]
    return [torch.randn(*s, dtype=dtype).requires_grad_() for s in shapes]


@given(
    lengths=st.lists(st.integers(0, 9), max_size=7),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    dims=st.sampled_from([(4, 4), (6, 4), (4, 6)]),
)
def test_forward_and_gradients(lengths: list[int], kv: int, group: int, dims: tuple[int, int]) -> None:
    cu = tuple(accumulate(lengths, initial=0))
    q, k, v = inputs(cu[-1], kv * group, kv, dims)
    out, want = full_attention(q, k, v, cu, 0.6), full_attention_oracle(q, k, v, cu, 0.6)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), upstream)
    if cu[-1]:
        for g, w in zip(got, torch.autograd.grad(want, (q, k, v), upstream), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_what_a_prompt_leaves_behind_serves_training() -> None:
    """Autograd saves no tensor that was made in inference mode."""
    with torch.inference_mode():
        _offsets((0, 3, 8), torch.device("cpu"))
    assert not _offsets((0, 3, 8), torch.device("cpu")).is_inference()


def test_no_tokens_stay_in_the_graph() -> None:
    q, k, v = inputs(0, 4, 2, (6, 4))
    out = full_attention(q, k, v, (0,), 1.0)
    assert out.shape == (0, 4, 4)
    out.sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


def test_a_document_does_not_see_its_neighbours() -> None:
    q, k, v = inputs(24, 4, 2, (4, 4))
    alone = full_attention(q[7:19], k[7:19], v[7:19], (0, 12), 0.5)
    packed = full_attention(q, k, v, (0, 7, 19, 24), 0.5)[7:19]
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-13)
    assert all(not g[:7].any() and not g[19:].any() for g in torch.autograd.grad(packed.sum(), (q, k, v)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (36, 60)])
@pytest.mark.parametrize("cu", [(0, 1, 130, 300, 301, 430), (0, 215, 215, 430)])
def test_on_a_gpu(cu: tuple[int, ...], dims: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = (x.detach().cuda().to(dtype).requires_grad_() for x in inputs(430, 4, 2, dims))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = full_attention(q, k, v, cu, 0.1, trained=True)
    want = full_attention_oracle(exact[0], exact[1], exact[2], cu, 0.1)
    upstream = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, (q, k, v), upstream)]
    ref = [want, *torch.autograd.grad(want, exact, upstream.double())]
    limit = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for g, w in zip(got, ref, strict=True):
        assert (g.double() - w).norm() <= limit * w.norm()
