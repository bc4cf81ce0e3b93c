"""The engine alone, in this process, over random weights: what batching brings, and NSA beside full attention.

``tiny``'s answers, many at a time, are compared with one request at a time, both with a cache (as transformers'
``generate`` has one) and by the plain loop, which has none. Then two models that differ in nothing but their attention
generate far into their context. On a GPU these are larger: paper block sizes, 8k and 64k tokens.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shoal.jobs.bench.registry import Settings
from shoal.jobs.bench.result import Row, time_row
from shoal.jobs.recipe import load_recipe
from shoal.workers.config import Recipe
from shoal.workers.engine.request import Limits, Request, Sampling

if TYPE_CHECKING:
    from shoal.workers.engine.engine import Engine
    from shoal.workers.model import Transformer

TARGET = 5.0
PROMPT, ANSWER, AT_ONCE = 64, 64, 16
REPEATS, STEPS = 3, 20
SMALL = ["model.context=4096", "attention.slc_count=8", "attention.window=128"]
LARGE = [
    *("model.layers=8", "model.hidden=2048", "model.heads=64", "model.kv_heads=4", "model.head_dim=128"),
    *("model.dense_hidden=4096", "moe.experts=32", "moe.expert_hidden=512", "attention.cmp_block=32"),
    *("attention.cmp_stride=16", "attention.slc_block=64", "attention.slc_count=16", "attention.window=512"),
    *("parallel.device=cuda", "train.batch=2"),
]
# context, sequences at once
LENGTHS = {"cpu": ((1024, 4), (4096, 4)), "cuda": ((8192, 1), (8192, 16), (65536, 1), (65536, 16))}


def run(settings: Settings) -> list[Row]:
    """Milliseconds a token: medians over repeats, and over steps."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # tiny's own number: its operators are too small for more
    return [*_batching(settings), *_attentions(settings, device)]


def _batching(settings: Settings) -> Iterator[Row]:
    model = _model(load_recipe("tiny", ["parallel.ranks=1"]), "cpu")
    sides: dict[str, list[float]] = {"many": [], "one": [], "plain": []}
    for repeat in range(settings.repeats or REPEATS):
        requests = _requests(model.recipe, AT_ONCE, PROMPT, ANSWER, repeat)
        sides["many"].append(_ms_a_token(model, Limits(sequences=AT_ONCE), requests))
        sides["one"].append(_ms_a_token(model, Limits(sequences=1), requests))
        sides["plain"].append(_plain(model, requests[:2]))
        settings.say(f"{repeat + 1}: " + ", ".join(f"{name} {ms[-1]:.2f} ms a token" for name, ms in sides.items()))
    many, one, plain = (statistics.median(ms) for ms in sides.values())
    facts: dict[str, Any] = {
        "recipe": "tiny",
        "prompt": PROMPT,
        "answer": ANSWER,
        "at_once": AT_ONCE,
        "tokens_per_second": 1000 / many,
    }
    yield time_row("a token, 16 requests at a time", many, "one request at a time, cached", one, TARGET, **facts)
    yield time_row("a token, 16 requests at a time", many, "one request at a time, plain loop", plain, **facts)


def _attentions(settings: Settings, device: str) -> Iterator[Row]:
    steps = settings.steps or STEPS
    for context, at_once in LENGTHS[device]:
        ms = {}
        for kind in ("nsa", "full"):
            sets = [*(SMALL if device == "cpu" else LARGE), f"attention.kind={kind}", f"model.context={context}"]
            model = _model(load_recipe("tiny", [*sets, "parallel.ranks=1"]), device)
            ms[kind] = _far_in(model, at_once, context, steps)
            settings.say(f"{context} tokens, {at_once} at once, {kind}: {ms[kind]:.2f} ms a step")
        facts: dict[str, Any] = {"context": context, "at_once": at_once, "steps": steps, "device": device}
        yield time_row("a decode step with NSA", ms["nsa"], "the same with full attention", ms["full"], **facts)


def _model(recipe: Recipe, device: str) -> Transformer:
    from shoal.workers.model import Transformer

    return Transformer(recipe, device=device).eval()


def _requests(recipe: Recipe, count: int, prompt: int, answer: int, seed: int) -> list[Request]:
    rng, vocab = random.Random(seed), recipe.model.vocab
    return [
        Request(str(i), tuple(rng.randrange(vocab) for _ in range(prompt)), Sampling(answer, seed=i))
        for i in range(count)
    ]


def _ms_a_token(model: Transformer, limits: Limits, requests: list[Request]) -> float:
    """Of all answers, their prompts included."""
    from shoal.workers.engine.engine import Engine

    engine, tokens = Engine(model, limits), 0
    began = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.busy:
        tokens += sum(len(output.tokens) for output in engine.step())
    return 1000 * (time.perf_counter() - began) / tokens


def _plain(model: Transformer, requests: list[Request]) -> float:
    from shoal.workers.sample import sample

    began, tokens = time.perf_counter(), 0
    for request in requests:
        tokens += len(sample(model, list(request.prompt), ANSWER, temperature=1.0, seed=request.sampling.seed))
    return 1000 * (time.perf_counter() - began) / tokens


def _far_in(model: Transformer, at_once: int, context: int, steps: int) -> float:
    """Median milliseconds of a step of ``at_once`` sequences whose context is nearly full."""
    from shoal.workers.engine.engine import Engine

    warm = 3
    engine = Engine(model, Limits(sequences=at_once, step=2048, prefix_cache=False))
    for request in _requests(model.recipe, at_once, context - warm - steps - 1, warm + steps + 1, 0):
        engine.add(request)
    while engine.scheduler.waiting or any(s.remaining > 1 for s in engine.scheduler.running):
        engine.step()
    times = [_timed(engine) for _ in range(warm + steps)]
    return statistics.median(times[warm:])


def _timed(engine: Engine) -> float:
    """Milliseconds of a step; it ends with tokens on the host, so that nothing is left running on a GPU."""
    began = time.perf_counter()
    engine.step()
    return 1000 * (time.perf_counter() - began)
