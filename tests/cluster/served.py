"""Engines of a small model, and what one asks them: fixtures for tests of real ranks, with what one rank would say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from small import VOCAB, small_recipe
from trained import STEP, write_weights

from shoal.cluster.engines import Engines
from shoal.cluster.local import RaySession
from shoal.workers.config import Recipe
from shoal.workers.engine.request import Request, Sampling
from shoal.workers.model import Transformer
from shoal.workers.sample import sample


@pytest.fixture(scope="module", name="model")
def model_fixture() -> Transformer:
    return Transformer(Recipe.model_validate(small_recipe(train__dtype="float32"))).eval()


@pytest.fixture(scope="module", name="checkpoints")
def checkpoints_fixture(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    write_weights(model, folder)
    return folder


@pytest.fixture(scope="module", name="requests")
def requests_fixture() -> list[Request]:
    rng = random.Random(3)
    return [
        Request(f"r{i}", tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))), Sampling(20, temperature=0.0))
        for i in range(10)
    ]


@pytest.fixture(scope="module", name="wanted")
def wanted_fixture(model: Transformer, requests: list[Request]) -> list[list[int]]:
    return [sample(model, list(r.prompt), r.sampling.max_tokens, temperature=0.0) for r in requests]


async def ask(engines: Engines, request: Request, seen: Callable[[int], object] = lambda count: None) -> list[int]:
    tokens: list[int] = []
    async with aclosing(engines.generate(request)) as news:
        async for output in news:
            tokens += [token.id for token in output.tokens]
            seen(len(tokens))
    return tokens


def with_engines(
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
