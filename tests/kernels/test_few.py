"""Products and sums of few rows in Triton, and experts of few tokens, against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, close, draw

triton_on_cpu.prepare()

from shoal.kernels.few import MOST, add_norm, few_parts, few_products  # noqa: E402
from shoal.kernels.moe.few import few_choices, few_experts  # noqa: E402
from shoal.kernels.moe.router import Router, route  # noqa: E402
from shoal.kernels.moe.triton_few import triton_experts  # noqa: E402
from shoal.kernels.triton_few import FewTuning, triton_parts, triton_products  # noqa: E402

EPS = 1e-6
SMALL = FewTuning(columns=16, depth=16)
TOKENS = st.integers(0, MOST)


def exact(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What PyTorch's operations give in float64 on the CPU."""

    def wide(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.cpu().double() if x.is_floating_point() else x.cpu()
        if isinstance(x, Router):
            return x._replace(centroids=wide(x.centroids), bias=None if x.bias is None else wide(x.bias))
        return type(x)(map(wide, x)) if isinstance(x, tuple | list) else x

    return function(*map(wide, arguments), triton=False, **{name: wide(x) for name, x in named.items()})


def check_products(tokens: int, depth: int, sizes: list[int], dtype: torch.dtype, tuning: FewTuning | None) -> None:
    x = draw(tokens, depth, dtype=dtype, seed=1)
    weights = [draw(size, depth, dtype=dtype, seed=2 + i) for i, size in enumerate(sizes)]
    outs = triton_products(x, weights, tuning) if tuning else few_products(x, weights, True)
    for got, want in zip(outs, exact(few_products, x, weights), strict=True):
        close(got, want, dtype)
    parts = triton_parts(x, weights[0], tuning) if tuning else few_parts(x, weights[0], True)
    assert parts.dtype == torch.float32
    close(parts.sum(1).to(dtype), exact(few_parts, x, weights[0]).sum(1), dtype)


@settings(max_examples=15)
@given(TOKENS, st.integers(1, 300), st.lists(st.integers(1, 70), min_size=1, max_size=4))
def test_products_of_any_shape(tokens: int, depth: int, sizes: list[int]) -> None:
    """Sizes that fill no tile, and depths that are split or not."""
    check_products(tokens, depth, sizes, torch.float32, SMALL)


def test_a_depth_in_parts() -> None:
    assert triton_parts(torch.ones(2, 256, device=DEVICE), torch.ones(40, 256, device=DEVICE), SMALL).shape == (
        2,
        4,
        40,
    )


def check_sums(tokens: int, hidden: int, count: int, gated: int, dtype: torch.dtype) -> None:
    base, weight = draw(tokens, hidden, dtype=dtype, seed=1), draw(hidden, dtype=dtype, seed=2)
    parts = draw(tokens, count, hidden, dtype=torch.float32, seed=3)
    gates = draw(tokens, gated, dtype=torch.float32, seed=4)
    if gated and tokens:
        gates[0, 0], parts[0, 0] = 0, torch.nan  # as memory that nobody wrote may hold
    arguments = (base, parts, weight, EPS)
    (want, _), got = exact(add_norm, *arguments, gates=gates), add_norm(*arguments, True, gates)
    close(got[0], want, dtype)
    close(got[1], exact(add_norm, got[0], parts[:, :0], weight, EPS)[1], dtype)


@settings(max_examples=15)
@given(TOKENS, st.integers(1, 300), st.integers(0, 5), st.integers(0, 5))
def test_sums_of_any_shape(tokens: int, hidden: int, count: int, gated: int) -> None:
    check_sums(tokens, hidden, count, min(gated, count), torch.float32)


def check_choices(tokens: int, hidden: int, dtype: torch.dtype, router: Router) -> None:
    """Of all rows but one, which nobody needs, against the choice of the rows as they were normed."""
    base, weight = draw(tokens, hidden, dtype=dtype, seed=1), draw(hidden, dtype=dtype, seed=2)
    parts = draw(tokens, 2, hidden, dtype=torch.float32, seed=3)
    live = (torch.arange(tokens, device=DEVICE) != tokens // 2).long()
    got = few_choices(base, parts, weight, EPS, live, router, True)
    for mine, other in zip(got[:2], add_norm(base, parts, weight, EPS, True), strict=True):
        assert torch.equal(mine, other)
    rows = got.normed.cpu().double()
    bias = None if router.bias is None else router.bias.cpu()
    want = route(
        rows,
        router.centroids.cpu().double(),
        router.top_k,
        router.normalize,
        score=router.score,
        bias=bias,
        groups=router.groups,
        most=router.most,
    )
    needed = live.bool().cpu()
    assert got.experts.cpu()[needed].tolist() == want.experts[needed].tolist()
    torch.testing.assert_close(got.gates.cpu().double()[needed], want.gates[needed], rtol=1e-5, atol=1e-6)
    assert (got.experts.cpu()[~needed] == -1).all()
    assert not got.gates.cpu()[~needed].any()
    assert exact(few_choices, base, parts, weight, EPS, live, router).experts.shape == got.experts.shape


@settings(max_examples=15)
@given(
    tokens=st.integers(1, MOST),
    hidden=st.integers(1, 100),
    count=st.integers(1, 20),
    k=st.integers(1, 6),
    score=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    biased=st.booleans(),
    groups=st.integers(1, 4),
    most=st.integers(0, 4),
)
def test_choices(
    tokens: int, hidden: int, count: int, k: int, score: str, normalize: bool, biased: bool, groups: int, most: int
) -> None:
    count, most = count * groups, min(most, groups)
    k = min(k, count // groups * (most or groups))
    bias = draw(count, dtype=torch.float32, seed=5) / 4 if biased else None
    centroids = draw(count, hidden, dtype=torch.float32, seed=4) / hidden**0.5
    check_choices(tokens, hidden, torch.float32, Router(centroids, k, normalize, bias, groups, most, score=score))


def test_centroids_that_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.kernels.moe.triton_few.ELEMENTS", 256)
    check_choices(3, 40, torch.float32, Router(draw(30, 40, dtype=torch.float32, seed=4), 5))


def check_experts(
    tokens: int, k: int, count: int, own: int, hidden: int, inner: int, dtype: torch.dtype, **tuning: FewTuning
) -> None:
    """Tokens that share experts, and some that have none."""
    x = draw(tokens, hidden, dtype=dtype, seed=1)
    scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(2))
    experts = scores.topk(k).indices.int()
    experts[tokens // 2 :: 3] = -1
    shapes = [(count, hidden, 2 * inner), (count, inner, hidden), (own, hidden, 2 * inner), (own, inner, hidden)]
    weights = [draw(*shape, dtype=dtype, seed=3 + i) / shape[1] ** 0.5 for i, shape in enumerate(shapes)]
    shared = (weights[2], weights[3]) if own else None
    gate_up, down = weights[:2]
    want = exact(few_experts, x, experts, gate_up, down, shared)
    if tuning:
        got = triton_experts(x, experts.to(DEVICE), gate_up, down, shared, **tuning)
    else:
        got = few_experts(x, experts.to(DEVICE), gate_up, down, shared, True)
    assert got.dtype == torch.float32
    wanted = torch.cat((experts >= 0, torch.ones(tokens, own, dtype=torch.bool)), 1)
    # Activations between the products are rounded to the weights' type.
    close(got[wanted.to(DEVICE)].to(dtype), want[wanted], dtype)


@settings(max_examples=8)
@given(
    tokens=st.integers(0, MOST),
    k=st.integers(1, 6),
    more=st.integers(0, 4),
    own=st.integers(0, 2),
    hidden=st.integers(1, 70),
    inner=st.integers(1, 70),
)
def test_experts_of_any_shape(tokens: int, k: int, more: int, own: int, hidden: int, inner: int) -> None:
    tuning = {"up_tuning": FewTuning(16, 16), "down_tuning": FewTuning(32, 16)}
    check_experts(tokens, k, k + more, own, hidden, inner, torch.float32, **tuning)


def test_experts_as_they_are_called() -> None:
    check_experts(3, 2, 3, 2, 130, 80, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_on_a_gpu(dtype: torch.dtype, tokens: int) -> None:
    """Compiled, of sizes like a model's, and of some that fill no tile."""
    check_products(tokens, 2048, [1024, 192, 192, 64], dtype, None)
    check_products(tokens, 200, [72, 40], dtype, None)
    check_sums(tokens, 2048, 8, 6, dtype)
    check_sums(tokens, 1000, 3, 0, dtype)
    centroids = draw(64, 512, dtype=dtype, seed=4) / 512**0.5
    check_choices(tokens, 512, dtype, Router(centroids, 6))
    check_choices(
        tokens, 512, dtype, Router(centroids, 6, True, draw(64, dtype=torch.float32, seed=5), 8, 3, score="sigmoid")
    )
    check_experts(tokens, 6, 16, 2, 512, 352, dtype)
    check_experts(tokens, 3, 8, 1, 200, 72, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16])
def test_the_same_bits_each_time(tokens: int) -> None:
    x, weight = (draw(n, 2048, dtype=torch.bfloat16, seed=n) for n in (tokens, 512))
    outs = [(few_products(x, [weight], True)[0], few_parts(x, weight, True)) for _ in range(5)]
    assert all(torch.equal(*pair) for others in outs[1:] for pair in zip(others, outs[0], strict=True))
