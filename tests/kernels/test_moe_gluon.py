"""Grouped products in Gluon against PyTorch's in float64; on a Hopper GPU only: there is no interpreter for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_on_cpu import ON_GPU, draw

if not ON_GPU or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from shoal.kernels.moe import gemms
from shoal.kernels.moe.gemms import Gemms, side_by_side
from shoal.kernels.moe.gluon_common import supported
from shoal.kernels.moe.gluon_gemms import GluonGemms
from shoal.kernels.moe.layer import moe_layer

GROUPS = [[300], [128, 0, 64, 1, 700, 0], [0, 0, 5], [129, 127, 256]]
SIZES = [(64, 128), (200, 136), (512, 856), (2048, 1408)]


def both(counts: list[int]) -> tuple[GluonGemms, Gemms]:
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    return GluonGemms(ends.cuda()), Gemms(ends)


def near(got: Tensor, want: Tensor, tolerance: float = 4e-3) -> None:
    assert not got.isnan().any(), "not every element was written"
    assert (got.cpu().double() - want).norm() <= tolerance * want.norm() + 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("counts", GROUPS)
@pytest.mark.parametrize(("width", "inner"), SIZES)
def test_products(counts: list[int], width: int, inner: int) -> None:
    ours, exact = both(counts)
    rows = draw(sum(counts), width, dtype=torch.bfloat16, seed=1)
    weight = draw(len(counts), width, 2 * inner, dtype=torch.bfloat16, seed=2) * width**-0.5
    assert supported(rows, width, inner)
    near(ours.rows_by_weight(rows, weight), exact.rows_by_weight(rows.cpu().double(), weight.cpu().double()))
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    near(ours.rows_by_weight(rows, turned), exact.rows_by_weight(rows.cpu().double(), weight.cpu().double()))
    hidden, act = ours.up(rows, weight)
    want_hidden, want_act = exact.up(rows.cpu().double(), weight.cpu().double())
    near(ours.rows_by_rows(rows, hidden), exact.rows_by_rows(rows.cpu().double(), hidden.cpu().double()))
    near(hidden, want_hidden)
    near(act, want_act, 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", GROUPS)
@pytest.mark.parametrize(("width", "inner"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_the_activation(counts: list[int], width: int, inner: int, weighted: bool) -> None:
    ours, exact = both(counts)
    rows = sum(counts)
    grad = draw(rows, width, dtype=torch.bfloat16, seed=1)
    hidden = draw(rows, 2 * inner, dtype=torch.bfloat16, seed=2)
    down = draw(len(counts), inner, width, dtype=torch.bfloat16, seed=3) * width**-0.5
    gates = draw(rows, dtype=torch.float32, seed=4) if weighted else None
    order = torch.randperm(rows).to("cuda", torch.int32) if weighted else None
    got = ours.act_backward(grad, down, hidden, gates, order)
    d_act = exact.rows_by_weight(grad.cpu().double(), down.cpu().double().transpose(1, 2))
    wide = None if gates is None else gates.cpu().double()
    want = gemms.swiglu_backward(hidden.cpu().double(), d_act, wide, None if order is None else order.cpu())
    near(got[0], want[0])
    near(got[1], want[1])
    assert (got[2] is None) == (not weighted)
    if got[2] is not None and want[2] is not None:
        near(got[2], want[2], 1e-5)


@pytest.mark.gpu
def test_what_is_not_a_number_stays_with_its_expert() -> None:
    ours, exact = both([300, 77, 130, 5])
    left, right = draw(512, 256, dtype=torch.bfloat16, seed=1), draw(512, 512, dtype=torch.bfloat16, seed=2)
    want = exact.rows_by_rows(left.cpu().double(), right.cpu().double())
    for x in (left, right):
        spoilt = x.clone()
        spoilt[300:377] = torch.nan
        got = ours.rows_by_rows(spoilt if x is left else left, spoilt if x is right else right)
        assert got[1].isnan().all()
        near(got[[0, 2, 3]], want[[0, 2, 3]])


@pytest.mark.gpu
def test_one_group_of_all_rows() -> None:
    ours = GluonGemms(None)
    rows, weight = draw(333, 256, dtype=torch.bfloat16, seed=1), draw(256, 512, dtype=torch.bfloat16, seed=2) / 16
    near(ours.rows_by_weight(rows, weight), rows.cpu().double() @ weight.cpu().double())


@pytest.mark.gpu
def test_the_same_bits_again_and_the_layer_of_the_other_kind() -> None:
    tokens, hidden, inner, count, k = 1000, 256, 192, 16, 4
    shapes = [(tokens, hidden), (count, hidden), (count, hidden, 2 * inner), (count, inner, hidden)]
    shapes += [(2, hidden, 2 * inner), (2, inner, hidden)]
    inputs = [
        (draw(*s, dtype=torch.float32, seed=i) * (s[-2] ** -0.5 if len(s) > 2 else 1.0)).bfloat16().requires_grad_()
        for i, s in enumerate(shapes)
    ]
    upstream = draw(tokens, hidden, dtype=torch.bfloat16, seed=9)
    results = []
    for kind in (GluonGemms, GluonGemms, Gemms):
        x, centroids, gate_up, down, shared_up, shared_down = inputs
        out = moe_layer(x, centroids, gate_up, down, (shared_up, shared_down), k, kind=kind).out
        results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    for first, again, torchs in zip(*results, strict=True):
        assert torch.equal(first, again)
        near(first, torchs.cpu().double(), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "inner"), [(2, 1408), (3, 128), (2, 704), (2, 200)])
def test_experts_side_by_side(count: int, inner: int) -> None:
    """Read where they are, or joined where a tile would reach from one into another: for 704 forward, not backward."""
    ours, exact = GluonGemms(None), Gemms(None)
    rows = draw(333, 256, dtype=torch.bfloat16, seed=1)
    weight = draw(count, 256, 2 * inner, dtype=torch.bfloat16, seed=2) / 16
    wide = [x.cpu().double() for x in (rows, weight)]
    hidden, act = ours.up(rows, weight)
    want_hidden, want_act = exact.up(wide[0], wide[1])
    near(hidden, want_hidden)
    near(act, want_act, 6e-3)
    grad = ours.up_backward(hidden, weight)
    near(grad, exact.up_backward(hidden.cpu().double(), wide[1]))
    assert torch.equal(grad, ours.up_backward(hidden, side_by_side(weight)))
