"""The model: its MoE layer beside transformers', its parameters beside the estimate, documents, loss, samples."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import VOCAB, small_recipe
from torch import Tensor

from shoal.jobs.estimate import estimate
from shoal.jobs.recipe import builtin_recipes, load_recipe
from shoal.kernels.full import full_attention
from shoal.workers.config import Recipe
from shoal.workers.data.batch import IGNORE, PackedBatch
from shoal.workers.errors import InvalidInput
from shoal.workers.mesh import make_mesh
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import MoE, named_views
from shoal.workers.model.load import MoELoad
from shoal.workers.placement import Placement
from shoal.workers.sample import sample

ALONE = {"parallel.ranks": 1, "parallel.expert": 0, "parallel.context": 1, "parallel.placement": "colocated"}


def packed(lengths: list[int], seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    targets = torch.full_like(tokens, IGNORE)
    targets[:-1] = tokens[1:]
    ends = torch.tensor(lengths).cumsum(0)
    targets[ends - 1] = IGNORE
    positions = torch.cat([torch.arange(n) for n in lengths])
    return PackedBatch(tokens, targets, positions, (0, *ends.tolist()))


def small_model(**changes: object) -> Transformer:
    return Transformer(Recipe.model_validate(small_recipe(**changes)))


@pytest.mark.parametrize("shared", ["local", "dispatched"])
def test_the_moe_layer_is_transformers_deepseek_v2(shared: str) -> None:
    """The same weights in DeepseekV2Moe give the same outputs and gradients (its router works in float32)."""
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = pytest.importorskip("transformers").DeepseekV2Config(
        hidden_size=32,
        moe_intermediate_size=16,
        num_experts=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        n_group=None,
        topk_group=None,
    )
    recipe = Recipe.model_validate(small_recipe(train__dtype="float32", moe__shared=shared))
    layer = MoE(recipe, make_mesh(Placement.of(recipe)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    theirs = modeling.DeepseekV2Moe(config)
    stack = layer.experts
    apart = layer.shared if shared == "local" else stack
    first = 0 if shared == "local" else 8
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.centroids)
        theirs.experts.gate_up_proj.copy_(stack.gate_up[:8].transpose(1, 2))
        theirs.experts.down_proj.copy_(stack.down[:8].transpose(1, 2))
        gate, up = apart.gate_up[first : first + 2].chunk(2, dim=-1)
        theirs.shared_experts.gate_proj.weight.copy_(torch.cat(list(gate), 1).T)
        theirs.shared_experts.up_proj.weight.copy_(torch.cat(list(up), 1).T)
        theirs.shared_experts.down_proj.weight.copy_(torch.cat(list(apart.down[first : first + 2]), 0).T)
    x = torch.randn(50, 32, generator=generator)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = layer(mine, torch.zeros(50, dtype=torch.int64), MoELoad(50)), theirs(other[None])[0]
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream)
    want.backward(upstream)
    torch.testing.assert_close(mine.grad, other.grad, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(layer.centroids.grad, theirs.gate.weight.grad, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(
        stack.gate_up.grad[:8].transpose(1, 2),  # type: ignore[index]
        theirs.experts.gate_up_proj.grad,
        rtol=2e-4,
        atol=2e-4,
    )


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_estimate_counts_the_models_parameters(name: str) -> None:
    recipe = load_recipe(name, overrides=ALONE)
    counted = sum(p.numel() for p in Transformer(recipe, device="meta").parameters())
    assert estimate(recipe).parameters.total == counted


def test_triton_is_refused_on_a_cpu() -> None:
    recipe = Recipe.model_validate(small_recipe(attention__backend="triton", parallel__device="auto"))
    with pytest.raises(InvalidInput, match=r"set attention\.backend=.auto."):
        Transformer(recipe)


@pytest.mark.parametrize("kind", ["nsa", "full"])
def test_a_document_does_not_see_its_neighbours(kind: str) -> None:
    model = small_model(attention__kind=kind)
    batch = packed([40, 1, 23, 64])
    hidden = model(batch)
    for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        alone = PackedBatch(
            batch.tokens[start:end], batch.targets[start:end], batch.positions[start:end], (0, end - start)
        )
        torch.testing.assert_close(model(alone), hidden[start:end], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["nsa", "full"])
def test_a_token_does_not_see_later_ones(kind: str) -> None:
    model = small_model(attention__kind=kind)
    batch = packed([64])
    changed = PackedBatch(batch.tokens.clone(), batch.targets, batch.positions, batch.cu_seqlens)
    changed.tokens[40:] = (changed.tokens[40:] + 7) % VOCAB
    before, after = model(batch), model(changed)
    torch.testing.assert_close(before[:40], after[:40], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(before[40:], after[40:])


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_loss_is_the_mean_cross_entropy_of_whole_documents(lengths: list[int], seed: int) -> None:
    model = small_model()
    batch = packed(lengths, seed)
    hidden = model(batch)
    log_probs = torch.log_softmax(model.logits(hidden), -1)
    predicted = batch.targets != IGNORE
    want = -log_probs[predicted].gather(1, batch.targets[predicted][:, None]).sum()
    torch.testing.assert_close(model.loss_sum(hidden, batch.targets), want)
    assert batch.targets_count == sum(n - 1 for n in lengths)


def test_chunked_loss_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small_model(), packed([64, 30])
    model.loss_sum(model(batch), batch.targets).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.setattr("shoal.workers.model.transformer.LOSS_CHUNK", 13)
    model.loss_sum(model(batch), batch.targets).backward()
    chunked = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_layer_computed_again_asks_for_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """First without gradients, then with them: rounding as another kernel does would choose other experts."""
    asked = []

    def full(*arguments: Any) -> Tensor:
        asked.append((torch.is_grad_enabled(), arguments[-1]))
        return full_attention(*arguments)

    monkeypatch.setattr("shoal.workers.model.contexts.full_attention", full)
    model, batch = small_model(attention__kind="full", train__recompute=1), packed([64])
    model.loss_sum(model(batch), batch.targets).backward()
    assert asked == [(False, True), (True, True), (True, True), (True, True)]
    with torch.no_grad():
        model(batch)
    assert asked[4:] == [(False, False)] * 3


def test_what_layers_that_are_computed_again_shared_goes_with_the_step() -> None:
    """Their tables of a batch stay on the GPU otherwise, of every batch."""
    model, batch = small_model(train__recompute=3), packed([64])
    load = MoELoad(64)
    loss, balance = model.loss_sum(model(batch, load), batch.targets), load.loss(model.recipe.balance)
    assert balance is not None
    (loss + balance).backward()
    tokens = weakref.ref(batch.tokens)
    del load, batch, loss, balance
    gc.collect()
    assert tokens() is None


def test_dtypes_and_placements_start_from_the_same_numbers() -> None:
    wide, narrow = small_model(), small_model(train__dtype="float32")
    for (name, p, i), (other, q, j) in zip(named_views(wide), named_views(narrow), strict=True):
        assert name == other
        a, b = (p if i is None else p[i]), (q if j is None else q[j])
        torch.testing.assert_close(a.float(), b, rtol=1e-6, atol=0)


def test_embeddings_begin_wider_than_all_other_weights_but_not_as_a_head() -> None:
    plain, wide, tied = (
        small_model(**{f"model__{key}": value})
        for key, value in (("embedding_std", 0.0), ("embedding_std", 1.0), ("tied_embeddings", True))
    )
    for (name, p), q in zip(plain.named_parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(q, p / 0.05 if name == "embedding.weight" else p, rtol=1e-12, atol=0)
    assert torch.equal(tied.embedding.weight, plain.embedding.weight)


@pytest.mark.parametrize("recipe", builtin_recipes())
def test_a_loss_begins_at_that_of_a_uniform_guess(recipe: str) -> None:
    """ln vocab, and half the variance of logits: hidden states are normed, and the head is as wide as other weights.
    With fewer layers and experts, which this does not depend on."""
    few = {"layers": 1, "dense_layers": 0, "heads": 1, "kv_heads": 1, "head_dim": 8, "value_dim": 0, "dense_hidden": 8}
    sizes = {**{f"model.{key}": value for key, value in few.items()}, **ALONE, "train.dtype": "float32"}
    sizes |= {"model.vocab": 2048, "moe.expert_hidden": 8, "balance.device_groups": 1}
    checked = load_recipe(recipe, overrides=sizes)
    model = Transformer(checked)
    batch = packed([64] * 8)
    with torch.no_grad():
        loss = model.loss_sum(model(batch), batch.targets) / (batch.targets != IGNORE).sum()
    spread = checked.model.init_std**2 * checked.model.hidden
    assert checked.model.embedding_std == 1
    assert float(loss) == pytest.approx(math.log(2048) + spread / 2, abs=4 * (spread / 504) ** 0.5)


def test_names_are_one_for_each_expert() -> None:
    names = [name for name, _, _ in named_views(small_model())]
    assert len(names) == len(set(names))
    assert "layers.1.moe.experts.7.gate_up" in names and "layers.2.moe.shared.1.down" in names
    assert not any(".experts.gate_up" in name for name in names)


def test_greedy_samples_are_the_likeliest_tokens_and_seeds_decide_the_rest() -> None:
    model = small_model()
    prompt = [0, 5, 9]
    greedy = sample(model, prompt, 5, temperature=0)
    tokens = list(prompt)
    for token in greedy:
        ids = torch.tensor(tokens)
        batch = PackedBatch(ids, torch.full_like(ids, IGNORE), torch.arange(len(ids)), (0, len(ids)))
        assert token == int(model.logits(model(batch)[-1:])[0].argmax())
        tokens.append(token)
    assert sample(model, prompt, 12, seed=3) == sample(model, prompt, 12, seed=3)
    assert sample(model, prompt, 12, seed=3) != sample(model, prompt, 12, seed=4)
    assert sample(model, prompt, 12, temperature=1.0, top_k=1, seed=8)[:5] == greedy
    assert len(sample(model, prompt * 20, 20)) == 20  # longer than the context of 64
