"""Paged attention in the model: any chunking and batching gives the hidden states of one training forward."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import VOCAB, small_recipe

from shoal.kernels.nsa.paged import PagedCache
from shoal.workers.config import Recipe
from shoal.workers.data.batch import IGNORE, PackedBatch
from shoal.workers.engine.cache import PagedAttention, make_caches, reach
from shoal.workers.engine.request import Request, Sampling
from shoal.workers.engine.sequence import Pools, Sequence
from shoal.workers.engine.tables import Part, StepTables
from shoal.workers.model import Transformer
from shoal.workers.model.load import MoELoad

FAR, NEAR = 90, 90

ATTENTION = st.sampled_from(
    [
        {"cmp_block": 8, "cmp_stride": 4, "slc_block": 8, "slc_count": 4, "window": 12},
        {"cmp_block": 4, "cmp_stride": 4, "slc_block": 4, "slc_count": 3, "slc_local": 1, "window": 1},
        {"cmp_block": 8, "cmp_stride": 2, "slc_block": 16, "slc_count": 3, "slc_initial": 0, "window": 5},
        {"cmp_block": 12, "cmp_stride": 4, "slc_block": 12, "slc_count": 9, "window": 100},
        {"kind": "full", "slc_block": 8},
    ]
)


def model_of(attention: dict[str, Any], device: str = "cpu", **changes: Any) -> Transformer:
    table = {**small_recipe(**changes), "attention": attention}
    return Transformer(Recipe.model_validate(table), device=device).eval()


def whole(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """Hidden states of one training forward."""
    ids = torch.tensor(tokens)
    batch = PackedBatch(ids, torch.full_like(ids, IGNORE), torch.arange(len(ids)), (0, len(ids)))
    hidden: torch.Tensor = model(batch.to(next(model.parameters()).device))
    return hidden


class Cached:
    """Computes given sequences part by part; the pages come out of shuffled pools and hold old content."""

    def __init__(self, model: Transformer, texts: list[list[int]], rng: random.Random) -> None:
        recipe = model.recipe
        self.model, self.pools = model, Pools(FAR, NEAR, recipe.attention.slc_block, reach(recipe))
        self.device = next(model.parameters()).device
        for pool in (self.pools.far, self.pools.near):
            rng.shuffle(pool._empty)
        caches = make_caches(recipe, FAR, NEAR, model.dtype, self.device)
        for cache in caches:
            for tensor in vars(cache).values():
                tensor.normal_(generator=torch.Generator(self.device).manual_seed(1))
        layers: list[Any] = [block.attention for block in model.layers]
        self.caches: dict[Any, PagedCache] = dict(zip(layers, caches, strict=True))
        self.sequences = [
            Sequence(Request(str(i), tuple(t), Sampling(max_tokens=1)), self.pools) for i, t in enumerate(texts)
        ]
        self.hidden: list[list[torch.Tensor]] = [[] for _ in texts]

    def compute(self, sizes: dict[int, int]) -> None:
        """``sizes[i]`` more tokens of sequence i."""
        order = sorted(sizes, key=lambda i: sizes[i])
        parts = []
        for i in order:
            s = self.sequences[i]
            s.reserve(s.computed + sizes[i])
            tokens = tuple(s.tokens[s.computed : s.computed + sizes[i]])
            parts.append(Part(tokens, s.computed, np.array(s.far), np.array(s.near), s.near_start))
        tables = StepTables(self.model.recipe, parts, self.model.dtype, self.device)
        batch = PackedBatch(
            tables.tokens, torch.full_like(tables.tokens, IGNORE), tables.positions, (0, len(tables.tokens))
        )
        hidden = self.model(batch, MoELoad(1, balance=False), PagedAttention(tables, self.caches))
        for i, rows in zip(order, hidden.split([sizes[i] for i in order]), strict=True):
            self.hidden[i].append(rows)
            self.sequences[i].advance(sizes[i])


@given(ATTENTION, st.lists(st.integers(1, 64), min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_any_chunking_and_batching(attention: dict[str, Any], lengths: list[int], rng: random.Random) -> None:
    model = model_of(attention)
    texts = [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]
    cached = Cached(model, texts, rng)
    while left := {i: s.remaining for i, s in enumerate(cached.sequences) if s.remaining}:
        chosen = rng.sample(sorted(left), rng.randint(1, len(left)))
        cached.compute({i: rng.choice([1, rng.randint(1, left[i]), left[i]]) for i in chosen})
    for text, rows in zip(texts, cached.hidden, strict=True):
        torch.testing.assert_close(torch.cat(rows), whole(model, text), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("heads", "tile"), [((4, 4), 64), ((4, 1), 200), ((4, 1), 7)])
@torch.no_grad()
def test_gathered_blocks(heads: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long sequence gathers its selected blocks instead of masking dense scores: the same result, in any tiles."""
    monkeypatch.setattr("shoal.kernels.nsa.paged.TILE", tile)
    attention = {"cmp_block": 4, "cmp_stride": 2, "slc_block": 4, "slc_count": 4, "window": 6}
    model = model_of(attention, model__context=1000, model__heads=heads[0], model__kv_heads=heads[1])
    rng = random.Random(1)
    text = [rng.randrange(VOCAB) for _ in range(151)]
    cached = Cached(model, [text], rng)
    for size in (100, 30, 1, 20):
        cached.compute({0: size})
    torch.testing.assert_close(torch.cat(cached.hidden[0]), whole(model, text), rtol=1e-9, atol=1e-9)


@given(ATTENTION, st.integers(17, 60), st.integers(1, 60), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_a_cached_prefix_is_as_good_as_a_computed_one(
    attention: dict[str, Any], length: int, same: int, rng: random.Random
) -> None:
    model = model_of(attention)
    first = [rng.randrange(VOCAB) for _ in range(length)]
    second = [*first[:same], *(rng.randrange(VOCAB) for _ in range(max(1, length - same)))]
    cached = Cached(model, [first, second], rng)
    while left := cached.sequences[0].remaining:
        cached.compute({0: rng.randint(1, left)})
    if rng.random() < 0.5:
        cached.sequences[0].release()  # nobody holds the pages, their content stays
    sequence = cached.sequences[1]
    sequence.adopt_prefix()
    hit = sequence.computed
    page = cached.pools.page
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    assert hit % page == 0 and hit <= min(shared, len(second) - 1)
    while left := sequence.remaining:
        cached.compute({1: rng.randint(1, left)})
    torch.testing.assert_close(torch.cat(cached.hidden[1]), whole(model, second)[hit:], rtol=1e-9, atol=1e-9)
    if shared >= 2 * page and len(second) > 2 * page and attention.get("kind") == "full":
        assert hit >= 2 * page


@torch.no_grad()
def test_rejected_guesses_leave_no_trace() -> None:
    """Tokens computed after a sequence's own, and then not taken over, change nothing of what follows."""
    attention = {"cmp_block": 8, "cmp_stride": 4, "slc_block": 8, "slc_count": 4, "window": 12}
    model, rng = model_of(attention), random.Random(2)
    text = [rng.randrange(VOCAB) for _ in range(50)]
    cached = Cached(model, [text], rng)
    sequence = cached.sequences[0]
    cached.compute({0: 13})
    while sequence.remaining > 4:
        right = list(sequence.tokens)
        at = sequence.computed
        sequence.tokens[at + 1 : at + 4] = [0, 1, 2]
        sequence.reserve(at + 4)
        held = np.array(sequence.far), np.array(sequence.near), sequence.near_start
        part = Part(tuple(sequence.tokens[at : at + 4]), at, *held)
        tables = StepTables(model.recipe, [part], model.dtype, torch.device("cpu"))
        batch = PackedBatch(tables.tokens, tables.tokens, tables.positions, (0, 4))
        hidden = model(batch, MoELoad(1, balance=False), PagedAttention(tables, cached.caches))
        cached.hidden[0].append(hidden[:1])
        sequence.tokens[:] = right
        sequence.advance(1)
    torch.testing.assert_close(torch.cat(cached.hidden[0]), whole(model, text)[:47][: sequence.computed])
