"""The engine against the plain loop: whatever is batched, cached, guessed, preempted or cancelled, the same tokens."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from small import VOCAB, small_recipe

from shoal.workers.config import Recipe
from shoal.workers.engine.engine import Engine
from shoal.workers.engine.request import Busy, Finish, Limits, Output, Request, Sampling
from shoal.workers.errors import ClusterRefused, InvalidInput
from shoal.workers.model import Transformer
from shoal.workers.sample import sample

CONTEXT = 64


@pytest.fixture(scope="module")
def model() -> Transformer:
    return _model(train__dtype="float32")


@pytest.fixture(scope="module")
def full() -> Transformer:
    return _model(train__dtype="float32", attention__kind="full")


def _model(**changes: Any) -> Transformer:
    return Transformer(Recipe.model_validate(small_recipe(**changes))).eval()


def _run(engine: Engine, cancel: dict[str, int] | None = None) -> dict[str, list[Output]]:
    """Steps to the end; ``cancel``: requests that are cancelled once that many of their tokens are known."""
    news: dict[str, list[Output]] = {}
    while engine.busy:
        for output in engine.step():
            news.setdefault(output.request, []).append(output)
        for name, count in (cancel or {}).items():
            if len(_ids(news.get(name, []))) >= count:
                engine.cancel(name)
    return news


def _ids(outputs: list[Output]) -> list[int]:
    return [token.id for output in outputs for token in output.tokens]


def _nothing_leaked(engine: Engine) -> None:
    assert not engine.scheduler.running and not engine.scheduler.waiting
    for pool in (engine.pools.far, engine.pools.near):
        assert pool.free == pool.size
        assert all(pool.is_free(page) for page in range(pool.size))


class Mix:
    """A random mix of requests: shared and repeated beginnings, all lengths, stop tokens; and an engine's limits."""

    def __init__(self, rng: random.Random) -> None:
        start = [rng.randrange(VOCAB) for _ in range(40)]
        self.requests = [self._request(str(i), start, rng) for i in range(rng.randint(1, 6))]
        self.limits = Limits(
            sequences=rng.choice([1, 2, 8]),
            step=rng.choice([1, 3, 16, 200]),
            pages=rng.choice([0, 8, 9, 14]),  # 8 pages hold one sequence at full context
            speculate=rng.choice([0, 0, 3]),
            prefix_cache=rng.random() < 0.7,
        )
        self.late = rng.sample(self.requests, rng.randint(0, len(self.requests) - 1))

    def _request(self, name: str, start: list[int], rng: random.Random) -> Request:
        prompt = start[: rng.randint(0, 40)] + [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 9]))]
        prompt = prompt or [1]
        most = rng.randint(1, min(15, CONTEXT - len(prompt)))
        stops = tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 40])))
        return Request(name, tuple(prompt), Sampling(most, temperature=0.0, stop_tokens=stops))

    def check(self, model: Transformer, fixed: bool | None = None) -> None:
        engine = Engine(model, self.limits, fixed=fixed)
        for request in self.requests:
            if request not in self.late:
                engine.add(request)
        news: dict[str, list[Output]] = {}
        late = list(self.late)
        while engine.busy or late:
            if late:
                engine.add(late.pop())
            for output in engine.step():
                news.setdefault(output.request, []).append(output)
        for request in self.requests:
            self._same_as_the_loop(model, request, news[request.id])
        _nothing_leaked(engine)

    def _same_as_the_loop(self, model: Transformer, request: Request, outputs: list[Output]) -> None:
        s = request.sampling
        want = sample(model, list(request.prompt), s.max_tokens, temperature=0.0)
        stop = next((i for i, t in enumerate(want) if t in s.stop_tokens), None)
        assert _ids(outputs) == want[:stop], (request, self.limits)
        assert [o.finish for o in outputs if o.finish] == [Finish.length if stop is None else Finish.stop]
        assert outputs[-1].finish


@pytest.mark.parametrize("seed", range(20))
def test_greedy_tokens_are_those_of_the_loop(seed: int, model: Transformer) -> None:
    Mix(random.Random(seed)).check(model)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_tokens_of_full_attention(seed: int, full: Transformer) -> None:
    Mix(random.Random(seed)).check(full)


@pytest.mark.parametrize("seed", range(100, 112))
def test_greedy_tokens_in_steps_of_fixed_shapes(seed: int, model: Transformer, full: Transformer) -> None:
    Mix(random.Random(seed)).check(full if seed % 4 == 0 else model, fixed=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_greedy_tokens_of_1000_mixes(start: int, model: Transformer) -> None:
    for seed in range(start, start + 100):
        Mix(random.Random(1000 + seed)).check(model, fixed=seed % 2 == 0)


@pytest.fixture
def requests() -> list[Request]:
    rng = random.Random(5)
    return [
        Request(str(i), tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))), Sampling(20, seed=i, top_p=0.9))
        for i in range(6)
    ]


@pytest.mark.parametrize(
    "limits", [Limits(sequences=1), Limits(step=5), Limits(speculate=4), Limits(pages=12), Limits(prefix_cache=False)]
)
def test_drawn_tokens_do_not_depend_on_the_batch(limits: Limits, model: Transformer, requests: list[Request]) -> None:
    want, got = (_tokens_of(Engine(model, x), requests) for x in (Limits(), limits))
    assert got == want


def _tokens_of(engine: Engine, requests: list[Request], again: bool = False) -> dict[str, list[int]]:
    for request in requests:
        engine.add(request, again)
    return {name: _ids(outputs) for name, outputs in _run(engine).items()}


def test_a_replay_goes_on_where_it_was(model: Transformer, requests: list[Request]) -> None:
    """An engine that gets what another had generated already reports the rest, and only that."""
    whole = _tokens_of(Engine(model, Limits()), requests)
    again = [Request(r.id, r.prompt, r.sampling, tuple(whole[r.id][: 3 * i])) for i, r in enumerate(requests)]
    rest = _tokens_of(Engine(model, Limits(waiting=1)), again, again=True)
    assert {name: [*whole[name][: 3 * i], *rest[name]] for i, name in enumerate(whole)} == whole


def test_cancelled_requests_free_their_pages(model: Transformer, requests: list[Request]) -> None:
    engine = Engine(model, Limits(sequences=4))
    want = _tokens_of(Engine(model, Limits()), requests)
    for request in requests:
        engine.add(request)
    news = _run(engine, cancel={"0": 3, "2": 1, "5": 0})
    for name in ("1", "3", "4"):
        assert _ids(news[name]) == want[name]
    assert _ids(news["0"]) == want["0"][:3]
    assert not engine.cancel("0")
    _nothing_leaked(engine)


def test_prefixes_are_found_again(model: Transformer) -> None:
    """A second request with the same beginning computes only the rest; what was cached is reported once."""
    engine, prompt = Engine(model, Limits()), tuple(range(2, 42))
    first = _tokens_of(engine, [Request("a", prompt, Sampling(5, temperature=0.0))])
    engine.add(Request("b", prompt, Sampling(5, temperature=0.0)))
    news = _run(engine)["b"]
    assert _ids(news) == first["a"]
    assert [o.cached for o in news] == [32, 0, 0, 0, 0]  # 5 whole pages of 8, of which one token must be computed: 4
    assert engine.load().cached_tokens_total == 32


def test_guesses_save_steps(model: Transformer) -> None:
    """A prompt that the model itself wrote and that repeats is guessed well."""
    text = [7, 8, 9]
    text += sample(model, text, 45, temperature=0.0)
    steps = []
    for guesses in (0, 4):
        engine = Engine(model, Limits(speculate=guesses))
        got = _tokens_of(engine, [Request("a", tuple(text[:24]), Sampling(24, temperature=0.0))])
        assert got["a"] == text[24:48]
        steps.append(engine.load().steps_total)
    load = engine.load()
    assert load.accepted_tokens_total <= load.proposed_tokens_total
    assert steps[1] == steps[0] - load.accepted_tokens_total
    assert load.accepted_tokens_total > 0


@pytest.mark.parametrize(
    ("prompt", "most", "named"),
    [
        ((), 1, "the prompt is empty"),
        (tuple(range(60)), 5, r"60 \+ 5 tokens, more than the model's context of 64"),
        ((1, VOCAB), 1, f"outside 0 … {VOCAB - 1}"),
        ((1, -1), 1, "outside 0"),
    ],
)
def test_impossible_requests_are_refused(prompt: tuple[int, ...], most: int, named: str, model: Transformer) -> None:
    engine = Engine(model, Limits())
    with pytest.raises(InvalidInput, match=named):
        engine.add(Request("a", prompt, Sampling(most)))
    assert not engine.busy


def test_a_full_queue_and_a_used_name_are_refused(model: Transformer) -> None:
    engine = Engine(model, Limits(waiting=2))
    for name in ("a", "b"):
        engine.add(Request(name, (1,), Sampling(1)))
    with pytest.raises(Busy, match="2 requests wait already"):
        engine.add(Request("c", (1,), Sampling(1)))
    with pytest.raises(InvalidInput, match="'a' is in use"):
        engine.add(Request("a", (1,), Sampling(1)))
    assert set(_run(engine)) == {"a", "b"}
    engine.add(Request("a", (1,), Sampling(1)))


def test_too_little_memory_is_refused(model: Transformer) -> None:
    with pytest.raises(ClusterRefused, match=r"fewer than a sequence of model\.context=64 needs"):
        Engine(model, Limits(), memory=1000)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("max_tokens", value) for value in (0, 2**31)],
        *[("temperature", value) for value in (-1, math.nan, math.inf)],
        *[("top_k", value) for value in (-1, 10**400)],
        *[("top_p", value) for value in (0, 1.1)],
        *[("min_p", value) for value in (-0.1, 2)],
        ("seed", 2**64),
        ("logprobs", 21),
    ],
)
def test_absurd_sampling_is_refused(key: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"^{key}="):
        Sampling(**{"max_tokens": 1, key: value})


def test_guesses_take_nothing_from_other_sequences(model: Transformer) -> None:
    """A step has room for 8 tokens, and each of 4 sequences could guess 7: all get on as without guesses, or faster."""
    requests = [Request(str(i), (7, 8, 9, 7, 8, 9 + i), Sampling(24, temperature=0.0)) for i in range(4)]
    steps = []
    for guesses in (0, 7):
        engine = Engine(model, Limits(step=8, speculate=guesses))
        got = _tokens_of(engine, requests)
        steps.append(engine.load().steps_total)
    assert got == _tokens_of(Engine(model, Limits()), requests)
    assert steps[1] <= steps[0]


def test_prompts_are_found_after_other_long_ones() -> None:
    """A long prompt rolls through near pages: it takes its own again, not those at the ends of other prompts."""
    model = _model(train__dtype="float32", model__context=1024)
    engine = Engine(model, Limits(sequences=2, step=32))
    first = Request("a", tuple(range(2, 52)), Sampling(1, temperature=0.0))
    _tokens_of(engine, [first])
    _tokens_of(engine, [Request("b", tuple(i % 290 for i in range(1000)), Sampling(1))])
    engine.add(Request("c", first.prompt, first.sampling))
    assert _run(engine)["c"][0].cached == 48


def test_prompts_asked_twice_are_found_though_the_pools_are_full() -> None:
    """Round after round of fresh prompts, each asked twice: the second time finds the first's pages."""
    engine = Engine(_model(train__dtype="float32", model__context=256), Limits(sequences=4))
    rng = random.Random(8)
    for _ in range(12):
        prompts = [tuple(rng.randrange(VOCAB) for _ in range(200)) for _ in range(5)]
        for _ in range(2):
            news = []
            for i, prompt in enumerate(prompts):
                engine.add(Request(str(i), prompt, Sampling(3, temperature=0.0)))
                news.append(_run(engine)[str(i)][0].cached)
        assert news == [192] * 5
    assert engine.pools.near.free == engine.pools.near.size


def test_cached_tokens_are_those_of_the_prompt(model: Transformer) -> None:
    """A request that is computed again finds its answer's pages too: they are not the prompt's."""
    engine, request = Engine(model, Limits()), Request("a", tuple(range(2, 22)), Sampling(40, temperature=0.0))
    tokens = _tokens_of(engine, [request])["a"]
    engine.add(Request("a", request.prompt, request.sampling, tuple(tokens[:30])), again=True)
    news = _run(engine)["a"]
    assert _ids(news) == tokens[30:]
    assert news[0].cached == 20
    assert engine.load().cached_tokens_total == 20


def test_numbers_that_are_not_finite_end_their_request_alone() -> None:
    """And leave nothing behind in the pages that others use next."""
    model = _model(train__dtype="float32")
    with torch.no_grad():
        model.embedding.weight[5] = torch.nan
    good = [Request(str(i), (7, 8 + i), Sampling(12, temperature=0.0)) for i in range(3)]
    want = _tokens_of(Engine(model, Limits()), good)
    engine = Engine(model, Limits(sequences=4, pages=9))  # few pages: they are used again
    for _ in range(4):
        for request in [*good, Request("bad", (7, 8, *range(20, 40), 5, 9, 9), Sampling(12, seed=3))]:
            engine.add(request)
        news = _run(engine)
        assert [o.finish for o in news.pop("bad")] == [Finish.error]
        assert {name: _ids(outputs) for name, outputs in news.items()} == want
        _nothing_leaked(engine)


def test_the_smallest_blocks() -> None:
    small = {"cmp_block": 1, "cmp_stride": 1, "slc_block": 1, "slc_count": 3, "window": 1}
    model = _model(train__dtype="float32", **{f"attention__{key}": value for key, value in small.items()})
    request = Request("a", (7, 8, 9, 10), Sampling(12, temperature=0.0))
    want = sample(model, list(request.prompt), 12, temperature=0.0)
    assert _tokens_of(Engine(model, Limits(step=3, sequences=2)), [request]) == {"a": want}
