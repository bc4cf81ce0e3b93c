"""The engine alone, in this process, over random weights: what batching brings, and NSA beside full attention.

On a CPU ``tiny``'s answers, many at a time, are compared with one request at a time, both with a cache (as
transformers' ``generate`` has one) and by the plain loop, which has none. Then, on a CPU and on a GPU, two models that
differ in nothing but their attention compute a prompt, and generate far into their context, on a GPU in CUDA graphs and
without. For the latter the pages are filled with random numbers: no prompt has to be computed for it, and sequences
choose experts apart from one another, as they do after a prompt of a trained model but not of one at random. Decode of
the same shape by transformers' continuous batching stands beside it (``engine_peer``).
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
REPEATS, STEPS, WARM = 3, 20, 3
PEER_STEPS = 8  # of transformers, which may take a second each
KINDS = ("nsa", "full")
PROMPTS, STEP, PLAIN_STEP = "a prompt", "a decode step", "a decode step, no graph,"
PEER = "transformers, continuous batching"
Figures = dict[tuple[str, int, int], float]
"""Milliseconds, by what took them, the context, and how many sequences there were at once."""
MEMORY = 0.9  # of a GPU's memory that is free once the weights are there


@dataclass(frozen=True)
class Scale:
    """What is measured on a kind of device. at_once: sequences that generate together, by context. step: tokens of a
    chunk of a prompt. memory: bytes that it takes. peer: sequences that transformers generates together, by context; it
    is asked for more and more of them, until they do not fit."""

    recipe: str
    sets: tuple[str, ...]
    at_once: dict[int, tuple[int, ...]]
    step: int
    memory: float = 0
    peer: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """Sequences at once."""
        return max(map(max, self.at_once.values()))


SCALES = {
    "cpu": [
        Scale(
            "tiny", ("attention.slc_count=8", "attention.window=128"),
            at_once={1024: (1, 4), 4096: (1, 4)}, step=512, peer={1024: (1, 4)},
        )
    ],
    # groups of 16 heads share keys and values, as in the NSA paper; its block sizes are the defaults
    "cuda": [
        Scale(
            "deepseekmoe-2b", ("model.heads=32", "model.kv_heads=2", "parallel.device=cuda"),
            at_once={4096: (1, 7, 32), 16384: (1, 7, 32), 65536: (1, 7, 32)}, step=4096,
        ),
        Scale(
            "deepseekmoe-16b", ("model.heads=64", "model.kv_heads=4", "parallel.device=cuda"),
            at_once={4096: (1, 7, 128), 65536: (1, 7)}, step=4096, memory=70e9, peer={4096: (1, 7, 32, 64, 112, 128)},
        ),
    ],
}  # fmt: skip


def run(settings: Settings) -> Iterator[Row]:
    """Milliseconds a token or a step: medians over repeats, and over steps; of a prompt, the second of its length."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # tiny's own number: its operators are too small for more
        yield from _batching(settings)
    yield from _attentions(settings, device)


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
    import torch

    from shoal.workers.machine import free_memory

    for scale in SCALES[device]:
        if scale.memory and free_memory(device) < scale.memory:
            settings.say(f"{scale.recipe}: left out, since it needs {scale.memory / 1e9:.0f} GB")
            continue
        found: dict[str, Figures] = {kind: {} for kind in KINDS}
        try:
            for kind in KINDS:
                _of_kind(settings, device, scale, kind, found[kind])
                gc.collect()
                torch.cuda.empty_cache()  # for the next one's pages, which are what is free
        finally:  # when it is cut off, too
            yield from _beside_full(found, scale, device)
        for context, counts in scale.peer.items():
            yield from _beside_peer(settings, device, scale, context, counts, found["nsa"])


def _beside_full(found: dict[str, Figures], scale: Scale, device: str) -> Iterator[Row]:
    """NSA's figures, beside the same with full attention where that was measured."""
    for key, ms in found["nsa"].items():
        what, context, at_once = key
        tokens = context if what == PROMPTS else at_once
        facts: dict[str, Any] = {"recipe": scale.recipe, "context": context, "at_once": at_once, "device": device}
        other = found["full"].get(key)
        yield time_row(
            f"{what} with NSA", ms, "the same with full attention" * (other is not None), other,
            tokens_per_second=1000 * tokens / ms, **facts,
        )  # fmt: skip


def _beside_peer(
    settings: Settings, device: str, scale: Scale, context: int, counts: tuple[int, ...], ours: Figures
) -> Iterator[Row]:
    """What transformers does, and NSA's steps beside it: as many tokens in batches of the size that suits it best."""
    from shoal.jobs.bench.engine_peer import decode_steps

    steps = (settings.steps or PEER_STEPS, WARM)
    peers = decode_steps(recipe_of(scale, "full"), device, context, counts, *steps, settings.say)
    facts: dict[str, Any] = {"recipe": scale.recipe, "context": context, "device": device}
    for each in peers:
        yield time_row(
            f"{STEP} of {PEER}", each.ms, tokens_per_second=1000 * each.at_once / each.ms, at_once=each.at_once,
            attention=each.attention, transformers=each.version, prompts="alike but for the last token", **facts,
        )  # fmt: skip
    for at_once in scale.at_once[context]:
        ms, fitting = ours.get((STEP, context, at_once)), [each for each in peers if each.at_once <= at_once]
        if ms is None or not fitting:
            continue
        best = min(fitting, key=lambda each: each.ms / each.at_once)
        yield time_row(
            f"{STEP} with NSA", ms, f"{PEER}, {best.at_once} at once", best.ms * at_once / best.at_once,
            tokens_per_second=1000 * at_once / ms, at_once=at_once, **facts,
        )  # fmt: skip


def _of_kind(settings: Settings, device: str, scale: Scale, kind: str, found: Figures) -> None:
    """Adds milliseconds of prompts and of decode steps, by what it is, the context, and how many at once."""
    from shoal.workers.engine.engine import Engine
    from shoal.workers.machine import free_memory

    model = _model(recipe_of(scale, kind), device)
    limits = Limits(sequences=scale.most, step=scale.step, prefix_cache=False)
    engine = Engine(model, limits, int(MEMORY * free_memory(device)) if device == "cuda" else None)
    for context, counts in scale.at_once.items():
        _prompt_ms(engine, context)  # of a new length it may compile
        ms = found[PROMPTS, context, 1] = _prompt_ms(engine, context)
        settings.say(f"{kind}, a prompt of {context}: {ms:.0f} ms, {1000 * context / ms:,.0f} tokens/s")
        _fill(engine)
        for at_once in counts:
            if at_once * engine.pools.pages(context) > engine.pools.far.size:
                settings.say(f"{kind}, {context} tokens, {at_once} at once: more than fits into the memory")
                continue
            ms = found[STEP, context, at_once] = _decode_ms(engine, at_once, context, settings.steps)
            settings.say(f"{kind}, {context} tokens, {at_once} at once: {ms:.2f} ms a step")
            if graphs := engine.decode:
                engine.decode = None
                ms = found[PLAIN_STEP, context, at_once] = _decode_ms(engine, at_once, context, settings.steps)
                engine.decode = graphs
                settings.say(f"{kind}, {context} tokens, {at_once} at once: {ms:.2f} ms a step without a graph")


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


def recipe_of(scale: Scale, kind: str) -> Recipe:
    """The recipe with an attention of ``kind``, for one rank, whatever training would ask for."""
    sets = (f"attention.kind={kind}", f"model.context={max(scale.at_once)}")
    alone = ("parallel.ranks=1", "parallel.expert=0", "parallel.context=1")
    return load_recipe(
        scale.recipe, [*scale.sets, *sets, *alone, "train.batch=1", "train.accumulate=1", "train.sequence=64"]
    )


def _fill(engine: Engine) -> None:
    """Random numbers for all pages, as wide as normed keys and values."""
    for cache in engine.caches.values():
        for tensor in vars(cache).values():
            tensor.normal_()


def _prompt_ms(engine: Engine, context: int) -> float:
    """Milliseconds from a prompt that fills the context to its first token."""
    (request,) = _requests(engine.model.recipe, 1, context - 1, 1, 0)
    engine.add(request)
    began = time.perf_counter()
    while engine.busy:
        engine.step()
    return 1000 * (time.perf_counter() - began)


def _decode_ms(engine: Engine, at_once: int, context: int, steps: int | None) -> float:
    """Median milliseconds of a step of ``at_once`` sequences whose context is nearly full."""
    answer = WARM + (steps or STEPS) + 1
    requests = _requests(engine.model.recipe, at_once, context - answer, answer, 0)
    for request in requests:
        engine.add(request)
        _as_if_computed(engine)
    times = [_timed(engine) for _ in range(answer - 1)]
    for request in requests:
        engine.cancel(request.id)
    return statistics.median(times[WARM:])


def _as_if_computed(engine: Engine) -> None:
    """Gives the sequence that waits the pages of its prompt, and starts it where the prompt ends."""
    sequence = engine.scheduler.waiting.popleft()
    while sequence.remaining > 1:
        count = min(engine.pools.page, sequence.remaining - 1)
        sequence.reserve(sequence.computed + count)
        sequence.advance(count)
    engine.scheduler.running.append(sequence)


def _timed(engine: Engine) -> float:
    """Milliseconds of a step; it ends with tokens on the host, so that nothing is left running on a GPU."""
    began = time.perf_counter()
    engine.step()
    return 1000 * (time.perf_counter() - began)
