"""Benchmarks: what they write and print, their arithmetic, and that they look at real processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from shell import shoal

from shoal.jobs.bench import cli, command, memory, probe, startup, train
from shoal.jobs.bench.command import output_of, started, train_records, wait_for_step
from shoal.jobs.bench.registry import BENCHMARKS, Settings
from shoal.jobs.bench.result import document, table, time_row, value_row, write
from shoal.jobs.recipe import load_recipe
from shoal.workers.errors import TrainingFailed

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds; a machine may be busy
ROWS = [
    time_row("a step", 1250.0, "a loop", 1000.0, 0.97, steps=15, ratios=[0.8, 1 / 3]),
    value_row("peak", 2.0, "GB", "limit", 3.0, 1.0),
    value_row("speed", 3276.8, "tokens/s"),
]
linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says what a process uses")


def printed(result: dict[str, Any]) -> list[str]:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as text:
        console.print(table(result))
    return text.get().splitlines()


# Rows


@given(st.floats(1e-3, 1e9), st.floats(1e-3, 1e9))
def test_a_ratio_is_the_baseline_over_the_figure(ours: float, theirs: float) -> None:
    row = time_row("x", ours, "other", theirs)
    assert (row["ms"], row["baseline"], row["baseline_ms"]) == (ours, "other", theirs)
    assert row["ratio"] * ours == pytest.approx(theirs)
    row = value_row("x", ours, "GB", "limit", theirs)
    assert (row["value"], row["unit"], row["baseline_value"]) == (ours, "GB", theirs)
    assert row["ratio"] * ours == pytest.approx(theirs)


def test_a_row_without_a_baseline_has_no_ratio_and_keeps_its_facts() -> None:
    assert time_row("x", 2.0, repeats=3) == {"what": "x", "ms": 2.0, "repeats": 3}
    assert value_row("x", 2.0, "GB") == {"what": "x", "value": 2.0, "unit": "GB"}


def test_the_table_shows_figures_baselines_and_what_is_missed() -> None:
    lines = printed(document("train", ROWS, (0.0, 0.0)))
    step, peak, speed = (next(line for line in lines if line.startswith(row["what"])) for row in ROWS)
    assert step.split("  ")[0] == "a step (steps 15)"  # lists are for the file
    for part in ("1,250 ms", "a loop", "1,000 ms", "0.800", "0.97: MISSED"):
        assert part in step
    for part in ("2.00 GB", "limit", "3.00 GB", "1.500", "1: met"):
        assert part in peak
    assert speed.split() == ["speed", "3,277", "tokens/s"]


def test_a_target_that_is_just_reached_is_met() -> None:
    rows = [time_row("even", 500.0, "limit", 500.0, 1.0), time_row("over", 501.0, "limit", 500.0, 1.0)]
    lines = printed(document("cli", rows, ()))
    assert [line.split()[-1] for line in lines if line.startswith(("even", "over"))] == ["met", "MISSED"]


# The document and its file


def test_a_result_names_the_machine_the_software_the_commit_and_the_date(tmp_path: Path) -> None:
    path = write(document("train", ROWS, (0.25, 1.504)), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "train.json"
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["benchmark"] == "train"
    assert f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB" in read["device"]
    assert read["software"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert read["software"]["ray"] == import_module("ray").__version__
    assert datetime.fromisoformat(read["date"]).utcoffset() is not None
    assert read["load_average"] == [0.25, 1.5]
    assert [row["what"] for row in read["rows"]] == ["a step", "peak", "speed"]
    assert read["rows"][0]["ratios"] == [0.8, 0.333333]  # six digits


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the code lies here without its history")
def test_the_commit_is_that_of_the_code_whatever_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_COMMIT", "abc123")
    assert document("cli", [], ())["commit"] == head.stdout.strip()


def test_without_git_the_commit_is_the_one_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SHOAL_COMMIT", "abc123")
    assert document("cli", [], ())["commit"] == "abc123"
    monkeypatch.delenv("SHOAL_COMMIT")
    assert document("cli", [], ())["commit"] == "unknown"


def test_a_new_result_replaces_the_old_one_at_once(tmp_path: Path) -> None:
    path = write(document("train", ROWS, ()), tmp_path)
    with path.open(encoding="utf-8") as reader:  # began to read before the new one was there
        assert write(document("train", [], ()), tmp_path) == path
        assert len(json.load(reader)["rows"]) == len(ROWS)
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == []
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_not_finite_is_refused_and_the_old_file_stays(tmp_path: Path, figure: float) -> None:
    path = write(document("train", ROWS, ()), tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(document("train", [time_row("fine", 1.0), time_row("not", 1.0, all_ms=[figure])], ()), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


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


# Memory


INNER = """
import os
open("/proc/self/comm", "w").write("x) S 1 (y")  # a name that looks like what follows it in /proc/PID/stat
print(os.getpid(), flush=True)
input()
held = bytearray(b"x") * 60_000_000
print("holds it", flush=True)
input()
if os.fork():
    print("shares it", flush=True)
input()
"""
OUTER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {INNER!r}], check=True)"


@contextmanager
def talking(code: str) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """A Python process in a group of its own, what is written to it and what it writes; its group ends at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin
    assert process.stdout
    with process:
        try:
            yield process, process.stdin, process.stdout
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@linux
def test_memory_of_a_child_and_its_child_is_counted() -> None:
    with talking(OUTER) as (process, to, said):
        inner = int(said.readline())
        assert memory.descendants(process.pid, memory.parents()) == {process.pid, inner}
        assert memory.descendants(os.getpid(), memory.parents()) >= {os.getpid(), process.pid, inner}
        before = memory.sample(process.pid)
        print(file=to, flush=True)
        assert said.readline() == "holds it\n"
        after = memory.sample(process.pid)
        alone = memory.sample(inner)
        print(file=to, flush=True)
        assert said.readline() == "shares it\n"
        shared = memory.sample(process.pid)
    program = Path(sys.executable).name
    assert before.keys() == after.keys() == {program, f"{program} [2]"}
    # pages that other processes come to share, or no longer do, move the rest of the sum a little
    assert sum(after.values()) - sum(before.values()) == pytest.approx(0.06, abs=0.01)
    assert 0.06 < sum(alone.values()) < sum(after.values())
    assert len(shared) == 3
    assert sum(shared.values()) - sum(after.values()) < 0.03  # not the 60 MB again


@linux
def test_a_process_that_has_ended_uses_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended; still listed, as nobody asked how
        assert process.pid in memory.parents()
        assert memory.sample(process.pid) == {}
    assert memory.sample(process.pid) == {}


def test_descendants_are_found_at_any_depth_and_nothing_else() -> None:
    parent_of = {2: 1, 3: 2, 4: 3, 5: 1, 6: 5, 9: 8}
    assert memory.descendants(2, parent_of) == {2, 3, 4}
    assert memory.descendants(1, parent_of) == {1, 2, 3, 4, 5, 6}


def test_a_peak_is_the_largest_sum_with_the_processes_of_that_moment() -> None:
    peak = memory.Peak()
    for found in ({"a": 3.0}, {"a": 1.0, "b": 2.5}, {"b": 3.25}, {}):
        peak.take(found)
    assert (peak.total, peak.at_peak, peak.samples) == (3.5, {"a": 1.0, "b": 2.5}, 4)


def test_memory_rows_name_the_largest_processes_of_the_higher_phase() -> None:
    preparing, training = memory.Peak(), memory.Peak()
    preparing.take({"shoal": 0.5})
    training.take({"shoal": 0.25, "rank": 1.0, **{f"small {i}": 0.0625 for i in range(8)}})
    total, before, after, *named = memory.rows(preparing, training)
    assert (total["value"], total["ratio"]) == (1.75, memory.LIMIT_GB / 1.75)
    assert (total["processes"], total["samples"]) == (10, 2)
    assert (before["value"], after["value"]) == (0.5, 1.75)
    assert [row["what"] for row in named[:2]] == ["at the peak: rank", "at the peak: shoal"]
    assert named[-1]["what"] == "at the peak: 4 more processes"
    assert sum(row["value"] for row in named) == total["value"]


@linux
def test_training_that_fails_under_the_memory_benchmark_says_why() -> None:
    said: list[str] = []
    with pytest.raises(TrainingFailed, match=r"train --recipe tiny .*` ended with 3 \(error: train\.steps=0 is out of"):
        memory.run(Settings(steps=0, say=said.append))
    assert len(said) == 1


# Commands


STEPPING = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may have it ignored
with open(sys.argv[1], "w") as metrics:
    for kind in ("event", "train"):
        metrics.write(json.dumps({"kind": kind, "time": time.time()}) + "\\n")
    metrics.write('{"kind": "tr')  # torn: it is being written
"""
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = os.fork()
if child:
    open(sys.argv[1], "w").write('{"kind": "train", "child": %d}' % child)
time.sleep(2 * 60)  # longer than the test looks
"""


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_run_is_waited_for_and_interrupted(tmp_path: Path, error: type[BaseException] | None) -> None:
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "log"
    code = [sys.executable, "-c", STEPPING + "time.sleep(600)", str(metrics)]
    try:
        with started(code, log) as process:
            seen = wait_for_step(process, metrics, log)
            assert process.poll() is None
            if error is not None:
                raise error
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert process.returncode == -signal.SIGINT
    (record,) = train_records(metrics)
    assert record["time"] <= seen


def test_a_run_that_ends_after_its_first_step_is_none_that_failed(tmp_path: Path) -> None:
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "log"
    with started([sys.executable, "-c", STEPPING, str(metrics)], log) as process:
        assert process.wait(PATIENCE) == 0
        assert wait_for_step(process, metrics, log) >= train_records(metrics)[0]["time"]


def test_a_run_that_ends_before_its_first_step_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import sys; print('one', flush=True); print('no room\\n', file=sys.stderr); sys.exit(3)"
    with (
        pytest.raises(TrainingFailed, match=r"ended with 3 \(no room\)"),
        started([sys.executable, "-c", code], log) as process,
    ):
        wait_for_step(process, tmp_path / "metrics.jsonl", log)


@linux
def test_a_run_that_will_not_stop_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "FINISH_SECONDS", 0.2)
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "log"
    with started([sys.executable, "-c", STUBBORN, str(metrics)], log) as process:
        wait_for_step(process, metrics, log)
        child = train_records(metrics)[0]["child"]
        assert memory.sample(child)
    assert process.returncode == -signal.SIGKILL
    end = time.monotonic() + PATIENCE
    while memory.sample(child):
        assert time.monotonic() < end, "the child of what was ended still runs"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; print('result'); sys.exit('no room')", r"ended with 1 \(no room\)"),
        ("print('only this'); exit(7)", r"ended with 7 \(only this\)"),
        ("exit(7)", r"ended with 7 \(no word\)"),
        ("import os; os.kill(os.getpid(), 9)", r"ended with -9 \(no word\)"),
    ],
)
def test_a_command_that_fails_is_named_with_its_last_line(code: str, says: str) -> None:
    with pytest.raises(TrainingFailed, match=says):
        output_of([sys.executable, "-c", code])


def test_settings_that_would_change_the_figures_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("ANOTHER", "7")
    found = json.loads(output_of([sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]))
    assert "OMP_NUM_THREADS" not in found
    assert found["ANOTHER"] == "7"


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
        assert callable(import_module(module).run)


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

    small = replace(engine.SCALES["cpu"][0], at_once={96: (1, 2), 512: (1, 2)}, step=128)
    for name, value in {"AT_ONCE": 4, "PROMPT": 8, "ANSWER": 6, "SCALES": {"cpu": [small]}}.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said: list[str] = []
    batched, plain, *attentions = engine.run(Settings(repeats=1, steps=2, say=said.append))
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
    assert len(said) == 1 + 2 * len(attentions)


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
