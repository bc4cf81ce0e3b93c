"""Benchmarks: the parts of a start, steps of training, the engine in small, and the command line."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
from shell import shoal

from shoal.jobs.bench import cli, probe, startup, train
from shoal.jobs.bench.command import output_of
from shoal.jobs.bench.ending import CUT
from shoal.jobs.bench.registry import BENCHMARKS, Settings
from shoal.jobs.bench.result import Row, time_row
from shoal.jobs.cli.main import main
from shoal.jobs.recipe import load_recipe
from shoal.workers.errors import INTERRUPTED, TrainingFailed

# Startup


def test_parts_add_up_to_the_whole_when_none_overlap() -> None:
    intervals = [{"part": "b", "start": 105.0, "end": 108.0}, {"part": "a", "start": 101.0, "end": 103.0}]
    parts = startup.parts_of(intervals, begin=100.0, end=110.0)
    assert parts == pytest.approx({"a": 2000, "b": 3000, startup.FIRST_STEP: 2000, startup.REST: 3000})
    assert sum(parts.values()) == pytest.approx(10_000)


def test_parts_that_overlap_are_not_taken_from_the_rest_twice() -> None:
    intervals = [
        {"part": "across", "start": 105.0, "end": 107.0},
        {"part": "inside", "start": 102.0, "end": 103.0},
        {"part": "long", "start": 101.0, "end": 106.0},
    ]
    parts = startup.parts_of(intervals, begin=100.0, end=107.5)
    assert [parts[name] for name in ("across", "inside", "long")] == pytest.approx([2000, 1000, 5000])
    assert parts[startup.REST] == pytest.approx(1000)
    assert parts[startup.FIRST_STEP] == pytest.approx(500)


def test_part_rows_are_medians_the_largest_first() -> None:
    rows = startup.part_rows([{"a": 1.0, "b": 7.0}, {"a": 2.0, "b": 5.0}, {"a": 90.0, "b": 6.0}])
    assert rows == [time_row("part: b", 6.0, repeats=3), time_row("part: a", 2.0, repeats=3)]


@pytest.mark.parametrize(("module", "attribute"), [part[1:] for part in probe.PARTS])
def test_the_parts_that_are_timed_exist(module: str, attribute: str) -> None:
    owner, name = probe.owner_of(module, attribute)
    assert callable(vars(owner)[name])  # its own, not one that other classes share
    assert getattr(owner, "__name__", "") in (module, attribute.split(".")[0])


def test_the_probe_is_shoal_with_timers(tmp_path: Path) -> None:
    file = tmp_path / "parts.jsonl"
    parts = (("context", "shoal.jobs.cli.common", "exit_codes"), ("recipe", "shoal.jobs.recipe", "load_recipe"))
    code = (
        f"from shoal.jobs.bench import probe; probe.PARTS = {parts!r}\n"
        f"probe.main({str(file)!r}, 'config', 'show', 'tiny', '-o', 'json')"
    )
    assert json.loads(output_of([sys.executable, "-c", code]))["recipe"] == load_recipe("tiny").model_dump(mode="json")
    context, recipe = (json.loads(line) for line in file.read_text().splitlines())
    assert (context["part"], recipe["part"]) == ("context", "recipe")
    assert context["start"] <= context["end"] <= recipe["start"] <= recipe["end"]


def test_a_context_is_timed_until_it_is_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, here = tmp_path / "parts.jsonl", sys.modules[__name__]

    @contextmanager
    def opened(value: int) -> Iterator[int]:
        assert not file.exists()
        yield value

    monkeypatch.setattr(here, "opened", opened, raising=False)
    probe._time(file, "opening", __name__, "opened")
    with here.opened(3) as value:
        assert (value, len(file.read_text().splitlines())) == (3, 1)
    assert len(file.read_text().splitlines()) == 1


# Training


def test_ms_a_step_leaves_out_the_warm_up_and_counts_what_lies_between_steps() -> None:
    warm = [10.0 * step for step in range(train.WARM_UP)]
    after = [warm[-1] + seconds for seconds in (1.0, 2.0, 4.5)]
    assert train.ms_a_step([*warm, *after]) == pytest.approx(1500.0)


def test_train_rows_compare_medians_over_processes_and_keep_each_turn() -> None:
    measured = {train.RAY: [1000.0, 1100.0, 5000.0], train.TRAINER: [990.0, 1067.0, 900.0], train.LOOP: [500.0] * 3}
    beside_trainer, beside_loop, *speeds = train.rows(measured, steps=15)
    assert (beside_trainer["ms"], beside_trainer["baseline_ms"], beside_trainer["target"]) == (1100, 990, train.TARGET)
    assert beside_trainer["ratio"] == pytest.approx(0.9)
    assert beside_trainer["ratios"] == pytest.approx([0.99, 0.97, 0.18])
    assert (beside_trainer["steps"], beside_trainer["repeats"]) == (15, 3)
    assert (beside_loop["baseline"], beside_loop["baseline_ms"]) == (train.LOOP, 500)
    recipe = load_recipe("tiny").train
    assert speeds[-1]["value"] == pytest.approx(2 * recipe.batch * recipe.sequence)  # two steps of it a second


# The command line


def test_heavy_imports_are_found() -> None:
    assert cli.heavy_imports(["-c", "import ray, torch"]) == ["torch", "ray"]
    assert cli.heavy_imports(["-c", "import json"]) == []


def test_a_command_whose_imports_are_counted_may_fail_and_says_why() -> None:
    code = "import sys; print('no room', file=sys.stderr); import json; sys.exit(3)"  # imports are told on stderr too
    with pytest.raises(TrainingFailed, match=r"-X importtime -c .*ended with 3 \(no room\)"):
        cli.heavy_imports(["-c", code])


def test_list_names_every_benchmark_and_each_can_run(tmp_path: Path) -> None:
    listed = json.loads(shoal("bench", "list", "-o", "json", cwd=tmp_path).stdout)
    assert listed == {name: about for name, (_, about) in BENCHMARKS.items()}
    for module, _ in BENCHMARKS.values():
        found = import_module(module)
        assert callable(getattr(found, "whole", None) or found.run)


def test_shoal_bench_prints_what_it_writes_and_nothing_else(tmp_path: Path) -> None:
    result = shoal("bench", "cli", "--repeats", "2", "--out", "results", "-o", "json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file = tmp_path / "results" / "cli.json"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert result.stdout == file.read_text(encoding="utf-8")
    assert "2 times shoal --help" in result.stderr
    assert f"written to {Path('results', 'cli.json')}" in result.stderr
    data = json.loads(result.stdout)
    ours, python = data["rows"]
    assert (data["benchmark"], ours["repeats"], python["repeats"]) == ("cli", 2, 2)
    assert ours["baseline_ms"] == cli.LIMIT_MS
    assert ours["ratio"] * ours["ms"] == pytest.approx(cli.LIMIT_MS, rel=1e-4)
    assert (ours["imports"], python["ms"] > 0) == ("neither torch nor ray", True)


def test_the_engine_is_measured_beside_one_request_at_a_time_and_full_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In small: the same work on both sides of every ratio, and nothing left in the engine."""
    from shoal.jobs.bench import engine

    small = replace(engine.SCALES["cpu"][0], at_once={96: (1, 2), 512: (1, 2)}, step=128, peer={512: (2, 1)})
    for name, value in {"AT_ONCE": 4, "PROMPT": 8, "ANSWER": 6, "SCALES": {"cpu": [small]}}.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said: list[str] = []
    batched, plain, *rows = engine.run(Settings(repeats=1, steps=2, say=said.append))
    attentions, peers, beside = rows[:6], rows[6:8], rows[8:]
    assert [row["baseline"] for row in (batched, plain)] == [
        "one request at a time, cached",
        "one request at a time, plain loop",
    ]
    assert batched["ms"] == plain["ms"]
    assert batched["target"] == 5.0
    assert [(row["what"], row["context"], row["at_once"]) for row in attentions] == [
        (f"{what} with NSA", context, at_once)
        for context in (96, 512)
        for what, at_once in (("a prompt", 1), ("a decode step", 1), ("a decode step", 2))
    ]
    for row in attentions:
        tokens = row["at_once"] if "step" in row["what"] else row["context"]
        assert row["tokens_per_second"] == pytest.approx(1000 * tokens / row["ms"])
        assert row["baseline"] == "the same with full attention"
    assert all(row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"]) for row in (batched, plain, *attentions))
    assert len(said) == 1 + 2 * len(attentions) + len(peers)

    best = min(peers, key=lambda row: row["ms"] / row["at_once"])
    assert [(row["what"], row["at_once"]) for row in peers] == [
        (f"a decode step of {engine.PEER}", 2),
        (f"a decode step of {engine.PEER}", 1),
    ]
    assert all(row["tokens_per_second"] == pytest.approx(1000 * row["at_once"] / row["ms"]) for row in peers)
    assert [(row["ms"], row["at_once"]) for row in beside] == [(row["ms"], row["at_once"]) for row in attentions[4:]]
    assert beside[0]["baseline"] == f"{engine.PEER}, 1 at once"  # not more than NSA has
    assert beside[1]["baseline"] == f"{engine.PEER}, {best['at_once']} at once"
    assert beside[1]["baseline_ms"] == pytest.approx(2000 / best["tokens_per_second"])


def test_what_is_measured_on_a_gpu_fits_into_one() -> None:
    """Weights and the pages of the largest batch at the longest context, with both kinds of attention, in 78 GiB."""
    from shoal.jobs.bench import engine
    from shoal.jobs.estimate import estimate
    from shoal.workers.engine.cache import page_bytes

    for scale, kind in product(engine.SCALES["cuda"], engine.KINDS):
        recipe = engine.recipe_of(scale, kind)
        weights = 2 * estimate(recipe).parameters.total
        tokens = max(context * max(counts) for context, counts in scale.at_once.items())
        far, near = page_bytes(recipe, itemsize=2)
        page = recipe.attention.slc_block
        windows = scale.most * (recipe.attention.window // page + 2) + scale.step // page
        assert tokens // page * far + windows * near < engine.MEMORY * ((78 << 30) - weights)
        assert weights < scale.memory or not scale.memory


# Cut off


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT as in a terminal: tests that run in a shell's background have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("rows", "number"), [(0, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM)])
def test_what_a_benchmark_has_when_it_is_cut_off_is_a_result(
    rows: int,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(settings: Settings) -> Iterator[Row]:
        try:
            yield from (time_row(f"row {i}", 1.0 + i) for i in range(rows))
            signal.raise_signal(number)
            yield time_row("after it", 9.0)
        finally:
            signal.raise_signal(number)  # `timeout` sends one to its command and one to the process group

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(sys, "argv", ["shoal", "bench", "cli", "--out", str(tmp_path), "--plots", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == (["cli-cut.json"] if rows else [])
    if rows:
        result = json.loads((tmp_path / "cli-cut.json").read_text())
        assert [row["what"] for row in result["rows"]] == ["row 0", "row 1"]
        assert result["notes"] == [CUT]
        assert CUT in capsys.readouterr().err
