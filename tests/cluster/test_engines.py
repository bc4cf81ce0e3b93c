"""Engines over real ranks: any placement gives one rank's tokens, and streams outlive ranks that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import ray
from served import (  # noqa: F401  # fixtures are found by their names
    ask,
    checkpoints_fixture,
    model_fixture,
    requests_fixture,
    wanted_fixture,
    with_engines,
)
from small import small_recipe
from trained import STEP

from shoal.cluster.engines import Engines
from shoal.cluster.local import RaySession
from shoal.workers.engine.actor import EngineActor
from shoal.workers.engine.request import Request, Sampling
from shoal.workers.errors import ClusterRefused, InvalidInput
from shoal.workers.run_store import cached_folder

PLACEMENTS = [
    pytest.param({"parallel__ranks": 1}, id="1", marks=pytest.mark.slow),  # others close streams of one rank
    pytest.param({"parallel__ranks": 2}, id="2", marks=pytest.mark.slow),  # others answer from an object store so
    pytest.param({"parallel__placement": "1A:1F"}, id="1A:1F"),
    pytest.param({"parallel__placement": "2A:2F"}, id="2A:2F", marks=pytest.mark.slow),
    pytest.param({"parallel__placement": "1A:2F", "moe__shared": "dispatched"}, id="1A:2F", marks=pytest.mark.slow),
    pytest.param({"parallel__ranks": 4, "parallel__expert": 2}, id="4 in twos", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", PLACEMENTS)
def test_any_placement_gives_the_tokens_of_the_loop(
    changes: dict[str, Any],
    checkpoints: Path,
    session: RaySession,
    requests: list[Request],
    wanted: list[list[int]],
) -> None:
    async def work(engines: Engines) -> None:
        assert await asyncio.gather(*(ask(engines, r) for r in requests)) == wanted
        load = await engines.load()
        assert load.generated_tokens_total == sum(map(len, wanted))
        assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)
        prompts = sum(len(r.prompt) for r in requests)
        computed = prompts - load.cached_tokens_total + load.generated_tokens_total - len(requests)
        assert [sum(layer) for layer in load.expert_tokens] == [3 * computed] * 2  # top 3, in 2 layers with experts

    with_engines(small_recipe(train__dtype="float32", **changes), checkpoints, session, work)


def test_ranks_fetch_a_run_that_is_in_an_object_store(
    checkpoints: Path, session: RaySession, requests: list[Request], wanted: list[list[int]]
) -> None:
    for name in ("recipe.toml", "run.json"):
        (checkpoints.parent / name).write_text("")

    async def work(engines: Engines) -> None:
        assert await asyncio.gather(*(ask(engines, r) for r in requests)) == wanted

    url = f"file://{checkpoints.parent}"
    with_engines(small_recipe(train__dtype="float32", parallel__ranks=2), url, session, work)
    assert (cached_folder(url) / "checkpoints" / f"step-{STEP}").is_dir(), "by the ranks"


@pytest.mark.parametrize(
    ("placement", "victim", "fixed"),
    [
        ("1A:1F", 0, False),  # as on CPUs; fixed, as GPUs have it, in test_gpu_engines.py too
        pytest.param("1A:1F", 1, True, marks=pytest.mark.slow),
        pytest.param("1A:1F", 1, False, marks=pytest.mark.slow),
        pytest.param("2A:2F", 3, True, marks=pytest.mark.slow),
        pytest.param("colocated", 1, True, marks=pytest.mark.slow),
        pytest.param("colocated", 1, False, marks=pytest.mark.slow),
    ],
)
def test_streams_outlive_a_killed_rank(
    placement: str,
    victim: int,
    fixed: bool,
    checkpoints: Path,
    session: RaySession,
    requests: list[Request],
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL in the middle of all answers: no client sees a wrong, a missing or a repeated token. fixed: decode steps
    have fixed shapes, as in CUDA graphs."""
    if fixed:
        # ranks cannot import this module, so the class must not be found in it
        monkeypatch.setattr("shoal.cluster.engines.EngineActor", type("Fixed", (EngineActor,), {"fixed": True}))

    async def work(engines: Engines) -> None:
        killed: list[int] = []

        def kill(count: int) -> None:
            if count >= 5 and not killed:
                killed.append(pids[victim])
                os.kill(pids[victim], signal.SIGKILL)

        pids = engines.pids()
        asked = [ask(engines, r, kill if r.id == "r4" else lambda count: None) for r in requests]
        assert await asyncio.wait_for(asyncio.gather(*asked), 120) == wanted
        assert killed and engines.restarts == 1
        assert not set(engines.pids()) & set(pids)
        assert await ask(engines, requests[0]) == wanted[0]

    ranks = sum(int(part[:-1]) for part in placement.split(":")) if ":" in placement else 2
    changes = {"parallel__ranks": ranks, "parallel__placement": placement, "train__dtype": "float32"}
    with_engines(small_recipe(**changes), checkpoints, session, work)


def test_an_answer_that_is_whole_is_not_computed_again(
    checkpoints: Path, session: RaySession, requests: list[Request], wanted: list[list[int]]
) -> None:
    """Where ranks die before its client has read the end of it."""

    async def work(engines: Engines) -> None:
        async with aclosing(engines.generate(requests[0])) as news:
            tokens = [token.id for token in (await anext(news)).tokens]
            flight = next(iter(engines.flights.values()), None)
            while flight and len(flight.tokens) < len(wanted[0]):
                await asyncio.sleep(0.01)
            os.kill(engines.pids()[0], signal.SIGKILL)
            while not engines.restarts:
                await asyncio.sleep(0.05)
            assert await ask(engines, requests[1]) == wanted[1]
            load = await engines.load()
            assert load.generated_tokens_total == len(wanted[1])
            assert load.prompt_tokens_total == len(requests[1].prompt)
            async for output in news:
                tokens += [token.id for token in output.tokens]
        assert tokens == wanted[0]

    with_engines(small_recipe(train__dtype="float32"), checkpoints, session, work)


def test_ranks_that_fail_too_often_end_the_streams(
    checkpoints: Path, session: RaySession, requests: list[Request]
) -> None:
    async def work(engines: Engines) -> None:
        pids = engines.pids()

        def kill(count: int) -> None:
            os.kill(pids[0], signal.SIGKILL)

        with pytest.raises(ClusterRefused, match=r"failed 1 times in a row, more than parallel\.max_failures=0"):
            await asyncio.wait_for(ask(engines, requests[0], kill), 60)
        with pytest.raises(ClusterRefused, match="max_failures=0"):
            await ask(engines, requests[1])
        with pytest.raises(ClusterRefused, match="max_failures=0"):
            await engines.load()

    recipe = small_recipe(train__dtype="float32", parallel__max_failures=0)
    with_engines(recipe, checkpoints, session, work)


def test_streams_that_are_closed_leave_nothing_on_the_ranks(
    checkpoints: Path, session: RaySession, requests: list[Request], wanted: list[list[int]]
) -> None:
    """Neither pages nor requests, and the id is free for another one."""

    async def closed(engines: Engines) -> None:
        async with aclosing(engines.generate(requests[0])) as news:
            async for _ in news:
                break
        others = await asyncio.gather(*(ask(engines, r) for r in requests[1:]))
        assert others == wanted[1:]
        load = await engines.load()
        assert (load.running, load.pages_used) == (0, 0)
        assert load.generated_tokens_total < sum(map(len, wanted))
        with pytest.raises(InvalidInput, match="the prompt is empty"):
            await ask(engines, Request("empty", (), Sampling(1)))
        assert await ask(engines, requests[0]) == wanted[0]

    async def closed_at_once(engines: Engines) -> None:
        """A cancel may reach a rank before its request does."""
        for _ in range(5):
            tasks = [asyncio.create_task(ask(engines, r)) for r in requests]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await asyncio.gather(*(ask(engines, r) for r in requests)) == wanted
        load = await engines.load()
        assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)
        assert not engines.flights

    async def work(engines: Engines) -> None:
        await closed(engines)
        await closed_at_once(engines)

    with_engines(small_recipe(train__dtype="float32"), checkpoints, session, work)


def test_closing_ends_the_streams_and_the_ranks(
    checkpoints: Path, session: RaySession, requests: list[Request]
) -> None:
    """Also while the ranks are being started again: nothing of them stays."""

    async def work(engines: Engines) -> None:
        pids = engines.pids()
        streams = [asyncio.create_task(ask(engines, r)) for r in requests]
        await asyncio.sleep(0)
        os.kill(pids[0], signal.SIGKILL)
        while not engines._recovery:
            await asyncio.sleep(0.01)
        late = asyncio.create_task(ask(engines, Request("late", (1,), Sampling(1))))
        await asyncio.sleep(0.3)
        await engines.close()
        for answer in await asyncio.wait_for(asyncio.gather(*streams, late, return_exceptions=True), 60):
            assert isinstance(answer, ClusterRefused) and "were ended" in str(answer)

    with_engines(small_recipe(train__dtype="float32", parallel__ranks=2), checkpoints, session, work)
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}


def test_weights_of_another_model_are_refused(checkpoints: Path, session: RaySession) -> None:
    async def work(engines: Engines) -> None:
        raise AssertionError("the engines started")

    with pytest.raises(InvalidInput, match="checkpoint"):
        with_engines(small_recipe(train__dtype="float32", model__hidden=40), checkpoints, session, work)
