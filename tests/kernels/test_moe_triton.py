"""The MoE layer in Triton, whole and in parts, against the equations in float64: interpreted, or in bf16 on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_on_cpu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, ON_GPU, close, draw

triton_on_cpu.prepare()

from shoal.kernels.moe import gemms, oracle, triton_rows  # noqa: E402
from shoal.kernels.moe.gemms import apart, side_by_side  # noqa: E402
from shoal.kernels.moe.layer import moe_layer  # noqa: E402
from shoal.kernels.moe.triton_gemms import TritonGemms  # noqa: E402
from shoal.kernels.moe.triton_route import Choice, choose, choose_backward  # noqa: E402
from shoal.kernels.moe.triton_tiles import MOST_KEPT, tiles_of  # noqa: E402
from shoal.workers.config import Recipe  # noqa: E402
from shoal.workers.mesh import make_mesh  # noqa: E402
from shoal.workers.model.feedforward import MoE  # noqa: E402
from shoal.workers.model.load import MoELoad  # noqa: E402
from shoal.workers.placement import Placement  # noqa: E402

DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative error of a whole tensor: one that passed several roundings on its way."""
    assert got.shape == want.shape
    assert not got.isnan().any(), "not every element was written"
    assert (got.cpu().double() - want.cpu()).norm() <= tolerance * want.norm() + 1e-12


def expect_choice(
    logits: Tensor, top_k: int, score: str, normalize: bool, bias: Tensor | None, *limit: int
) -> tuple[Tensor, ...]:
    """Scores, gates and experts, token by token, with gradients; of equals the lower expert."""
    scores = torch.softmax(logits, -1) if score == "softmax" else torch.sigmoid(logits)
    wanted = scores.detach() if bias is None else scores.detach() + bias
    experts = torch.tensor([oracle.choose(row, top_k, *limit) for row in wanted.tolist()]).view(len(logits), top_k)
    gates = scores.gather(1, experts)
    return scores, gates / gates.sum(1, keepdim=True) if normalize else gates, experts


def check_sorted(choice: Choice, count: int) -> None:
    """Rows are sorted by expert and then by token, and both tables say so."""
    flat = choice.experts.flatten().long().cpu()
    order = torch.argsort(flat, stable=True)
    assert choice.order.tolist() == order.tolist()
    assert choice.rows.flatten().tolist() == torch.argsort(order).tolist()
    assert choice.counts.tolist() == torch.bincount(flat, minlength=count).tolist()
    assert choice.ends.tolist() == choice.counts.cumsum(0).tolist()


@settings(max_examples=12)
@given(
    tokens=st.sampled_from([0, 1, 5, 16, 37]),
    count=st.integers(1, 20),
    k=st.integers(1, 6),
    score=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    biased=st.booleans(),
    groups=st.integers(1, 4),
    most=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_choice_and_its_gradient(
    tokens: int, count: int, k: int, score: str, normalize: bool, biased: bool, groups: int, most: int, seed: int
) -> None:
    count, most = count * groups, min(most, groups)
    k = min(k, count // groups * (most or groups))
    # Logits on a coarse grid, exact in every dtype: there are ties, and none is decided by rounding.
    logits = (draw(tokens, count, dtype=torch.float32, seed=seed) * 2).round() / 2
    bias = draw(count, dtype=torch.float32, seed=seed + 1).round() / 4 if biased else None
    softmax = score == "softmax"
    choice = choose(logits, None, k, score=score, normalize=normalize, bias=bias, groups=groups, most=most, lse=softmax)
    exact = logits.cpu().double().requires_grad_()
    wide = None if bias is None else bias.cpu()
    # The choice is compared with one made of the kernel's own scores, which may tie where exact ones do not.
    scores, gates, _ = expect_choice(exact, k, score, normalize, wide)
    wanted = choice.scores.cpu() if wide is None else choice.scores.cpu() + wide
    assert choice.experts.tolist() == [oracle.choose(row, k, groups, most) for row in wanted.tolist()]
    gates = scores.gather(1, choice.experts.cpu().long())
    gates = gates / gates.sum(1, keepdim=True) if normalize else gates
    for got, want in [(choice.scores, scores), (choice.gates, gates), (choice.sums, scores.sum(0))]:
        near(got, want.detach(), 1e-6)
    check_sorted(choice, count)
    d_gates, d_sums = draw(tokens, k, dtype=torch.float32, seed=3), draw(count, dtype=torch.float32, seed=4)
    row_grads = torch.empty(tokens * k, device=DEVICE)
    row_grads[choice.rows.flatten().long()] = d_gates.flatten()
    d_scores = draw(tokens, count, dtype=torch.float32, seed=5)
    got = choose_backward(choice, row_grads, d_sums, torch.float32, score=score, normalize=normalize)
    total = (gates * d_gates.cpu()).sum() + (scores.sum(0) * d_sums.cpu()).sum()
    near(got, torch.autograd.grad(total, exact, retain_graph=True)[0], 2e-6)
    extra: dict[str, Tensor] = {"score_grads": d_scores}
    total = total + (scores * d_scores.cpu()).sum()
    if softmax:
        lse, extra["square_grad"] = exact.logsumexp(-1), torch.tensor(0.7, device=DEVICE)
        assert choice.lse is not None
        assert choice.squares is not None
        near(choice.lse, lse.detach(), 1e-6)
        near(choice.squares, lse.square().sum().detach(), 1e-5)
        total = total + 0.7 * lse.square().sum()
    got = choose_backward(choice, row_grads, d_sums, torch.float32, score=score, normalize=normalize, **extra)
    near(got, torch.autograd.grad(total, exact)[0], 2e-6)


def test_numbers_that_are_not_finite_choose_experts_that_exist() -> None:
    logits = draw(40, 7, dtype=torch.float32, seed=0)
    logits[3], logits[4, 2], logits[5, 1], logits[6] = torch.nan, torch.nan, torch.inf, -torch.inf
    choice = choose(logits, None, 3, score="sigmoid")
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 7 for row in choice.experts.tolist())
    check_sorted(choice, 7)
    for few in (logits, logits[:16].contiguous()):
        check_sorted(choose(few, None, 3), 7)
    limited = choose(logits[:, :6].contiguous(), None, 3, score="sigmoid", groups=3, most=2)
    assert all(len(set(row)) == 3 and len({e // 2 for e in row}) == 2 for row in limited.experts.tolist())
    check_sorted(limited, 6)


@pytest.mark.parametrize(("tokens", "count", "hidden"), [(70, 64, 200), (33, 6, 128)])
def test_logits_are_those_of_float32(tokens: int, count: int, hidden: int) -> None:
    x, centroids = draw(tokens, hidden, dtype=DTYPE, seed=1), draw(count, hidden, dtype=DTYPE, seed=2)
    choice = choose(x, centroids, 4)
    near(choice.scores, torch.softmax(x.cpu().double() @ centroids.cpu().double().T, -1), 1e-5)
    check_sorted(choice, count)


@pytest.mark.parametrize("count", [5, 256, 600])
def test_sums_have_the_product_of_any_number_of_experts(count: int) -> None:
    """That of the router's gradient, beside results of a token: of more than 256 experts, some at a time."""
    tokens, hidden, copies = 19, 40, 2
    results, base = draw(tokens * copies, hidden, dtype=DTYPE, seed=1), draw(tokens, hidden, dtype=DTYPE, seed=2)
    logits, centroids = draw(tokens, count, dtype=DTYPE, seed=3), draw(count, hidden, dtype=DTYPE, seed=4)
    rows = torch.randperm(tokens * copies).view(tokens, copies).to(DEVICE, torch.int32)
    got = triton_rows.combine(results, rows, None, base, logits, centroids)
    want = base.double() + results.double()[rows.long()].sum(1) + logits.double() @ centroids.double()
    near(got, want.cpu(), 5e-3 if ON_GPU else 1e-6)


@pytest.mark.parametrize(("rows", "inner"), [(0, 16), (35, 24), (70, 200)])
def test_swiglu_and_its_gradient(rows: int, inner: int) -> None:
    hidden, d_act = draw(rows, 2 * inner, dtype=DTYPE, seed=1) * 2, draw(rows, inner, dtype=DTYPE, seed=2)
    gates = draw(rows, dtype=torch.float32, seed=3)
    order = torch.randperm(rows).to(DEVICE, torch.int32)
    exact, d_exact = hidden.cpu().double().requires_grad_(), d_act.cpu().double()
    act = torch.nn.functional.silu(exact[:, :inner]) * exact[:, inner:]
    close(triton_rows.swiglu(hidden), act.detach(), DTYPE)
    weights = gates.cpu().double()[order.cpu().long()].requires_grad_()
    d_hidden, weighted, d_gates = triton_rows.swiglu_backward(hidden, d_act, gates, order)
    want = torch.autograd.grad((act * weights[:, None] * d_exact).sum(), (exact, weights))
    close(d_hidden, want[0], DTYPE)
    close(weighted, (act * weights[:, None]).detach(), DTYPE)
    assert d_gates is not None
    close(d_gates, want[1], torch.float32)
    for got, reference in zip(
        triton_rows.swiglu_backward(hidden, d_act), gemms.swiglu_backward(exact.detach(), d_exact), strict=True
    ):
        if got is None or reference is None:
            assert got is reference
        else:
            close(got, reference, DTYPE)


def test_shared_experts_side_by_side_are_one() -> None:
    weight = torch.randn(3, 5, 8)
    wide = side_by_side(weight)
    assert torch.equal(apart(wide, 3), weight)
    assert torch.equal(wide[:, 4:8], weight[1, :, :4])
    assert torch.equal(wide[:, 12:16], weight[0, :, 4:])


@settings(max_examples=8)
@given(
    tokens=st.sampled_from([1, 9, 40]),
    sizes=st.sampled_from([(16, 8, 5, 2), (40, 24, 8, 6), (136, 72, 3, 3)]),
    shared=st.sampled_from([0, 1, 2]),
    score=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    one=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(tokens=40, sizes=(16, 8, 5, 1), shared=1, score="softmax", normalize=False, one=True, seed=0)
def test_layer_is_the_papers(
    tokens: int, sizes: tuple[int, int, int, int], shared: int, score: str, normalize: bool, one: bool, seed: int
) -> None:
    """Output, counts, sums and all gradients; ``one``: every token's first choice is the last expert, which with one
    choice has them all."""
    hidden, inner, count, k = sizes
    draws = [(tokens, hidden), (count, hidden), (count, hidden, 2 * inner), (count, inner, hidden)]
    draws += [(shared, hidden, 2 * inner), (shared, inner, hidden)] if shared else []
    inputs = [
        draw(*s, dtype=torch.float32, seed=seed + i) * s[-2 if len(s) > 2 else -1] ** -0.5 for i, s in enumerate(draws)
    ]
    inputs[0] *= hidden**0.5
    inputs = [t.to(DTYPE).requires_grad_() for t in inputs]
    bias = torch.zeros(count, device=DEVICE)
    bias[-1] = 5.0 * one
    x, centroids, gate_up, down = inputs[:4]
    both = (inputs[4], inputs[5]) if shared else None
    softmax = score == "softmax"
    asked = {"squares": softmax, "scores": softmax}
    options: dict[str, Any] = {"score": score, "normalize": normalize, "bias": bias, **asked}
    out = moe_layer(x, centroids, gate_up, down, both, k, **options)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    scores, gates, experts = expect_choice(exact[0] @ exact[1].T, k, score, normalize, bias.cpu().double())
    rows = []
    for t, token in enumerate(exact[0]):
        parts = [
            g * oracle.ffn(token, exact[2][e], exact[3][e]) for g, e in zip(gates[t], experts[t].tolist(), strict=True)
        ]
        parts += [oracle.ffn(token, exact[4][s], exact[5][s]) for s in range(shared)]
        rows.append(sum(parts, torch.zeros(hidden, dtype=torch.float64)))
    want = torch.stack(rows)
    tolerance = 1.5e-2 if ON_GPU else 3e-6  # bf16: four roundings on the way, 2e-3 to 4e-3 each
    near(out.out, want.detach(), tolerance)
    near(out.sums, scores.sum(0).detach(), 1e-5)
    assert out.counts.tolist() == torch.bincount(experts.flatten(), minlength=count).tolist()
    upstream, on_sums = draw(tokens, hidden, dtype=DTYPE, seed=1), draw(count, dtype=torch.float32, seed=2)
    outputs, upstreams = [out.out, out.sums], [upstream, on_sums]
    total = (want * upstream.cpu().double()).sum() + (scores.sum(0) * on_sums.cpu().double()).sum()
    if softmax:
        assert out.squares is not None
        assert out.scores is not None
        on_scores = draw(tokens, count, dtype=torch.float32, seed=3)
        outputs += [out.squares, out.scores]
        upstreams += [torch.tensor(0.7, device=DEVICE), on_scores]
        total = total + 0.7 * (exact[0] @ exact[1].T).logsumexp(-1).square().sum()
        total = total + (scores * on_scores.cpu().double()).sum()
    got = torch.autograd.grad(outputs, inputs, upstreams)
    for grad, reference in zip(got, torch.autograd.grad(total, exact), strict=True):
        near(grad, reference, 2 * tolerance)


@pytest.mark.parametrize("count", [1, 3])
def test_shared_experts_given_as_one(count: int) -> None:
    """The same bits, and the same gradients, as with weights of their own."""
    shapes = [(9, 16), (5, 16), (5, 16, 16), (5, 8, 16), (count, 16, 16), (count, 8, 16)]
    x, centroids, gate_up, down, shared_up, shared_down = (draw(*s, dtype=DTYPE, seed=i) for i, s in enumerate(shapes))
    pairs = [(shared_up, shared_down), (side_by_side(shared_up), shared_down.flatten(0, 1))]
    outs, grads = [], []
    for pair in pairs:
        inputs = [t.clone().requires_grad_() for t in (x, *pair)]
        outs.append(moe_layer(inputs[0], centroids, gate_up, down, (inputs[1], inputs[2]), 2).out)
        grads.append(torch.autograd.grad(outs[-1].float().sum(), inputs))
    assert torch.equal(*outs)
    (d_x, d_up, d_down), (d_x1, d_up1, d_down1) = grads
    assert torch.equal(d_x, d_x1)
    assert torch.equal(d_up, apart(d_up1, count))
    assert torch.equal(d_down, d_down1.view_as(d_down))


def test_joined_weights_follow_the_parameters() -> None:
    """Joined once; a change of the parameters is seen at once by operations, and in place after joining again; a step
    with gradients has them for the parameters."""
    moe, load = _moe(), MoELoad(4, balance=False)
    x, tokens = draw(4, 16, dtype=DTYPE, seed=1), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    assert moe.join_shared() == moe.shared.gate_up.nbytes
    assert moe.join_shared() == 0
    assert moe._joined is not None
    kept = moe._joined[0]
    for scale in (1.0, 0.5):
        with torch.no_grad():
            moe.shared.gate_up.mul_(scale)
            parted = moe(x, tokens, load)
        moe.join_shared()
        assert moe._joined[0] is kept
        assert torch.equal(kept, side_by_side(moe.shared.gate_up.detach()))
        with torch.inference_mode():
            assert torch.equal(moe(x, tokens, load), parted)
    trained = moe(x, tokens, load)
    assert torch.equal(trained, parted)
    trained.float().sum().backward()
    assert moe.shared.gate_up.grad is not None
    assert "_joined" not in "".join(moe.state_dict())


def _moe() -> MoE:
    """A layer with two shared experts, all of it on this rank and by Triton."""
    table: dict[str, Any] = {
        "model": {
            "vocab": 16, "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "value_dim": 8,
            "context": 64,
        },
        "moe": {"experts": 5, "top_k": 2, "shared_experts": 2, "expert_hidden": 8},
        "train": {"steps": 1, "batch": 1, "sequence": 64, "learning_rate": 1e-3},
    }  # fmt: skip
    recipe = Recipe.model_validate(table)
    moe = MoE(recipe, make_mesh(Placement(1, (0,), (0,), 1)), torch.device(DEVICE))
    moe.products, moe.whole = TritonGemms, True
    moe.to(DEVICE, DTYPE)
    with torch.no_grad():
        for i, parameter in enumerate(moe.parameters()):
            parameter.copy_(draw(*parameter.shape, dtype=DTYPE, seed=i) * 0.2)
    return moe


def test_a_sum_of_everything_has_gradients_too() -> None:
    """Its gradient of the sums is one number seen eight times."""
    shapes = [(5, 16), (8, 16), (8, 16, 16), (8, 8, 16)]
    x, centroids, gate_up, down = (draw(*s, dtype=DTYPE, seed=i).requires_grad_() for i, s in enumerate(shapes))
    ones, grads = torch.ones(8, device=DEVICE), []
    for summed in (True, False):
        out = moe_layer(x, centroids, gate_up, down, None, 2)
        sums = out.sums.sum() if summed else out.sums @ ones
        grads.append(torch.autograd.grad(out.out.float().sum() + 3 * sums, (x, centroids, gate_up, down)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("used", ["out", "sums"])
def test_what_a_loss_leaves_out_counts_for_nothing(used: str) -> None:
    """The gradients of a loss of the output alone, or of the sums, are those of one in which the other is times 0."""
    shapes = [(5, 16), (8, 16), (8, 16, 16), (8, 8, 16)]
    x, centroids, gate_up, down = (draw(*s, dtype=DTYPE, seed=i).requires_grad_() for i, s in enumerate(shapes))
    upstream, on_sums = draw(5, 16, dtype=DTYPE, seed=7), draw(8, dtype=torch.float32, seed=8)
    grads = []
    for alone in (True, False):
        found = moe_layer(x, centroids, gate_up, down, None, 2)
        losses = {"out": (found.out * upstream).float().sum(), "sums": found.sums @ on_sums}
        loss = losses.pop(used)
        loss = loss if alone else loss + 0 * sum(losses.values())
        grads.append(torch.autograd.grad(loss, (x, centroids, gate_up, down)))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert grads[0][1].any()


def test_more_experts_than_the_choice_can_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their logits come from a product before it; the same choice."""
    x, centroids = draw(20, 16, dtype=DTYPE, seed=1), draw(24, 16, dtype=DTYPE, seed=2)
    want = choose(x, centroids, 3)
    monkeypatch.setattr("shoal.kernels.moe.triton_route.MOST", 10)
    got = choose(x, centroids, 3)
    assert torch.equal(got.experts, want.experts)
    torch.testing.assert_close(got.gates, want.gates, rtol=1e-5, atol=1e-6)


def test_no_tokens() -> None:
    shapes = [(0, 16), (4, 16), (4, 16, 16), (4, 8, 16)]
    x, centroids, gate_up, down = (draw(*s, dtype=DTYPE, seed=0).requires_grad_() for s in shapes)
    out = moe_layer(x, centroids, gate_up, down, (gate_up, down), 2)
    assert out.out.shape == (0, 16)
    assert out.counts.tolist() == [0] * 4
    for grad in torch.autograd.grad(out.out.sum() + out.sums.sum(), (x, centroids, gate_up, down)):
        assert not grad.any()


@pytest.mark.parametrize("counts", [[0], [7], [16, 0, 33, 1, 0], [0, 2200, 3]])
def test_tiles_cover_each_row_once_and_no_two_groups(counts: list[int]) -> None:
    size = 16
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    given = [ends.to(DEVICE), None] if len(counts) == 1 else [ends.to(DEVICE)]
    want = [
        (start, end, group)
        for group, (end, count) in enumerate(zip(ends.tolist(), counts, strict=True))
        for start in range(end - count, end, size)
    ]
    for groups in given:
        tiles = tiles_of(groups, sum(counts), size, torch.device(DEVICE))
        assert tiles.count.tolist() == [len(want)]
        assert tiles.table[:, : len(want)].T.tolist() == [list(tile) for tile in want]


@pytest.mark.gpu
def test_a_graph_reads_tiles_of_its_own() -> None:
    """Kept ones of the same rows are given up when many other numbers of rows have come, and their memory is taken."""
    device = torch.device("cuda", torch.cuda.current_device())
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        want = tiles_of(None, 100, 16, device).table.tolist()
    with torch.cuda.graph(graph, stream=stream):
        read = tiles_of(None, 100, 16, device).table.clone()
    with torch.cuda.stream(stream):
        for rows in range(101, 102 + MOST_KEPT):
            tiles_of(None, rows, 16, device)
        taken = [torch.full((3, 7), -7, dtype=torch.int32, device=device) for _ in range(1024)]
        graph.replay()
        assert read.tolist() == want
    assert len(taken) == 1024
