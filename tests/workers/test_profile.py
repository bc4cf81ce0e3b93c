"""Traces of training steps, as real ranks write them: what they say of a step; what is computed is the same."""

from __future__ import annotations

import gzip
import json
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import small_corpus, small_recipe

from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement
from shoal.workers.records import PARTS
from shoal.workers.trainer import Trainer

STEPS = 4
FEW = {"train__batch": 2, "train__sequence": 32}  # tokens, and so operators
Event = dict[str, Any]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def _trainer(tables: dict[str, Any], corpus: str, run: Path, rank: int) -> Trainer:
    recipe = Recipe.model_validate(tables)
    mesh = make_mesh(Placement.of(recipe), rank)
    return Trainer(recipe, Path(corpus), run / "checkpoints", mesh, torch.device("cpu"))


def _advance(trainer: Trainer, until: int) -> tuple[list[Any], list[str]]:
    """Figures of the steps up to ``until``, and the events among their records."""
    records = [record for _ in range(trainer.step, until) for record in trainer.advance()]
    figures = [[r["step"], r["loss"], r["balance_loss"], r["grad_norm"]] for r in records if r["kind"] == "train"]
    return figures, [record["text"] for record in records if record["kind"] == "event"]


def _weights(trainer: Trainer) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in trainer.tensors().items()}


def _plain_traced_and_resumed(
    rank: int, world: int, plain: dict[str, Any], traced: dict[str, Any], corpus: str, folder: str
) -> dict[str, Any]:
    """A run, the same one traced, and one that goes on from the first one's checkpoint of step 2, traced as well."""
    trainers = [_trainer(tables, corpus, Path(folder, str(i)), rank) for i, tables in enumerate((plain, traced))]
    start, _ = _advance(trainers[0], 2)
    trainers[0].save()
    trainers[0].settle()
    resumed = _trainer(traced, corpus, Path(folder, "0"), rank)
    resumed.restore(2)
    runs = [*trainers, resumed]
    found = [_advance(trainer, STEPS) for trainer in runs]
    figures, events = [figures for figures, _ in found], [events for _, events in found]
    weights = [_weights(trainer) for trainer in runs]
    same = weights[0] == weights[1] == weights[2]
    return {"figures": [start + figures[0], figures[1], start + figures[2]], "events": events, "same weights": same}


def _trace(run: Path, rank: int) -> dict[str, Any]:
    with gzip.open(run / "profile" / f"rank-{rank}.json.gz", "rt") as file:
        found: dict[str, Any] = json.load(file)
        return found


def _named(trace: dict[str, Any], kind: str = "user_annotation") -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") == kind:
            found.setdefault(event["name"], []).append(event)
    return found


def _own_times(trace: dict[str, Any]) -> dict[str, float]:
    """µs of each operator, without what it called: worked out from the ranges of the trace."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation")]
    own: Counter[str] = Counter()
    open_ones: list[Event] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_ones and event["ts"] >= open_ones[-1]["ts"] + open_ones[-1]["dur"]:
            open_ones.pop()
        if open_ones:
            own[open_ones[-1]["name"]] -= event["dur"]
        own[event["name"]] += event["dur"]
        open_ones.append(event)
    operators = _named(trace, "cpu_op")
    return {name: time for name, time in own.items() if name in operators}


def _within(inner: Event, outer: Event) -> bool:
    """Whether a range lies in another one; its ends were rounded to nanoseconds apart."""
    rounding = 0.01
    ends = inner["ts"] + inner["dur"], outer["ts"] + outer["dur"]
    return bool(outer["ts"] - rounding <= inner["ts"] and ends[0] <= ends[1] + rounding)


def _check_steps(trace: dict[str, Any], steps: list[int], attention: bool) -> None:
    """Each of the steps, and no other, has its parts once, in order, and in its forward pass the layers with theirs."""
    ranges = _named(trace)
    assert sorted(name for name in ranges if name.startswith("ProfilerStep")) == [f"ProfilerStep#{n}" for n in steps]
    for number in steps:
        (whole,) = ranges[f"ProfilerStep#{number}"]
        parts = {name: [each for each in ranges[name] if _within(each, whole)] for name in PARTS}
        assert {name: len(found) for name, found in parts.items()} == dict.fromkeys(PARTS, 1)
        begins = [parts[name][0]["ts"] for name in PARTS]
        assert begins == sorted(begins)
        for i in range(3):
            (layer,) = (each for each in ranges[f"layers.{i}"] if _within(each, parts["forward"][0]))
            inside = [
                n for n in ("attention", "feed-forward", "experts") for e in ranges.get(n, ()) if _within(e, layer)
            ]
            assert inside == ["attention"] * attention + (["experts"] if i else ["feed-forward"] * attention)
    assert Counter(map(len, (ranges[name] for name in PARTS))) == {len(steps): len(PARTS)}


@pytest.mark.parametrize("placement", [pytest.param("colocated", marks=pytest.mark.slow), "1A:1F"])
def test_each_rank_traces_the_steps_it_is_told_to_and_computes_the_same_bits(
    corpus: Path, placement: str, tmp_path: Path
) -> None:
    ranks = {"parallel__ranks": 2, "parallel__placement": placement}
    plain, traced = small_recipe(**FEW, **ranks), small_recipe(**FEW, **ranks, train__profile_at=2)
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    found = run_ranks(2, _plain_traced_and_resumed, plain, traced, str(corpus), str(tmp_path))
    for each in found:
        first, second, third = each["figures"]
        assert [step for step, *_ in first] == list(range(1, STEPS + 1))
        assert first == second == third
        assert each["same weights"]
        assert [len(events) for events in each["events"]] == [0, 1, 1]
        assert each["events"][1][0].startswith("traced steps 2 to 3: ")
        assert each["events"][2][0].startswith("traced step 3: ")  # what was left of them
    for rank in range(2):
        attention = placement == "colocated" or rank == 0
        for run, steps in (("1", [2, 3]), ("0", [3])):
            trace = _trace(tmp_path / run, rank)
            assert (trace["distributedInfo"]["rank"], trace["distributedInfo"]["world_size"]) == (rank, 2)
            _check_steps(trace, steps, attention)
            assert len(_named(trace)["dispatch"]) >= 4 * len(steps)  # two layers, there and back


def test_the_table_has_the_operators_that_took_most_time(corpus: Path, tmp_path: Path) -> None:
    """Of one rank. Older traces go, of more ranks maybe."""
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "rank-7.json.gz").write_bytes(b"")
    trainer = _trainer(small_recipe(**FEW, train__profile_at=1, train__profile_steps=1), str(corpus), tmp_path, 0)
    _, events = _advance(trainer, 2)
    assert len(events) == 1 and events[0].startswith("traced step 1: ")
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"rank-0.json.gz", "table.txt"}
    trace = _trace(tmp_path, 0)
    _check_steps(trace, [1], attention=True)
    spent = _own_times(trace)
    head, *rows = (tmp_path / "profile" / "table.txt").read_text().splitlines()
    assert head.startswith("step 1 on rank 0: ")
    assert len(rows) == 10
    for row, time in zip(rows, sorted(spent.values(), reverse=True), strict=False):
        share, ms, _, _, _, name = row.split(maxsplit=5)
        assert float(ms) == pytest.approx(time / 1000, abs=0.1)
        assert spent[name] == pytest.approx(time, abs=100)  # the very operator, or one that took as long
        assert float(share.rstrip("%")) == pytest.approx(100 * time / sum(spent.values()), abs=0.5)


def test_a_trace_that_cannot_be_written_stops_nothing(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("not a folder")
    trainer = _trainer(small_recipe(**FEW, train__profile_at=1, train__profile_steps=1), str(corpus), tmp_path, 0)
    figures, events = _advance(trainer, 2)
    assert [step for step, *_ in figures] == [1, 2]
    assert len(events) == 1 and "could not be written" in events[0] and "File exists" in events[0]


def test_a_trace_that_does_not_fit_leaves_nothing_on_the_disk(corpus: Path, tmp_path: Path) -> None:
    trainer = _trainer(small_recipe(**FEW, train__profile_at=1, train__profile_steps=1), str(corpus), tmp_path, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        _, events = _advance(trainer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(events) == 1 and "could not be written" in events[0]
    assert list((tmp_path / "profile").iterdir()) == []


def test_without_the_key_nothing_is_traced(corpus: Path, tmp_path: Path) -> None:
    trainer = _trainer(small_recipe(**FEW, train__profile_steps=1), str(corpus), tmp_path, 0)
    assert _advance(trainer, 2)[1] == []
    assert not (tmp_path / "profile").exists()


@pytest.mark.gpu
def test_on_a_gpu_the_table_is_of_kernels(corpus: Path, tmp_path: Path) -> None:
    plain = {"train__dtype": "bfloat16", "train__deterministic": True}
    losses = []
    try:
        for changes in (plain, {**plain, "train__profile_at": 2}):
            recipe = Recipe.model_validate(small_recipe(**changes))
            mesh = make_mesh(Placement.of(recipe))
            trainer = Trainer(recipe, corpus, tmp_path / "checkpoints", mesh, torch.device("cuda"))
            losses.append(_advance(trainer, STEPS)[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[0] == losses[1]
    trace = _trace(tmp_path, 0)
    _check_steps(trace, [2, 3], attention=True)
    assert {"forward", "backward", "ProfilerStep#3"} <= _named(trace, "gpu_user_annotation").keys()
    launched: dict[str, set[int]] = {}  # by the beginning of a name, which several kernels may share
    for kernel, each in _named(trace, "kernel").items():
        launched.setdefault(kernel[:80].strip(), set()).add(len(each))
    head, *rows = (tmp_path / "profile" / "table.txt").read_text().splitlines()
    assert head.startswith("steps 2 to 3 on rank 0: ") and head.endswith(" ms in kernels")
    assert len(rows) == 10
    for row in rows:
        share, _, _, calls, _, name = row.split(maxsplit=5)
        assert float(share.rstrip("%")) > 0
        assert name.startswith(("Memcpy", "Memset")) or int(calls.replace(",", "")) in launched[name.strip()]
