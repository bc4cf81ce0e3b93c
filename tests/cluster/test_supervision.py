"""Ranks are killed with SIGKILL at chosen and at random moments: the run ends with an undisturbed run's bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from exported import address_of_metrics, wait_for_run
from rich.console import Console
from small import small_corpus, small_recipe
from trained import assert_same_bits, events, flip_a_byte, poison, records, state, tensors

from shoal.cluster import supervisor
from shoal.cluster.group import RankGroup, RankLost
from shoal.cluster.local import RaySession, ray_session
from shoal.cluster.supervisor import Outcome, SampleRequest, Supervisor
from shoal.jobs.report import RunReport
from shoal.workers.actor import RankActor
from shoal.workers.checkpoint_files import list_checkpoints
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput, TrainingFailed

STEPS = 12
PLACEMENTS: dict[str, dict[str, Any]] = {
    "colocated": {"parallel__ranks": 2},
    "1A:1F": {"parallel__placement": "1A:1F"},
    "shards": {"parallel__ranks": 2, "parallel__shard_dense": True},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        with ray_session(2, dashboard=False) as started:
            yield started


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an uninterrupted run of a placement; each is trained once."""
    done: dict[str, Path] = {}

    def of(placement: str) -> Path:
        if placement not in done:
            done[placement] = tmp_path_factory.mktemp("undisturbed") / placement.replace(":", "")
            assert _train(placement, corpus, session, done[placement]).step == STEPS
            assert events(done[placement]) == ["dispatch", "checkpoint"]
        return done[placement]

    return of


def _recipe(placement: str, **changes: Any) -> Recipe:
    tables = {"train__dtype": "float32", "train__steps": STEPS, "train__eval_every": 4, **PLACEMENTS[placement]}
    return Recipe.model_validate(small_recipe(**{**tables, **changes}))


def _train(
    placement: str, corpus: Path, session: RaySession, run: Path, sample: bool = False, resumed: bool = False,
    **changes: Any,
) -> Outcome:  # fmt: skip
    recipe = _recipe(placement, **changes)
    run.mkdir(exist_ok=True, parents=True)
    request = SampleRequest([1, 2], 4, {"temperature": 0.0}) if sample else None
    with RunReport(run, recipe.train.steps, Console(quiet=True)) as report:
        return Supervisor(recipe, corpus, run, report, session).run(request, resumed)


class Killer:
    """Makes groups whose ranks are killed right after certain calls to them: ``(method, how many before, rank)``."""

    def __init__(self, *kills: tuple[str, int, int]) -> None:
        self.kills = list(kills)
        self.moment: Callable[[], object] = lambda: None
        killer = self

        class Group(RankGroup):
            def connect(self) -> list[str]:
                self.known = self.pids()
                killer.after("join", self.known)
                return super().connect()

            def call(self, method: str, *arguments: Any) -> list[Any]:
                references = super().call(method, *arguments)
                killer.after(method, getattr(self, "known", []))
                return references

        self.group = Group

    def after(self, method: str, pids: list[int]) -> None:
        if not self.kills or self.kills[0][0] != method:
            return
        _, before, rank = self.kills[0]
        if before:
            self.kills[0] = (method, before - 1, rank)
            return
        self.moment()
        try:
            os.kill(pids[rank], signal.SIGKILL)
        except ProcessLookupError:  # killed before, and the driver has not noticed yet: its successor's turn then
            return
        self.kills.pop(0)


@pytest.mark.parametrize(
    ("placement", "kills"),
    [
        pytest.param("colocated", [("run", 4, 0)], id="colocated"),
        pytest.param("1A:1F", [("run", 4, 0)], id="1A:1F", marks=pytest.mark.slow),
        pytest.param("colocated", [("build", 0, 0), ("run", 3, 1)], id="twice", marks=pytest.mark.slow),
        pytest.param("colocated", [("join", 0, 1), ("save", 0, 0)], id="ends of a run", marks=pytest.mark.slow),
        pytest.param("1A:1F", [("build", 0, 1), ("sample", 0, 1)], id="1A:1F ends", marks=pytest.mark.slow),
        pytest.param("shards", [("run", 3, 1), ("save", 0, 0)], id="dense weights in shards", marks=pytest.mark.slow),
    ],
)
def test_a_run_outlives_its_ranks(
    placement: str,
    kills: list[tuple[str, int, int]],
    corpus: Path,
    session: RaySession,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kills while the ranks join, build, train a step, write the last checkpoint, and write a sample."""
    killer, reference = Killer(*kills), undisturbed(placement)
    monkeypatch.setattr(supervisor, "RankGroup", killer.group)
    outcome = _train(placement, corpus, session, tmp_path / "run", sample=True)
    assert not killer.kills
    assert outcome.step == STEPS
    assert len(outcome.sample) == 4
    assert events(tmp_path / "run").count("recovered") == len(kills)
    said = [record["text"] for record in records(tmp_path / "run", "event") if record["event"] == "dispatch"]
    why = "ranks with experts have no tokens of their own" if placement == "1A:1F" else "ranks are on CPUs"
    assert said == [f"rows for other ranks' experts are exchanged: {why}"]  # once
    assert_same_bits(tmp_path / "run", reference, STEPS)


MOVING: dict[str, Any] = {"parallel__rebalance_every": 6}


class Reader:
    """A report that looks as well, once training is at its end, at what Ray exports of the run."""

    def __init__(self, run: str, report: RunReport) -> None:
        self.run, self.report, self.last = run, report, dict[str, dict[str, Any]]()
        self.values = dict[str, float]()

    def record(self, record: dict[str, Any]) -> None:
        self.report.record(record)
        self.last[record["kind"]] = record
        if record.get("event") == "checkpoint":
            train, load = self.last["train"], self.last["load"]["load"]
            expected = {f"train_{key}": train[key] for key in ("loss", "learning_rate", "grad_norm", "step")}
            expected |= {"expert_imbalance": train["expert_imbalance"], "train_tokens_total": train["tokens"]}
            expected |= {"eval_bits_per_byte": self.last["eval"]["bits_per_byte"], "expert_load{1,7}": load[1][7]}
            self.values = wait_for_run(address_of_metrics(), self.run, expected)

    def rewind(self, step: int) -> None:
        self.report.rewind(step)


@pytest.fixture(scope="module")
def moved(
    corpus: Path, session: RaySession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome, dict[str, float]]:
    """A run whose experts moved, what came of it, and what Ray exported of it at its end."""
    run = tmp_path_factory.mktemp("moved") / "shown"
    run.mkdir()
    recipe = _recipe("colocated", **MOVING)
    with pytest.MonkeyPatch.context() as patch, RunReport(run, STEPS, Console(quiet=True)) as report:
        patch.setattr("shoal.cluster.metrics.REFRESH_SECONDS", 0.3)
        reader = Reader("shown", report)
        outcome = Supervisor(recipe, corpus, run, reader, session).run()
    return run, outcome, reader.values


def test_experts_move_while_a_run_goes_on(
    moved: tuple[Path, Outcome, dict[str, float]], undisturbed: Callable[[str], Path]
) -> None:
    """By what the ranks measured, without a restart."""
    run, outcome, _ = moved
    assert outcome.step == STEPS
    assert events(run) == ["dispatch", "rebalanced", "checkpoint"]
    plan = state(run, STEPS)["expert_plan"]
    assert plan != [[[expert // 4] for expert in range(8)]] * 2
    assert all(sorted(place for (place,) in layer) == [0] * 4 + [1] * 4 for layer in plan)
    for got, want in zip(records(run), records(undisturbed("colocated")), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)


def test_a_run_shows_in_rays_metrics(moved: tuple[Path, Outcome, dict[str, float]]) -> None:
    """The dashboard and Prometheus read what metrics.jsonl says, which has been waited for."""
    _, _, values = moved
    assert values["train_tokens_per_second"] > 0


@pytest.mark.slow
def test_ranks_that_die_as_experts_move_change_nothing(
    corpus: Path, session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One as they move, and one when they have, by the end of the run."""
    _train("colocated", corpus, session, tmp_path / "whole", **MOVING)
    killer = Killer(("place_experts", 0, 1), ("save", 0, 0))
    monkeypatch.setattr(supervisor, "RankGroup", killer.group)
    assert _train("colocated", corpus, session, tmp_path / "killed", **MOVING).step == STEPS
    assert not killer.kills
    assert events(tmp_path / "killed").count("recovered") == 2
    assert_same_bits(tmp_path / "killed", tmp_path / "whole", STEPS)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(
    corpus: Path,
    session: RaySession,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kill comes as soon as the first checkpoint's folder, or draft of one, is to be seen."""
    checkpoints = tmp_path / "run" / "checkpoints"
    seen: list[list[str]] = []

    def being_written() -> None:
        while not (found := [p.name for p in checkpoints.iterdir()]):
            pass
        seen.append(found)

    killer, reference = Killer(("run", 2, 1)), undisturbed("colocated")
    killer.moment = being_written
    monkeypatch.setattr(supervisor, "RankGroup", killer.group)
    monkeypatch.setattr(supervisor, "CALL_SECONDS", 1e-9)  # a step a call
    _train("colocated", corpus, session, tmp_path / "run", checkpoint__every=1, checkpoint__keep=2)
    assert seen
    assert_same_bits(tmp_path / "run", reference, STEPS)
    assert {p.name for p in checkpoints.iterdir()} == {"step-11", f"step-{STEPS}"}  # no half-written one is left


def test_too_many_failures_end_the_run(
    corpus: Path, session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(("join", 0, 0), ("run", 0, 0))
    monkeypatch.setattr(supervisor, "RankGroup", killer.group)
    with pytest.raises(TrainingFailed, match=r"^2 failures in a row.*parallel\.max_failures=1.*rank 0 died.*--resume"):
        _train("colocated", corpus, session, tmp_path / "run", parallel__ranks=1, parallel__max_failures=1)
    assert events(tmp_path / "run") == ["recovered"]
    assert TrainingFailed.exit_code == 1


@pytest.mark.parametrize("hanging", [0, 1])
def test_what_ranks_said_counts_for_more_than_their_deaths_afterwards(
    session: RaySession, monkeypatch: pytest.MonkeyPatch, hanging: int
) -> None:
    """A rank is like one whose GPU is lost, which NCCL's watchdog ends; the other one too, or it hangs."""

    class Failing(RankActor):
        def fail(self) -> None:
            if self.rank > 1 - hanging:
                time.sleep(60)
            raise RuntimeError("nobody put rows")

        def pid(self) -> int:
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

    monkeypatch.setattr("shoal.cluster.group.LINGER", 2.0)
    recipe = Recipe.model_validate(small_recipe(parallel__ranks=2))
    with RankGroup(recipe, session, Failing) as group, pytest.raises(RankLost, match="nobody put rows"):
        references = group.call("fail")
        ray.wait(references, num_returns=2 - hanging, timeout=60)  # a reply on its way is lost with its process
        group.get(references)


def test_a_run_that_waits_for_room_is_stopped_by_a_signal(
    corpus: Path, session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks where two find room: SIGTERM ends the waiting, which would last two minutes."""
    monkeypatch.setattr(supervisor, "QUIET", 0.0)
    said: list[str] = []

    class Stopper:
        def record(self, record: dict[str, Any]) -> None:
            said.append(record["event"])
            if record["event"] == "waiting":
                os.kill(os.getpid(), signal.SIGTERM)

        def rewind(self, step: int) -> None:
            pass

    recipe = Recipe.model_validate(small_recipe(parallel__ranks=4))
    outcome = Supervisor(recipe, corpus, tmp_path / "run", Stopper(), session).run()
    assert outcome.stopped and outcome.step == 0
    assert said == ["waiting", "stopped"]


def test_a_poisoned_weight_stops_the_run(
    corpus: Path, session: RaySession, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    """A NaN in layer 1 of 3: the step and the layer are named, and no later checkpoint is written."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed("colocated"), run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS}")
    poison(run, 10, "layers.1.")
    with pytest.raises(TrainingFailed, match=r"stopped at step 11: the output of layers\.1 is not finite.*step-10 is"):
        _train("colocated", corpus, session, run, parallel__ranks=1)
    assert [info.step for info in list_checkpoints(run / "checkpoints")] == [5, 10]
    assert [record["step"] for record in records(run)] == list(range(1, 11))
    assert events(run)[-1] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e30, 1e200])
def test_a_wild_learning_rate_stops_the_run(rate: float, corpus: Path, session: RaySession, tmp_path: Path) -> None:
    """Weights of 1e30 spoil the next step's loss; of 1e200, themselves (float32): neither is ever a checkpoint."""
    run = tmp_path / "run"
    named = r"stopped at step \d+: .*(layers\.\d|the embedding|the loss).* is not finite.*learning_rate"
    with pytest.raises(TrainingFailed, match=named):
        _train("colocated", corpus, session, run, train__learning_rate=rate, train__warmup=0, checkpoint__every=1)
    for info in list_checkpoints(run / "checkpoints"):
        assert all((abs(t) < float("inf")).all() for t in tensors(run, info.step).values())


def test_a_damaged_checkpoint_is_named_and_skipped(
    corpus: Path, session: RaySession, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed("colocated"), run)
    damaged = flip_a_byte(run, STEPS)
    _train("colocated", corpus, session, run)
    told = [record["text"] for record in records(run, "event") if record["event"] == "damaged"]
    assert len(told) == 1
    assert damaged.name in told[0]
    assert "using step-10" in told[0]
    assert_same_bits(run, undisturbed("colocated"), STEPS)


def test_a_run_whose_checkpoints_are_all_damaged_keeps_its_history(
    corpus: Path, session: RaySession, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed("colocated"), run)
    for info in list_checkpoints(run / "checkpoints"):
        flip_a_byte(run, info.step)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InvalidInput, match=r"checkpoints holds no whole checkpoint \(.*: restore one, or start a new"):
        _train("colocated", corpus, session, run, resumed=True)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_kills_at_random_moments(
    placement: str,
    corpus: Path,
    session: RaySession,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng, reference = random.Random(), undisturbed(placement)
    methods = ["join", "build", "run", "run", "run", "save"]
    for attempt in range(6):
        run = tmp_path / f"run-{attempt}"
        kills = [(rng.choice(methods), rng.randrange(2), rng.randrange(2)) for _ in range(2)]
        kills = [(method, before if method == "run" else 0, rank) for method, before, rank in kills]
        killer = Killer(*kills)
        killer.moment = lambda: time.sleep(rng.uniform(0, 0.3))
        monkeypatch.setattr(supervisor, "RankGroup", killer.group)
        _train(placement, corpus, session, run, parallel__max_failures=10)
        assert_same_bits(run, reference, STEPS)
