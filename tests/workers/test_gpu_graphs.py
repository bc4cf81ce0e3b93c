"""On a GPU: decode steps in CUDA graphs give what the same operations give one by one, and follow other steps."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from small import VOCAB
from test_engine_cache import model_of
from test_engine_decode import tokens_of

from shoal.workers.data.batch import PackedBatch
from shoal.workers.engine.cache import PagedAttention
from shoal.workers.engine.decode import DecodeSteps, capturable
from shoal.workers.engine.engine import Engine
from shoal.workers.engine.request import Limits, Request, Sampling
from shoal.workers.engine.sequence import Sequence
from shoal.workers.engine.tables import Part, StepTables
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import MoE
from shoal.workers.model.load import MoELoad

pytestmark = pytest.mark.gpu

SIZES = {
    "model__hidden": 128, "model__heads": 8, "model__kv_heads": 2, "model__head_dim": 64, "model__value_dim": 64,
    "model__context": 4096, "moe__expert_hidden": 64,
}  # fmt: skip
KINDS = ["nsa", "full"]


def _model(kind: str, **changes: Any) -> Transformer:
    attention = {"kind": kind, "cmp_block": 32, "cmp_stride": 16, "slc_block": 64, "slc_count": 4, "window": 100}
    model = model_of(attention, "cuda", train__dtype="bfloat16", parallel__device="cuda", **SIZES, **changes)
    if not capturable(model):
        pytest.skip("graphs of experts need a Hopper GPU")
    return model


def _one_by_one(engine: Engine) -> DecodeSteps:
    """The steps of an engine, without graphs."""
    d = engine.decode
    assert d is not None
    return DecodeSteps(d.model, d.caches, d.scratch, d.rows[-1], d.experts, capture=False)


def _filled(model: Transformer, **limits: Any) -> Engine:
    engine = Engine(model, Limits(sequences=16, **limits))
    for cache in engine.caches.values():
        for tensor in vars(cache).values():
            tensor.normal_(generator=torch.Generator("cuda").manual_seed(1))
    return engine


def _parts(engine: Engine, starts: list[int], rng: random.Random) -> list[Part]:
    """One token a part, at ``starts``, each of a sequence of its own."""
    parts = []
    for i, start in enumerate(starts):
        request = Request(str(i), tuple(rng.randrange(VOCAB) for _ in range(start + 1)), Sampling(1))
        sequence = Sequence(request, engine.pools)
        while sequence.remaining > 1:
            count = min(64, sequence.remaining - 1)
            sequence.reserve(sequence.computed + count)
            sequence.advance(count)
        sequence.reserve(start + 1)
        near = np.fromiter(sequence.near, np.int64)
        parts.append(Part((request.prompt[-1],), start, sequence.far.array, near, sequence.near_start))
    return parts


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_graph_gives_the_bits_of_its_operations(kind: str) -> None:
    """And a second replay with other rows gives theirs: nothing of the first is left in it."""
    engine = _filled(_model(kind))
    assert engine.decode is not None and engine.decode.capture
    plain, rng = _one_by_one(engine), random.Random(0)
    for starts in ([5], [4000], [15, 700, 31], [0, 63, 64, 2047, 3999], [*range(100, 1700, 100)], [1023]):
        parts = _parts(engine, starts, rng)
        want = plain.logits(parts).clone()
        got = engine.decode.logits(parts)
        assert not got.isnan().any()
        assert torch.equal(got, want), starts


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_graph_follows_steps_of_any_shape(kind: str) -> None:
    """Padded rows and room for more pages change the rounding, and nothing else: hence the median over rows, since
    rounding may swap two equally good experts or blocks."""
    engine = _filled(_model(kind))
    assert engine.decode is not None
    parts = _parts(engine, [7, 100, 555, 1023, 2000, 3000, 31, 79, 2222, 17, 4000], random.Random(1))
    got = engine.decode.logits(parts).double()
    tables = StepTables(engine.model.recipe, parts, engine.model.dtype, engine.device)
    batch = PackedBatch(tables.tokens, tables.tokens, tables.positions, (0, len(parts)))
    hidden = engine.model(batch, MoELoad(1, balance=False), PagedAttention(tables, engine.caches))
    want = engine.model.logits(hidden).double()
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speculate", [0, 3])
def test_mixes_of_requests(kind: str, speculate: int) -> None:
    """Batches that grow and shrink while requests begin and end: the tokens of the same steps without graphs."""
    model, rng = _model(kind), random.Random(2)
    requests = []
    for i in range(20):
        prompt = tuple(rng.randrange(6) for _ in range(rng.choice([1, 5, 90, 300])))
        how: dict[str, Any] = {"temperature": [0.0, 1.0][i % 2], "top_p": [1.0, 0.9, 0.8][i % 3]}
        requests.append(Request(str(i), prompt, Sampling(rng.randint(1, 60), seed=i, **how)))
    limits = Limits(sequences=9, step=64, speculate=speculate)
    graphs, plain = Engine(model, limits), Engine(model, limits)
    plain.decode = _one_by_one(plain)
    want = tokens_of(plain, requests)
    got = tokens_of(graphs, requests)
    assert {name: [i for i, _ in news] for name, news in got.items()} == {
        name: [i for i, _ in news] for name, news in want.items()
    }
    assert graphs.decode is not None and len(graphs.decode.graphs) > 3
    assert graphs.load().expert_tokens == plain.load().expert_tokens


def test_a_graph_follows_weights_that_were_loaded_anew() -> None:
    """Those of the shared experts, which graphs read from a copy."""
    model = _model("nsa", moe__router="softmax")
    engine, moes = _filled(model), [block.moe for block in model.layers if isinstance(block.moe, MoE)]
    parts = _parts(engine, [5, 700], random.Random(3))
    assert engine.decode is not None
    assert all(moe._joined is not None for moe in moes)
    with torch.inference_mode():
        before = engine.decode.logits(parts).clone()
    with torch.no_grad():
        for moe in moes:
            moe.shared.gate_up.mul_(-1)
    model.join_shared()
    with torch.inference_mode():
        got = engine.decode.logits(parts).clone()
        kept = [moe._joined for moe in moes]
        for moe in moes:
            moe._joined = None
        want = _one_by_one(engine).logits(parts)
    assert len(kept) == len(moes) > 0
    assert torch.equal(got, want)
    assert not torch.equal(got, before)


def test_all_graphs_are_made_before_the_first_request() -> None:
    engine = Engine(_model("nsa"), Limits(sequences=4))
    engine.warm_up()
    assert engine.decode is not None
    made = dict(engine.decode.graphs)
    assert set(made) == set(engine.decode.shapes())
    tokens_of(engine, [Request(str(i), tuple(range(2, 40)), Sampling(40, seed=i)) for i in range(6)])
    assert engine.decode.graphs == made
    assert sum(map(sum, engine.load().expert_tokens)) > 0


def _variants() -> dict[str, int]:
    """How many of each kernel Triton has compiled."""
    from triton.runtime import JITFunction

    modules = [m for name, m in sys.modules.items() if name.startswith("shoal.kernels.")]
    kernels = [x for m in modules for x in vars(m).values() if isinstance(x, JITFunction)]
    return {f"{k.module}.{k.__name__}": sum(len(c[0]) for c in k.device_caches.values()) for k in kernels}


def test_no_request_waits_for_a_compiler() -> None:
    """Prompts of many lengths, together and beside others that go on, after warming up."""
    engine, rng = Engine(_model("nsa", moe__router="softmax"), Limits(sequences=4, step=512)), random.Random(5)
    engine.warm_up()
    before = _variants()
    assert sum(before.values()) > 10
    requests = []
    for i in range(24):
        prompt = tuple(
            rng.randrange(VOCAB) for _ in range(rng.choice([1, 9, 30, 100, 513, 1500, 3900]) + rng.randrange(9))
        )
        requests.append(Request(str(i), prompt, Sampling(rng.randint(1, 20), seed=i)))
    tokens_of(engine, requests)
    assert _variants() == before
