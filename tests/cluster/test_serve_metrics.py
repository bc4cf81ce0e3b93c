"""A service's metrics against a real Ray: what a measured engine did is read where Prometheus would read it."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import pytest
from exported import Series, address_of_metrics, asynchronous, wait_for, wait_for_values
from measured import Restarted, Stepwise, Timetable, ask, looked_at, tokens_of
from small import small_recipe
from trained import STEP, write_weights

from shoal.cluster.engines import Engines
from shoal.cluster.local import RaySession, ray_session
from shoal.cluster.metrics import LOAD_SERIES
from shoal.cluster.serve_metrics import BOUNDS, ENOUGH, ServeMetrics
from shoal.jobs.serve.engines import InProcess
from shoal.jobs.serve.measured import Measured
from shoal.workers.config import Recipe
from shoal.workers.engine.engine import Engine
from shoal.workers.engine.request import Busy, Finish, Limits, Load, Output, Request, Token, Turn
from shoal.workers.errors import ClusterRefused, InvalidInput
from shoal.workers.model import Transformer

MOST = 47  # tokens that an answer to 17 may have in the small model's context
_models = map("model-{}".format, count())


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of the node's metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        with ray_session(1, dashboard=False):
            yield address_of_metrics()


@pytest.fixture
def model() -> str:
    """A name that no other test's series have."""
    return next(_models)


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return Transformer(Recipe.model_validate(small_recipe(train__dtype="float32"))).eval()


@pytest.fixture(scope="module")
def checkpoints(transformer: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    write_weights(transformer, folder)
    return folder


@asynchronous
async def test_durations_are_exported_as_they_were(endpoint: str, model: str) -> None:
    source = Timetable(
        {
            "a": [(0.1, 1, None), (0.02, 1, None), (0.3, 3, None), (0.07, 1, Finish.length)],
            "b": [(2.5, 1, None), (0.7, 1, None), (0.011, 0, Finish.stop)],
            "silent": [(3.0, 0, Finish.stop)],
            "spoilt": [(0.8, 1, None), (0.03, 0, Finish.error)],
            "closed": [(0.4, 1, None), (0.05, 1, None), (9.0, 1, Finish.length)],
            "broken": [(0.6, 1, None), RuntimeError("the engine ended")],
            "refused": [Busy("the queue is full")],
            "slow": [(5000.0, 1, Finish.length)],
        }
    )
    measured = Measured(source, ServeMetrics(model), clock=lambda: source.now)
    for name in ("a", "b", "silent", "slow", "spoilt"):
        await tokens_of(measured, ask(name))
    await tokens_of(measured, ask("closed"), most=2)
    for name, error in (("broken", RuntimeError), ("refused", Busy)):
        with pytest.raises(error):
            await tokens_of(measured, ask(name))
    await measured.close()

    first, each = [0.1, 2.5, 0.4, 0.6, 0.8, 5000.0], [0.02, 0.1, 0.1, 0.1, 0.07, 0.7, 0.05]
    whole = [0.1 + 0.02 + 0.3 + 0.07, 2.5 + 0.7 + 0.011, 3.0, 5000.0]
    expected: Series = {
        "requests_total{finish=length}": 2,
        "requests_total{finish=stop}": 2,
        "requests_total{finish=cancelled}": 1,
        "requests_total{finish=error}": 2,
        "requests_total{finish=refused}": 1,
    }
    for name, seconds in (("ttft_seconds", first), ("tpot_seconds", each), ("request_seconds", whole)):
        expected[f"{name}_sum"] = math.fsum(seconds)
        expected[f"{name}_count"] = expected[f"{name}_bucket{{le=+Inf}}"] = len(seconds)
        for bound in BOUNDS:
            # the clock adds up what the table says, so a duration equal to a bound may come out an ulp above it
            sure = [sum(s < bound * (1 - 1e-9) for s in seconds), sum(s < bound * (1 + 1e-9) for s in seconds)]
            if sure[0] == sure[1]:
                expected[f"{name}_bucket{{le={bound:g}}}"] = sure[0]
    values = await wait_for_values(endpoint, model, expected)
    assert float(f"{BOUNDS[-1]:g}") < 5000
    assert values["ttft_seconds_bucket{le=500}"] == 5
    for name in ("ttft_seconds", "tpot_seconds", "request_seconds"):
        buckets = [values[f"{name}_bucket{{le={le}}}"] for le in [*(f"{b:g}" for b in BOUNDS), "+Inf"]]
        assert all(low <= high for low, high in pairwise(buckets))


@asynchronous
async def test_a_task_that_is_cancelled_counts_as_cancelled(endpoint: str, model: str) -> None:
    class Silent(Timetable):
        async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
            asked.set()
            await asyncio.Event().wait()
            yield Output(request.id)

    asked = asyncio.Event()
    measured = Measured(Silent({}), ServeMetrics(model))
    task = asyncio.create_task(tokens_of(measured, ask("a")))
    await asked.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await measured.close()
    values = await wait_for_values(endpoint, model, {"requests_total{finish=cancelled}": 1, "ttft_seconds_count": 0})
    assert "requests_total{finish=error}" not in values


@asynchronous
async def test_an_answer_that_a_stop_string_ended_counts_as_one(endpoint: str, model: str) -> None:
    """The service closes the stream, as one that was cancelled: it says so before."""
    outputs = Output("a", (Token(1),)), Output("a", (Token(2),))

    class Endless:
        async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
            for output in outputs:
                yield output
            await asyncio.Event().wait()

        async def load(self) -> Load:
            return Load()

    measured = Measured(Endless(), ServeMetrics(model))
    async with aclosing(measured.generate(ask("a"))) as news:
        assert [await anext(news), await anext(news)] == list(outputs)
        measured.stopped("a")
    await measured.close()
    values = await wait_for_values(endpoint, model, {"requests_total{finish=stop}": 1, "request_seconds_count": 1})
    assert "requests_total{finish=cancelled}" not in values


async def seen_at_work(endpoint: str, model: str, engine: Stepwise) -> Series:
    """What is exported while some of the requests are computed and others wait; the engine goes on by a step at a time,
    so that it answers."""
    return await wait_for(
        endpoint,
        model,
        lambda got: got.get("running") == 2 and got["waiting"] and got["pages_used"] and got.get("steps_total"),
        engine.steps.release,
        pause=0.3,
    )


def at_rest(load: Load, told: list[list[int]]) -> Series:
    """What is exported of an engine that has answered all, with ``told``."""
    totals = ("steps", "step_seconds", "prompt_tokens", "cached_tokens", "generated_tokens")
    return {
        **dict.fromkeys(("running", "waiting", "pages_used"), 0),
        "pages": load.pages,
        "pages_cached": load.pages_cached,
        **{f"{name}_total": getattr(load, f"{name}_total") for name in totals},
        "ttft_seconds_count": sum(bool(tokens) for tokens in told),
        "tpot_seconds_count": sum(max(0, len(tokens) - 1) for tokens in told),
    }


@asynchronous
async def test_what_an_engine_does_can_be_read_from_the_node(
    endpoint: str, model: str, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.jobs.serve.measured.EVERY", 0.1)
    engine = Stepwise(transformer, Limits(sequences=2, prefix_cache=True))
    process = InProcess(engine)
    measured = Measured(process, ServeMetrics(model))
    requests = [ask(f"r{i}", prompt=17, max_tokens=MOST) for i in range(5)]
    answers = [asyncio.create_task(tokens_of(measured, request)) for request in requests]

    began = time.monotonic()
    busy = await seen_at_work(endpoint, model, engine)
    assert 1 <= busy["waiting"] <= 3
    assert busy["pages_used"] < busy["pages"]
    assert busy["capacity"] == 2
    engine.let_go()
    answered = await asyncio.gather(*answers)
    assert [len(tokens) for tokens in answered] == [MOST] * 5

    again = await tokens_of(measured, replace(requests[0], id="again"))  # its prompt is in the cache now
    assert again == answered[0]
    stopped = await tokens_of(measured, ask("r0", prompt=17, max_tokens=MOST, stop_tokens=(again[3],)))
    assert stopped == again[: again.index(again[3])]
    cut = await tokens_of(measured, ask("cut", max_tokens=50), most=1)
    with pytest.raises(InvalidInput):
        await tokens_of(measured, ask("long", max_tokens=100))
    load = await measured.load()
    await measured.close()
    await process.close()
    took = time.monotonic() - began

    told = [*answered, again, stopped, cut]
    ended = {"length": 6, "stop": 1, "cancelled": 1, "refused": 1}
    counted = {f"requests_total{{finish={finish}}}": times for finish, times in ended.items()}
    expected = at_rest(load, told) | counted | {"request_seconds_count": 7}
    values = await wait_for_values(endpoint, model, expected)
    assert load.cached_tokens_total >= 16  # two pages of the prompt that was asked again
    prompts = sum(len(r.prompt) for r in requests) + 17 + 17 + 5
    assert values["prompt_tokens_total"] + values["cached_tokens_total"] == prompts
    for name in ("ttft_seconds", "tpot_seconds", "request_seconds"):
        assert 0 < values[f"{name}_sum"] < len(told) * took


@asynchronous
async def test_an_engine_that_dies_shows_as_errors_and_no_capacity(
    endpoint: str, model: str, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doomed(Engine):
        left = 3

        def step(self, turn: Turn | None = None) -> list[Output]:
            if not self.left:
                raise ArithmeticError("the numbers are not finite")
            self.left -= 1
            return super().step(turn)

    monkeypatch.setattr("shoal.jobs.serve.measured.EVERY", 0.1)
    process = InProcess(Doomed(transformer, Limits(sequences=2)))
    measured = Measured(process, ServeMetrics(model))
    await wait_for_values(endpoint, model, {"capacity": 2})
    with pytest.raises(ClusterRefused, match="not finite"):
        await tokens_of(measured, ask("a"))
    await wait_for_values(
        endpoint, model, {"capacity": 0, "running": 0, "tpot_seconds_count": 2, "requests_total{finish=error}": 1}
    )
    await measured.close()


@pytest.mark.parametrize("after", [3, 25], ids=["fewer tokens than before", "more tokens than before"])
@asynchronous
async def test_counters_go_on_when_ranks_are_started_again(endpoint: str, model: str, after: int) -> None:
    engines = Restarted(0, Load(generated_tokens_total=10, preemptions_total=2, steps_total=5))
    metrics = ServeMetrics(model)
    for _ in range(2):  # looked at twice, and counted once
        await looked_at(engines, metrics)
    await wait_for_values(endpoint, model, {"generated_tokens_total": 10, "preemptions_total": 2})
    engines.restarts, engines.now_load = 1, Load(generated_tokens_total=after, preemptions_total=2, steps_total=6)
    await looked_at(engines, metrics)
    engines.now_load = replace(engines.now_load, preemptions_total=3)
    await looked_at(engines, metrics)
    await wait_for_values(
        endpoint,
        model,
        {"generated_tokens_total": 10 + after, "preemptions_total": 5, "steps_total": 11, "restarts_total": 1},
    )


@asynchronous
async def test_a_killed_rank_counts_as_a_restart_and_not_as_an_error(
    endpoint: str, model: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.jobs.serve.measured.EVERY", 0.1)
    recipe = Recipe.model_validate(small_recipe(train__dtype="float32", parallel__ranks=1))
    engines = Engines(recipe, str(checkpoints), STEP, RaySession(None, True, cpus=1, gpus=0))
    await engines.start()
    measured = Measured(engines, ServeMetrics(model))
    try:
        assert len(await tokens_of(measured, ask("a"))) == 8
        await wait_for_values(endpoint, model, {"generated_tokens_total": 8, "running": 0})
        os.kill(engines.pids()[0], signal.SIGKILL)
        await wait_for_values(endpoint, model, {"restarts_total": 1})
        assert len(await tokens_of(measured, ask("b", max_tokens=9))) == 9
        values = await wait_for_values(
            endpoint, model, {"generated_tokens_total": 8 + 9, "restarts_total": 1, "requests_total{finish=length}": 2}
        )
        assert "requests_total{finish=error}" not in values
    finally:
        await measured.close()
        await engines.close()


@asynchronous
async def test_totals_read_while_ranks_are_started_again_are_not_counted_twice(endpoint: str, model: str) -> None:
    class Between(Restarted):
        async def load(self) -> Load:
            self.restarts = 1  # while it was asked
            return self.now_load

    metrics, was, now = ServeMetrics(model), Load(generated_tokens_total=10), Load(generated_tokens_total=4)
    await looked_at(Restarted(0, was), metrics)
    await looked_at(Between(0, now), metrics)
    await looked_at(Restarted(1, now), metrics)
    await wait_for_values(endpoint, model, {"generated_tokens_total": 14, "restarts_total": 1})


@asynchronous
async def test_batches_and_guesses(endpoint: str, model: str) -> None:
    metrics = ServeMetrics(model)
    metrics.count(Load(steps_total=7, prompt_tokens_total=100), 0)
    load = Load(
        steps_total=7 + 20,
        prompt_tokens_total=100 + 300,
        generated_tokens_total=100,
        proposed_tokens_total=90,
        accepted_tokens_total=40,
        rebalances_total=2,
        rank_load=1.25,
    )
    metrics.count(load, 0)
    metrics.show(load)
    await wait_for_values(
        endpoint,
        model,
        {
            "step_tokens": (300 + 100) / 20,
            "step_sequences": (100 - 40) / 20,
            "proposed_tokens_total": 90,
            "accepted_tokens_total": 40,
            "rebalances_total": 2,
            "rank_load": 1.25,
        },
    )
    metrics.count(load, 0)  # no step since
    await wait_for_values(endpoint, model, {"step_tokens": 0, "step_sequences": 0})


@asynchronous
async def test_the_load_of_experts_is_that_of_enough_tokens(endpoint: str, model: str) -> None:
    metrics = ServeMetrics(model)
    metrics.count(Load(expert_tokens=((ENOUGH, 3 * ENOUGH), (2 * ENOUGH, 2 * ENOUGH))), 0)
    expected = {
        "expert_load{layer=0,expert=0}": 0.5,
        "expert_load{layer=0,expert=1}": 1.5,
        "expert_load{layer=1,expert=0}": 1.0,
        "expert_max_load{layer=0}": 1.5,
        "expert_max_load{layer=1}": 1.0,
    }
    await wait_for_values(endpoint, model, expected)
    metrics.count(Load(expert_tokens=((ENOUGH + 5, 3 * ENOUGH), (2 * ENOUGH, 2 * ENOUGH + 5)), steps_total=1), 0)
    await wait_for_values(endpoint, model, {**expected, "steps_total": 1})  # 5 tokens say nothing
    metrics.count(Load(expert_tokens=((2 * ENOUGH, 4 * ENOUGH), (2 * ENOUGH, 4 * ENOUGH)), steps_total=2), 0)
    await wait_for_values(
        endpoint, model, {"expert_load{layer=0,expert=0}": 1.0, "expert_load{layer=1,expert=1}": 2.0, "steps_total": 2}
    )
    metrics.count(Load(expert_tokens=((3 * ENOUGH, 0), (0, 3 * ENOUGH)), steps_total=1), 1)  # started again
    await wait_for_values(endpoint, model, {"expert_load{layer=0,expert=0}": 2.0, "expert_load{layer=1,expert=0}": 0.0})


@asynchronous
async def test_a_model_of_many_experts_does_not_flood_prometheus(endpoint: str, model: str) -> None:
    """The busiest expert is told of every layer, also of those whose experts are not shown one by one."""
    layers, experts = 59, 160
    even = (ENOUGH,) * experts
    uneven = (3 * ENOUGH, 0, 0, *even[3:])
    counts = (even, uneven, *(even,) * (layers - 2))
    ServeMetrics(model).count(Load(expert_tokens=counts), 0)
    shown = {f"expert_load{{layer={layer},expert={e}}}" for layer in range(0, layers, 10) for e in range(experts)}
    busiest = {f"expert_max_load{{layer={layer}}}" for layer in range(layers)}
    values = await wait_for(endpoint, model, lambda got: shown | busiest <= set(got))
    assert {name for name in values if name.startswith("expert_")} == shown | busiest
    assert 3 * experts <= len(shown) <= LOAD_SERIES
    assert values["expert_max_load{layer=1}"] == 3.0


@asynchronous
async def test_outputs_and_load_pass_through_as_they_are(endpoint: str, model: str, transformer: Transformer) -> None:
    bare = InProcess(Engine(transformer, Limits()))
    measured = Measured(bare, ServeMetrics(model))
    clients: list[Callable[[Request], AsyncGenerator[Output, None]]] = [bare.generate, measured.generate]
    one, other = [[output async for output in generate(ask("a", prompt=20))] for generate in clients]
    assert [o._replace(cached=0, tokens=()) for o in one] == [o._replace(cached=0, tokens=()) for o in other]
    assert [t.id for o in one for t in o.tokens] == [t.id for o in other for t in o.tokens]
    assert other[0].cached > one[0].cached == 0
    loads: list[Awaitable[Load]] = [bare.load(), measured.load()]
    assert await loads[0] == await loads[1]
    await measured.close()
    await bare.close()
