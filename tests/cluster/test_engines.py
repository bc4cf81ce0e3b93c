"""Engines over real ranks: any placement gives one rank's tokens, and streams outlive ranks that are killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import ray
from small import VOCAB, small_recipe
from trained import STEP, write_weights

from shoal.cluster.engines import Engines
from shoal.cluster.expert_copies import place_copies
from shoal.cluster.local import RaySession
from shoal.workers.config import Recipe
from shoal.workers.engine.actor import EngineActor
from shoal.workers.engine.request import Request, Sampling
from shoal.workers.errors import ClusterRefused, InvalidInput
from shoal.workers.expert_plan import Homes, Plan
from shoal.workers.model import Transformer
from shoal.workers.run_store import cached_folder
from shoal.workers.sample import sample


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(Recipe.model_validate(small_recipe(train__dtype="float32"))).eval()


@pytest.fixture(scope="module")
def checkpoints(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    write_weights(model, folder)
    return folder


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(3)
    return [
        Request(f"r{i}", tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))), Sampling(20, temperature=0.0))
        for i in range(10)
    ]


@pytest.fixture(scope="module")
def wanted(model: Transformer, requests: list[Request]) -> list[list[int]]:
    return [sample(model, list(r.prompt), r.sampling.max_tokens, temperature=0.0) for r in requests]


async def _ask(engines: Engines, request: Request, seen: Callable[[int], object] = lambda count: None) -> list[int]:
    tokens: list[int] = []
    async with aclosing(engines.generate(request)) as news:
        async for output in news:
            tokens += [token.id for token in output.tokens]
            seen(len(tokens))
    return tokens


def _with_engines(
    recipe: dict[str, Any],
    checkpoints: Path | str,
    session: RaySession,
    work: Callable[[Engines], Coroutine[Any, Any, Any]],
) -> Any:
    async def whole() -> Any:
        engines = Engines(Recipe.model_validate(recipe), str(checkpoints), STEP, session)
        await engines.start()
        try:
            return await work(engines)
        finally:
            await engines.close()

    return asyncio.run(whole())


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
        assert await asyncio.gather(*(_ask(engines, r) for r in requests)) == wanted
        load = await engines.load()
        assert load.generated_tokens_total == sum(map(len, wanted))
        assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)
        prompts = sum(len(r.prompt) for r in requests)
        computed = prompts - load.cached_tokens_total + load.generated_tokens_total - len(requests)
        assert [sum(layer) for layer in load.expert_tokens] == [3 * computed] * 2  # top 3, in 2 layers with experts

    _with_engines(small_recipe(train__dtype="float32", **changes), checkpoints, session, work)


def test_copies_of_busy_experts_give_the_same_tokens(
    model: Transformer,
    checkpoints: Path,
    session: RaySession,
    requests: list[Request],
    wanted: list[list[int]],
    tmp_path: Path,
) -> None:
    load = [[4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 2
    measured = tmp_path / "checkpoints"
    write_weights(model, measured, expert_load=load)
    recipe = small_recipe(train__dtype="float32", parallel__ranks=2, serve__expert_copies=1)

    for folder, first in ((measured, ((0, 1), (0, 1))), (checkpoints, ((0,), (1,)))):  # where it is known who is busy

        async def work(engines: Engines, first: Homes = first) -> None:
            assert engines.experts is not None and engines.experts.plan[0][:2] == first
            assert await asyncio.gather(*(_ask(engines, r) for r in requests)) == wanted

        _with_engines(recipe, folder, session, work)


def test_models_without_experts_have_no_copies_of_them() -> None:
    tables = small_recipe(parallel__ranks=2, serve__expert_copies=1, model__dense_hidden=32)
    recipe = Recipe.model_validate({key: table for key, table in tables.items() if key not in ("moe", "balance")})
    assert Engines(recipe, "", STEP, None)._plan(["a", "a"]) is None  # type: ignore[arg-type]


LIMITED = {"moe__top_k": 2, "route__max_devices": 1, "train__dtype": "float32"}
BUSY = [[9.0, 2.0, 1.0, 1.0, 0.0, 0.0, 3.0, 2.0], [0.0, 0.0, 1.0, 9.0, 1.0, 1.0, 0.0, 0.0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "changes", "extra"),
    [
        pytest.param(4, {"parallel__ranks": 4}, 2, id="groups are copied"),
        pytest.param(2, {"parallel__ranks": 4}, 1, id="ranks share a group"),
        pytest.param(2, {"parallel__placement": "2A:2F"}, 4, id="2A:2F"),
    ],
)
def test_copies_within_a_limit_of_ranks_give_the_same_tokens(
    groups: int, changes: dict[str, Any], extra: int, session: RaySession, requests: list[Request], tmp_path: Path
) -> None:
    limited = {**LIMITED, "balance__device_groups": groups}
    model = Transformer(Recipe.model_validate(small_recipe(**limited))).eval()
    wanted = [sample(model, list(r.prompt), r.sampling.max_tokens, temperature=0.0) for r in requests]
    write_weights(model, tmp_path / "checkpoints", expert_load=BUSY)

    async def work(engines: Engines) -> None:
        assert await asyncio.gather(*(_ask(engines, r) for r in requests)) == wanted

    recipe = small_recipe(**limited, **changes, serve__expert_copies=extra)
    _with_engines(recipe, tmp_path / "checkpoints", session, work)


def test_copies_stand_with_the_groups_that_limit_a_token(model: Transformer, tmp_path: Path) -> None:
    """Four ranks share two groups, or host one of four each: nodes of two ranks."""
    write_weights(model, tmp_path / "checkpoints", expert_load=BUSY)

    def plan(groups: int, extra: int) -> Plan:
        limited = {**LIMITED, "balance__device_groups": groups, "parallel__ranks": 4, "serve__expert_copies": extra}
        recipe = Recipe.model_validate(small_recipe(**limited))
        found = Engines(recipe, str(tmp_path / "checkpoints"), STEP, None)._plan(["a", "b", "a", "b"])  # type: ignore[arg-type]
        assert found is not None
        return found

    for homes in plan(2, 1):
        teams = [{place for own in homes[i : i + 4] for place in own} for i in (0, 4)]
        assert sorted(map(sorted, teams)) == [[0, 2], [1, 3]]
        assert any(len(own) > 1 for own in homes)
    for homes in plan(4, 2):
        assert homes[::2] == homes[1::2]
        assert any(len(own) > 1 for own in homes)


def test_ranks_fetch_a_run_that_is_in_an_object_store(
    checkpoints: Path, session: RaySession, requests: list[Request], wanted: list[list[int]]
) -> None:
    for name in ("recipe.toml", "run.json"):
        (checkpoints.parent / name).write_text("")

    async def work(engines: Engines) -> None:
        assert await asyncio.gather(*(_ask(engines, r) for r in requests)) == wanted

    url = f"file://{checkpoints.parent}"
    _with_engines(small_recipe(train__dtype="float32", parallel__ranks=2), url, session, work)
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
        asked = [_ask(engines, r, kill if r.id == "r4" else lambda count: None) for r in requests]
        assert await asyncio.wait_for(asyncio.gather(*asked), 120) == wanted
        assert killed and engines.restarts == 1
        assert not set(engines.pids()) & set(pids)
        assert await _ask(engines, requests[0]) == wanted[0]

    ranks = sum(int(part[:-1]) for part in placement.split(":")) if ":" in placement else 2
    changes = {"parallel__ranks": ranks, "parallel__placement": placement, "train__dtype": "float32"}
    _with_engines(small_recipe(**changes), checkpoints, session, work)


def test_ranks_that_fail_too_often_end_the_streams(
    checkpoints: Path, session: RaySession, requests: list[Request]
) -> None:
    async def work(engines: Engines) -> None:
        pids = engines.pids()

        def kill(count: int) -> None:
            os.kill(pids[0], signal.SIGKILL)

        with pytest.raises(ClusterRefused, match=r"failed 1 times in a row, more than parallel\.max_failures=0"):
            await asyncio.wait_for(_ask(engines, requests[0], kill), 60)
        with pytest.raises(ClusterRefused, match="max_failures=0"):
            await _ask(engines, requests[1])
        with pytest.raises(ClusterRefused, match="max_failures=0"):
            await engines.load()

    recipe = small_recipe(train__dtype="float32", parallel__max_failures=0)
    _with_engines(recipe, checkpoints, session, work)


def test_streams_that_are_closed_leave_nothing_on_the_ranks(
    checkpoints: Path, session: RaySession, requests: list[Request], wanted: list[list[int]]
) -> None:
    """Neither pages nor requests, and the id is free for another one."""

    async def closed(engines: Engines) -> None:
        async with aclosing(engines.generate(requests[0])) as news:
            async for _ in news:
                break
        others = await asyncio.gather(*(_ask(engines, r) for r in requests[1:]))
        assert others == wanted[1:]
        load = await engines.load()
        assert (load.running, load.pages_used) == (0, 0)
        assert load.generated_tokens_total < sum(map(len, wanted))
        with pytest.raises(InvalidInput, match="the prompt is empty"):
            await _ask(engines, Request("empty", (), Sampling(1)))
        assert await _ask(engines, requests[0]) == wanted[0]

    async def closed_at_once(engines: Engines) -> None:
        """A cancel may reach a rank before its request does."""
        for _ in range(5):
            tasks = [asyncio.create_task(_ask(engines, r)) for r in requests]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await asyncio.gather(*(_ask(engines, r) for r in requests)) == wanted
        load = await engines.load()
        assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)
        assert not engines.flights

    async def work(engines: Engines) -> None:
        await closed(engines)
        await closed_at_once(engines)

    _with_engines(small_recipe(train__dtype="float32"), checkpoints, session, work)


def test_closing_ends_the_streams_and_the_ranks(
    checkpoints: Path, session: RaySession, requests: list[Request]
) -> None:
    """Also while the ranks are being started again: nothing of them stays."""

    async def work(engines: Engines) -> None:
        pids = engines.pids()
        streams = [asyncio.create_task(_ask(engines, r)) for r in requests]
        await asyncio.sleep(0)
        os.kill(pids[0], signal.SIGKILL)
        while not engines._recovery:
            await asyncio.sleep(0.01)
        late = asyncio.create_task(_ask(engines, Request("late", (1,), Sampling(1))))
        await asyncio.sleep(0.3)
        await engines.close()
        for answer in await asyncio.wait_for(asyncio.gather(*streams, late, return_exceptions=True), 60):
            assert isinstance(answer, ClusterRefused) and "were ended" in str(answer)

    _with_engines(small_recipe(train__dtype="float32", parallel__ranks=2), checkpoints, session, work)
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}


def test_weights_of_another_model_are_refused(checkpoints: Path, session: RaySession) -> None:
    async def work(engines: Engines) -> None:
        raise AssertionError("the engines started")

    with pytest.raises(InvalidInput, match="checkpoint"):
        _with_engines(small_recipe(train__dtype="float32", model__hidden=40), checkpoints, session, work)


def _alike(token: int, seed: int) -> list[Request]:
    """Requests full of one token, so that others' experts are busy."""
    rng = random.Random(seed)
    return [
        Request(f"{token}.{i}", (rng.randrange(VOCAB), *(token,) * rng.randint(20, 40)), Sampling(8, temperature=0.0))
        for i in range(6)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parallel__ranks": 2}, id="2"),
        pytest.param({"parallel__placement": "1A:2F", "moe__shared": "dispatched"}, id="1A:2F", marks=pytest.mark.slow),
        pytest.param({"parallel__ranks": 4, "parallel__expert": 2}, id="4 in twos", marks=pytest.mark.slow),
    ],
)
def test_answers_stay_the_same_while_experts_move(
    changes: dict[str, Any],
    session: RaySession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Users ask one thing, then another: a plan is applied for each. A rank that dies takes none of it along."""
    monkeypatch.setattr("shoal.cluster.served_experts.ENOUGH", 10)
    tables = {"train__dtype": "float32", **{k: v for k, v in changes.items() if k.startswith("moe")}}
    model = Transformer(Recipe.model_validate(small_recipe(**tables))).eval()
    write_weights(model, tmp_path / "checkpoints", expert_load=BUSY)
    kinds = [_alike(11, 1), _alike(5, 2)]  # with either's plan, the other's busiest rank has 1.5 of a fair share
    wanted = [[sample(model, list(r.prompt), 8, temperature=0.0) for r in requests] for requests in kinds]

    async def work(engines: Engines) -> None:
        assert engines.experts is not None
        served = engines.experts
        plans = [served.plan]

        async def ask_until_they_move(kind: int) -> None:
            seen = (await engines.load()).rebalances_total
            for i in range(100):
                again = [Request(f"{i}.{r.id}", r.prompt, r.sampling) for r in kinds[kind]]
                assert await asyncio.gather(*(_ask(engines, r) for r in again)) == wanted[kind]
                if (await engines.load()).rebalances_total > seen:
                    plans.append(served.plan)
                    break

        for kind in (0, 1):
            await asyncio.wait_for(ask_until_they_move(kind), 60)
        assert len(plans) == 3 and plans[0] != plans[1] != plans[2], caplog.messages
        load = await engines.load()
        assert 1.0 <= load.rank_load < 2.0
        said = [record.getMessage() for record in caplog.records if "experts moved" in record.getMessage()]
        assert len(said) == load.rebalances_total >= 2

        await asyncio.sleep(1)  # nobody asks, and all is counted
        measured = engines.experts.load
        os.kill(engines.pids()[-1], signal.SIGKILL)
        while not engines.restarts:
            await asyncio.sleep(0.05)
        began, trained = ([place_copies(row, [0, 0], 1) for row in rows] for rows in (measured, BUSY))
        assert engines.experts.plan == tuple(began) != tuple(trained), "they begin with what users asked"
        assert await asyncio.gather(*(_ask(engines, r) for r in kinds[1])) == wanted[1]

    recipe = small_recipe(train__dtype="float32", **changes, serve__expert_copies=1, serve__rebalance_seconds=0.3)
    _with_engines(recipe, tmp_path / "checkpoints", session, work)
