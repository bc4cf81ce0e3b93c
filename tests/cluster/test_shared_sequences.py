"""Ranks placed by Ray that share sequences, with experts beside attention and apart from it, train as one rank does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small import small_corpus, small_recipe
from trained import records

from shoal.cluster.local import RaySession, ray_session
from shoal.cluster.supervisor import Supervisor
from shoal.jobs.report import RunReport
from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer

STEPS = 4
SIZES: dict[str, Any] = {
    "model__context": 128, "train__sequence": 128, "train__batch": 2, "train__steps": STEPS, "train__eval_every": STEPS,
    "train__warmup": 1,
}  # fmt: skip
Losses = list[tuple[float, float]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with ray_session(4, dashboard=False) as started:
        yield started


@pytest.fixture(scope="module")
def alone(corpus: Path) -> Callable[[str], tuple[Losses, float]]:
    """Of a kind of attention, loss and gradient norm of each step of one rank, without Ray, and of the validation."""

    def of(kind: str) -> tuple[Losses, float]:
        recipe = Recipe.model_validate(small_recipe(attention__kind=kind, **SIZES))
        trainer = Trainer(recipe, corpus, None, make_mesh(Placement.of(recipe)), torch.device("cpu"))
        steps = [trainer.train_step() for _ in range(STEPS)]
        return [(step["loss"], step["grad_norm"]) for step in steps], trainer.evaluate()["loss"]

    return cache(of)


PLACES: dict[str, dict[str, Any]] = {
    "colocated": {"parallel__ranks": 2},
    "2A:1F": {"parallel__placement": "2A:1F"},
    "2A:2F": {"parallel__placement": "2A:2F"},
}
FAST = ("2A:1F", "nsa")


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        pytest.param(place, kind, marks=() if (place, kind) == FAST else pytest.mark.slow)
        for place in PLACES
        for kind in ("nsa", "full")
    ],
)
def test_actors_that_share_sequences_train_as_one_rank(
    corpus: Path,
    session: RaySession,
    alone: Callable[[str], tuple[Losses, float]],
    tmp_path: Path,
    place: str,
    kind: str,
) -> None:
    tables = small_recipe(attention__kind=kind, parallel__context=2, parallel__threads=1, **SIZES, **PLACES[place])
    recipe = Recipe.model_validate(tables)
    with RunReport(tmp_path, STEPS, Console(quiet=True)) as report:
        assert Supervisor(recipe, corpus, tmp_path, report, session).run().step == STEPS
    steps, validation = alone(kind)
    for (loss, norm), record in zip(steps, records(tmp_path), strict=True):
        assert (record["loss"], record["grad_norm"]) == pytest.approx((loss, norm), rel=1e-9)
    assert records(tmp_path, "eval")[-1]["loss"] == pytest.approx(validation, rel=1e-9)
    found = records(tmp_path, "coverage")
    assert bool(found) == (kind == "nsa")
    for record in found:  # of both ranks; keys came
        assert all(len(shares) == 2 for shares in record["coverage"]) and min(record["gather_bytes"]) > 0
