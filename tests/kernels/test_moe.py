"""The MoE kernels against the equations of DeepSeekMoE, token by token, in float64."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.moe import (
    balance_loss,
    grouped_ffn,
    hash_route,
    load_fractions,
    oracle,
    route,
    sequence_counts,
    sequence_loss,
)
from shoal.kernels.moe.backend import experts_backend


def weights(experts: int, hidden: int, inner: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).requires_grad_()  # noqa: E731
    return make(experts, hidden, 2 * inner), make(experts, inner, hidden)


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_grouped_ffn_equals_each_expert_alone(counts: list[int], seed: int) -> None:
    gate_up, down = weights(len(counts), 5, 3, seed)
    rows = torch.randn(sum(counts), 5, dtype=torch.float64).requires_grad_()
    out = grouped_ffn(rows, torch.tensor(counts), gate_up, down)
    which = [e for e, n in enumerate(counts) for _ in range(n)]
    want = [oracle.ffn(row, gate_up[e], down[e]) for row, e in zip(rows, which, strict=True)]
    expected = torch.stack(want) if want else rows.new_zeros(0, 5)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (rows, gate_up, down), upstream)
    if want:
        ref = torch.autograd.grad(expected, (rows, gate_up, down), upstream)
        for g, r in zip(got, ref, strict=True):
            torch.testing.assert_close(g, r, rtol=1e-10, atol=1e-12)
    else:
        assert all(not g.any() for g in got)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "megablocks"])
@pytest.mark.parametrize("counts", [[16, 0, 33, 1, 0], [0, 0, 70, 0], [0, 129, 300]])
def test_each_backend_equals_each_expert_alone_in_bf16(counts: list[int], name: str) -> None:
    """Experts without rows, and one with all of them."""
    if name == "megablocks" and not find_spec("megablocks"):
        pytest.skip("make megablocks builds it")
    kind = experts_backend(name, torch.device("cuda"), torch.bfloat16)
    gen = torch.Generator().manual_seed(5)
    shapes = [(sum(counts), 64), (len(counts), 64, 96), (len(counts), 48, 64)]
    inputs = [(torch.randn(*s, generator=gen) * s[-2] ** -0.5).cuda().bfloat16().requires_grad_() for s in shapes]
    upstream = torch.randn(shapes[0], generator=gen).cuda().bfloat16()
    out = grouped_ffn(inputs[0], torch.tensor(counts, device="cuda"), inputs[1], inputs[2], kind)
    got = [out, *torch.autograd.grad(out, inputs, upstream)]
    rows, gate_up, down = exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    which = [e for e, n in enumerate(counts) for _ in range(n)]
    want = torch.stack([oracle.ffn(row, gate_up[e], down[e]) for row, e in zip(rows, which, strict=True)])
    for one, other in zip(got, [want, *torch.autograd.grad(want, exact, upstream.cpu().double())], strict=True):
        assert (one.detach().cpu().double() - other.detach()).norm() <= 1.5e-2 * other.detach().norm()
    for grad in got[2:]:
        assert not any(grad[e].any() for e, n in enumerate(counts) if not n), "an expert without rows has no gradient"


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_route_is_the_papers_gate(top_k: int, normalize: bool, score: str) -> None:
    u = torch.randn(11, 8, dtype=torch.float64)
    centroids = torch.randn(6, 8, dtype=torch.float64)
    gate_up, down = weights(6, 8, 4, 0)
    routing = route(u, centroids, top_k, normalize, score=score)
    mixed = torch.zeros_like(u)
    for t in range(len(u)):
        for gate, e in zip(routing.gates[t], routing.experts[t], strict=True):
            mixed[t] += gate * oracle.ffn(u[t], gate_up[e], down[e]).detach()
    want, scores, counts = oracle.moe_layer(u, centroids, gate_up, down, [], top_k, normalize, score)
    torch.testing.assert_close(mixed, want.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(routing.scores, scores, rtol=1e-12, atol=0)
    assert torch.bincount(routing.experts.flatten(), minlength=6).tolist() == counts.tolist()
    if not normalize and score == "softmax":
        assert torch.all(routing.gates.sum(-1) <= 1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), groups=st.sampled_from([1, 2, 4]), biased=st.booleans(), seed=st.integers(0, 10**6))
def test_choice_by_bias_and_within_few_groups(data: st.DataObject, groups: int, biased: bool, seed: int) -> None:
    """Gates stay the scores themselves, whatever they are chosen by."""
    count = 8
    most = data.draw(st.integers(0, groups))
    top_k = data.draw(st.integers(1, (most or groups) * count // groups))
    gen = torch.Generator().manual_seed(seed)
    u, centroids = (torch.randn(n, 8, generator=gen, dtype=torch.float64) for n in (13, count))
    bias = torch.randn(count, generator=gen) if biased else None
    routing = route(u, centroids, top_k, bias=bias, groups=groups, most=most)
    scores = torch.softmax(u @ centroids.T, -1)
    wanted = scores if bias is None else scores + bias
    assert routing.experts.tolist() == [oracle.choose(row, top_k, groups, most) for row in wanted.tolist()]
    torch.testing.assert_close(routing.gates, scores.gather(1, routing.experts), rtol=1e-12, atol=0)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 12), count=st.integers(1, 6), parts=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_z_loss_is_the_mean_of_squares(tokens: int, count: int, parts: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    u, centroids = (torch.randn(n, 5, generator=gen, dtype=torch.float64).requires_grad_() for n in (tokens, count))
    each = [route(part, centroids, 1, squares=True).squares for part in u.chunk(parts)]
    total = torch.stack([x for x in each if x is not None]).sum() * (0.3 / tokens)
    want = oracle.router_z(u, centroids, 0.3)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
    for got, reference in zip(*(torch.autograd.grad(x, (u, centroids)) for x in (total, want)), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 7), sequences=st.integers(1, 4), top_k=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_sequence_loss_balances_each_sequence(length: int, sequences: int, top_k: int, seed: int) -> None:
    """Parts that hold tokens of several sequences, in any order, add up once they share the counts."""
    gen, tokens = torch.Generator().manual_seed(seed), length * sequences
    scores = torch.softmax(torch.randn(tokens, 6, generator=gen, dtype=torch.float64), -1).requires_grad_()
    experts, owner = scores.topk(top_k).indices, torch.arange(tokens) // length
    parts = torch.randperm(tokens, generator=gen).chunk(2)
    counts = torch.stack([sequence_counts(experts[p], owner[p], sequences, 6) for p in parts]).sum(0)
    fractions = load_fractions(counts)
    total = torch.stack([sequence_loss(scores[p], fractions, owner[p], tokens, 0.3) for p in parts]).sum()
    runs = [range(s * length, (s + 1) * length) for s in range(sequences)]
    want = oracle.sequence_balance(scores, experts, runs, 0.3)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(x, scores)[0] for x in (total, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 20),
    groups=st.sampled_from([1, 2, 4, 8]),
    top_k=st.integers(1, 8),
    parts=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_balance_losses_add_up_over_parts(tokens: int, groups: int, top_k: int, parts: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    scores = torch.softmax(torch.randn(tokens, 8, generator=gen, dtype=torch.float64), -1).requires_grad_()
    counts = torch.bincount(scores.topk(top_k).indices.flatten(), minlength=8)
    fractions = load_fractions(counts)
    total = sum(balance_loss(s.sum(0), fractions, tokens, 0.3, 0.7, groups) for s in scores.chunk(parts))
    want = oracle.expert_balance(scores, counts, top_k, 0.3) + oracle.device_balance(scores, counts, top_k, 0.7, groups)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(torch.as_tensor(x), scores, retain_graph=True)[0] for x in (total, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


def test_balance_losses_of_layers_together_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(4)
    sums = torch.rand(3, 8, generator=generator, dtype=torch.float64).requires_grad_()
    counts = torch.randint(0, 9, (3, 8), generator=generator)
    together = balance_loss(sums, load_fractions(counts), 20, 0.3, 0.7, 4)
    for layer in range(3):
        share = counts[layer].double() * 8 / counts[layer].sum()
        mean = torch.stack([share[e // 2 * 2 : e // 2 * 2 + 2].mean() for e in range(8)])
        weight = (0.3 * share + 0.7 * mean) / 20
        torch.testing.assert_close(together[layer], (sums[layer] * weight).sum(), rtol=1e-12, atol=0)
        grad = torch.autograd.grad(together[layer], sums, retain_graph=True)[0]
        torch.testing.assert_close(grad[layer], weight, rtol=1e-12, atol=0)


def test_even_load_has_fractions_of_one() -> None:
    assert load_fractions(torch.full((16,), 7)).tolist() == [1.0] * 16


def test_hash_route_is_fixed_and_spread() -> None:
    tokens = torch.arange(32000)
    routing = hash_route(tokens, 16, torch.float32)
    assert routing.gates.unique().tolist() == [1.0]
    assert torch.equal(routing.experts, hash_route(tokens.flip(0), 16, torch.float32).experts.flip(0))
    counts = torch.bincount(routing.experts.flatten(), minlength=16)
    assert len(counts) == 16 and counts.min() > 0.8 * 2000 and counts.max() < 1.2 * 2000


def test_all_tokens_to_one_expert_and_none() -> None:
    gate_up, down = weights(4, 5, 3, 1)
    rows = torch.randn(9, 5, dtype=torch.float64)
    out = grouped_ffn(rows, torch.tensor([0, 0, 9, 0]), gate_up, down)
    want = torch.stack([oracle.ffn(r, gate_up[2], down[2]) for r in rows])
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    assert grouped_ffn(rows[:0], torch.zeros(4, dtype=torch.int64), gate_up, down).shape == (0, 5)


def test_unknown_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="score='relu': one of"):
        route(torch.zeros(2, 4), torch.zeros(3, 4), 2, score="relu")
