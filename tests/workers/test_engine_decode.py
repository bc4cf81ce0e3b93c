"""Decode steps of fixed shapes: whatever stands in the rows that nobody needs, and however many they are, the same
tokens as without; and nothing that a CUDA graph could not hold. Without a GPU the operations run one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from small import VOCAB, small_recipe
from test_engine_cache import model_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from shoal.kernels.moe.gemms import Gemms
from shoal.workers.config import Recipe
from shoal.workers.engine.cache import make_caches
from shoal.workers.engine.decode import DecodeSteps, capturable
from shoal.workers.engine.engine import Engine
from shoal.workers.engine.request import Limits, Request, Sampling, Shape
from shoal.workers.mesh import Group, Mesh
from shoal.workers.model import Transformer
from shoal.workers.placement import Placement

ATTENTIONS: list[dict[str, Any]] = [
    {"cmp_block": 8, "cmp_stride": 4, "slc_block": 8, "slc_count": 4, "window": 12},
    {"cmp_block": 8, "cmp_stride": 2, "slc_block": 16, "slc_count": 3, "slc_initial": 0, "window": 5},
    {"cmp_block": 1, "cmp_stride": 1, "slc_block": 1, "slc_count": 3, "window": 1},
    {"kind": "full", "slc_block": 8},
]


def tokens_of(engine: Engine, requests: list[Request]) -> dict[str, list[tuple[int, float]]]:
    """All tokens, with their logarithms of probability."""
    for request in requests:
        engine.add(request)
    found: dict[str, list[tuple[int, float]]] = {}
    while engine.busy:
        for output in engine.step():
            found.setdefault(output.request, []).extend((token.id, token.logprob) for token in output.tokens)
    return found


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("speculate", [0, 3])
def test_drawn_tokens_are_the_same(attention: dict[str, Any], speculate: int) -> None:
    """In float64, to the probability of each token: requests that come and end while others go on, and that repeat
    themselves, so that they are guessed, which those of a new model with small embeddings do. Experts are counted
    alike."""
    model, rng = model_of(attention, moe__router="softmax", model__embedding_std=0.0), random.Random(3)
    requests = []
    for i in range(11):
        prompt = tuple(rng.randrange(4) for _ in range(rng.randint(1, 30)))
        how: dict[str, Any] = {"temperature": [0.0, 1.0, 0.2][i % 3], "top_p": [1.0, 0.9][i % 2], "logprobs": 1}
        requests.append(Request(str(i), prompt, Sampling(rng.randint(1, 30), seed=i, **how)))
    limits = Limits(sequences=5, step=24, speculate=speculate, prefix_cache=False)
    plain, fixed = Engine(model, limits, fixed=False), Engine(model, limits, fixed=True)
    want, got = tokens_of(plain, requests), tokens_of(fixed, requests)
    assert plain.decode is None and fixed.decode is not None
    assert {name: [i for i, _ in news] for name, news in got.items()} == {
        name: [i for i, _ in news] for name, news in want.items()
    }
    for name, news in want.items():
        assert [p for _, p in got[name]] == pytest.approx([p for _, p in news], rel=1e-9)
    assert fixed.load().expert_tokens == plain.load().expert_tokens
    assert speculate == 0 or fixed.load().accepted_tokens_total > 0


def test_a_request_without_finite_numbers_ends_alone() -> None:
    """One that is computed beside others, and whose token is that of the rows nobody needs."""
    model = model_of(ATTENTIONS[0])
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan
    good = [Request(str(i), (7, 8 + i), Sampling(12, temperature=0.0)) for i in range(3)]
    want = tokens_of(Engine(model, Limits()), good)
    engine = Engine(model, Limits(), fixed=True)
    got = tokens_of(engine, [*good, Request("bad", (7, 0), Sampling(12))])
    assert got.pop("bad") == []
    assert {name: [i for i, _ in news] for name, news in got.items()} == {
        name: [i for i, _ in news] for name, news in want.items()
    }


@pytest.mark.parametrize("attention", [ATTENTIONS[0], ATTENTIONS[3]])
def test_prompts_that_warm_an_engine_up_leave_no_trace(attention: dict[str, Any]) -> None:
    model, limits = model_of(attention), Limits(sequences=3, step=24)
    engine, fresh = Engine(model, limits), Engine(model, limits)
    engine._warm_prompts()
    assert all(not pages.any() for cache in engine.caches.values() for pages in vars(cache).values())
    assert engine.load() == fresh.load()
    requests = [Request(str(i), tuple(range(i, 9 + i)), Sampling(4, seed=i)) for i in range(2)]
    assert tokens_of(engine, requests) == tokens_of(fresh, requests)


class Unread(Gemms):
    """Products of the right shape that ask no count."""

    def __init__(self, ends: Tensor | None) -> None:
        self.ends = ends

    def rows_by_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rows @ (weight if self.ends is None else weight[0])


class Unsent:
    """An exchange of the right sizes that sends nothing."""

    def __init__(self, group: Group, rows: Tensor, everywhere: bool) -> None:
        self.came = rows.new_empty(group.size * len(rows), *rows.shape[1:]) if everywhere else rows

    def wait(self) -> Tensor:
        return self.came


class Uncrossed:
    """One from some ranks to others."""

    def __init__(self, group: Group, rows: Tensor, senders: list[int], receivers: list[int], each: int) -> None:
        assert len(rows) == (each * len(receivers) if group.index in senders else 0)
        self.came = rows.new_empty(each * len(senders) if group.index in receivers else 0, *rows.shape[1:])

    def wait(self) -> Tensor:
        return self.came


PLACES = [pytest.param("colocated", 1, 0, id="1"), pytest.param("colocated", 2, 0, id="2")]
PLACES += [pytest.param("1A:2F", 3, rank, id=f"{rank} of 1A:2F") for rank in (0, 1)]


@pytest.mark.parametrize(("placement", "ranks", "rank"), PLACES)
@pytest.mark.parametrize("router", ["softmax", "hash"])
@pytest.mark.parametrize("attention", [ATTENTIONS[0], ATTENTIONS[3]])
def test_the_host_reads_no_number(
    attention: dict[str, Any],
    router: str,
    placement: str,
    ranks: int,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed with tensors that have shapes and no numbers, which raise when one of theirs is asked for."""
    monkeypatch.setattr("shoal.workers.gathered.EvenExchange", Unsent)
    monkeypatch.setattr("shoal.workers.gathered.OneWayExchange", Uncrossed)
    top_k = {"softmax": 3, "hash": 1}[router]
    where = {"parallel__ranks": ranks, "parallel__placement": placement}
    recipe = _recipe(attention, moe__router=router, moe__top_k=top_k, **where)
    place, everyone = Placement.of(recipe), Group(tuple(range(ranks)), rank)
    hosts_attention, hosts_experts = (everyone if rank in ranks else None for ranks in (place.attention, place.experts))
    mesh = Mesh(place, rank, everyone, everyone, hosts_attention, hosts_experts, None, None)
    model = Transformer(recipe, mesh, device="meta", draw=False).eval()
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=model.dtype)
                module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
        experts = model.recipe.moe.experts
        blocks: list[Any] = list(model.layers)
        for block in blocks:
            if block.moe is not None:
                block.moe.products, dispatcher = Unread, block.moe.dispatcher
                dispatcher.device = torch.device("cpu")
                hosts = place.experts
                dispatcher.assign([hosts[e * len(hosts) // experts] for e in range(experts)])
        of_layer = {}
        if model.hosts_attention:
            caches = make_caches(model.recipe, 9, 9, model.dtype, torch.device("cpu"))
            of_layer = {block.attention: cache for block, cache in zip(blocks, caches, strict=True)}
        counted = torch.zeros(2, experts, dtype=torch.int64) if hosts_experts else None
        steps = DecodeSteps(model, of_layer, (8, 8), 3, counted, capture=False)
        for shape in steps.shapes():
            with torch.inference_mode():
                computed = steps._compute(shape)
            assert computed.shape == (shape.rows if hosts_attention else 0, VOCAB)


def _recipe(attention: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.model_validate({**small_recipe(**changes), "attention": attention})


def test_shapes_are_few() -> None:
    """Of 64k tokens and 100 requests: rows 1 … 128, three lengths, and steps in which no compressed row ends."""
    attention = {"slc_block": 64, "cmp_block": 32, "cmp_stride": 16, "window": 512}
    model = model_of(attention, model__context=65536)
    steps = DecodeSteps(model, {}, (0, 0), 100, None, capture=False)
    shapes = list(steps.shapes())
    assert len(shapes) == len(set(shapes)) == 3 * (8 + 4)
    assert shapes[0] == Shape(128, 1024, True)
    assert steps.pages == [64, 256, 1024]
    assert not capturable(model)
