"""Engines whose busy experts have copies: real ranks give the same tokens, also while copies move to where users' load
wants them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from served import (  # noqa: F401  # fixtures are found by their names
    ask,
    checkpoints_fixture,
    model_fixture,
    requests_fixture,
    wanted_fixture,
    with_engines,
)
from small import VOCAB, small_recipe
from trained import STEP, write_weights

from shoal.cluster.engines import Engines
from shoal.cluster.expert_copies import place_copies
from shoal.cluster.local import RaySession
from shoal.workers.config import Recipe
from shoal.workers.engine.request import Request, Sampling
from shoal.workers.expert_plan import Homes, Plan
from shoal.workers.model import Transformer
from shoal.workers.sample import sample


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
            assert await asyncio.gather(*(ask(engines, r) for r in requests)) == wanted

        with_engines(recipe, folder, session, work)


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
        assert await asyncio.gather(*(ask(engines, r) for r in requests)) == wanted

    recipe = small_recipe(**limited, **changes, serve__expert_copies=extra)
    with_engines(recipe, tmp_path / "checkpoints", session, work)


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
                assert await asyncio.gather(*(ask(engines, r) for r in again)) == wanted[kind]
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
        assert await asyncio.gather(*(ask(engines, r) for r in kinds[1])) == wanted[1]

    recipe = small_recipe(train__dtype="float32", **changes, serve__expert_copies=1, serve__rebalance_seconds=0.3)
    with_engines(recipe, tmp_path / "checkpoints", session, work)
