"""Benchmarks: what they write and print, the arithmetic of ratios and parts, and that they look at the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shoal.jobs.bench import cli, memory, plain, probe, startup, train
from shoal.jobs.bench.command import output_of, shoal_command, started, wait_for_step
from shoal.jobs.bench.registry import BENCHMARKS, Settings, measure
from shoal.jobs.bench.result import document, table, time_row, value_row, write
from shoal.workers.errors import TrainingFailed

ROWS = [
    time_row("a step", 1250.0, "a loop", 1000.0, 0.97, steps=15, ratios=[0.8, 1 / 3]),
    value_row("peak", 2.0, "GB", "limit", 3.0, 1.0),
    value_row("speed", 3276.8, "tokens/s"),
]


def shoal(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoal.jobs.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def printed(result: dict[str, object]) -> str:
    console = Console(width=200, record=True, quiet=True)
    console.print(table(result))
    return console.export_text()


@given(st.floats(1e-3, 1e9), st.floats(1e-3, 1e9))
def test_a_ratio_is_the_baseline_over_the_figure(ours: float, theirs: float) -> None:
    row = time_row("x", ours, "other", theirs)
    assert (row["ms"], row["baseline"], row["baseline_ms"]) == (ours, "other", theirs)
    assert row["ratio"] == pytest.approx(theirs / ours)
    assert value_row("x", ours, "GB", "limit", theirs)["ratio"] == pytest.approx(theirs / ours)


def test_a_row_without_a_baseline_has_no_ratio() -> None:
    assert time_row("x", 2.0) == {"what": "x", "ms": 2.0}
    assert value_row("x", 2.0, "GB") == {"what": "x", "value": 2.0, "unit": "GB"}


def test_results_are_written_as_the_project_agreed(tmp_path: Path) -> None:
    path = write(document("train", ROWS, (0.25, 1.5)), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "train.json"
    assert [p.name for p in path.parent.iterdir()] == ["train.json"]
    read = json.loads(path.read_text())
    assert read["benchmark"] == "train"
    assert f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB" in read["device"]
    assert read["software"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert read["software"]["torch"] == import_module("torch").__version__
    assert read["load_average"] == [0.25, 1.5]
    assert datetime.fromisoformat(read["date"]).utcoffset() is not None
    assert read["rows"][0]["ratio"] == 0.8
    assert read["rows"][0]["ratios"] == [0.8, 0.333333]
    assert write(document("train", [], (0.0, 0.0)), path.parent) == path
    assert json.loads(path.read_text())["rows"] == []


def test_the_commit_is_that_of_the_code_whatever_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("the code lies here without its history")
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    monkeypatch.chdir(tmp_path)
    result = document("cli", [], ())
    assert result["commit"] == head.stdout.strip()
    assert isinstance(result["dirty"], bool)


def test_the_table_shows_figures_baselines_and_what_is_missed() -> None:
    text = printed(document("train", ROWS, (0.0, 0.0)))
    step, peak, speed = (next(line for line in text.splitlines() if line.startswith(w)) for w in ("a st", "peak", "sp"))
    assert all(part in step for part in ("steps 15", "1,250 ms", "a loop", "1,000 ms", "0.800", "0.97: MISSED"))
    assert all(part in peak for part in ("2.00 GB", "limit", "3.00 GB", "1.500", "1: met"))
    assert "3,277 tokens/s" in speed


def test_list_names_every_benchmark_and_each_can_run() -> None:
    listed = json.loads(shoal("bench", "list", "-o", "json").stdout)
    assert listed.keys() == BENCHMARKS.keys() >= {"train", "startup", "memory", "cli"}
    for name, (module, about) in BENCHMARKS.items():
        assert callable(import_module(module).run)
        assert listed[name] == about
        assert about in " ".join(shoal("bench", name, "--help").stdout.split())


def test_an_unknown_benchmark_is_wrong_usage(tmp_path: Path) -> None:
    result = shoal("bench", "trian", cwd=tmp_path)
    assert result.returncode == 2
    assert "train" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_shoal_bench_writes_and_prints_the_same(tmp_path: Path) -> None:
    result = shoal("bench", "cli", "--repeats", "1", "--out", "results", "-o", "json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said, written = json.loads(result.stdout), json.loads((tmp_path / "results" / "cli.json").read_text())
    assert {**said, "rows": 0} == {**written, "rows": 0}
    assert [row["what"] for row in said["rows"]] == [row["what"] for row in written["rows"]]
    row = written["rows"][0]
    assert row["baseline_ms"] == 500
    assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"], rel=1e-4)
    assert row["ms"] > written["rows"][1]["ms"] > 0  # Python alone takes less


def test_heavy_imports_are_found() -> None:
    assert cli.heavy_imports(["-c", "import torch"]) == ["torch"]
    assert cli.heavy_imports(["-c", "import json"]) == []


def test_a_command_that_fails_is_named_with_its_last_word() -> None:
    with pytest.raises(TrainingFailed, match=r"train --recipe tinny` ended with 5 \(error: recipe 'tinny'"):
        output_of([*shoal_command(), "train", "--recipe", "tinny"])


def test_a_run_that_ends_before_its_first_step_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(TrainingFailed, match=r"ended with 3 \(no room\)"),
        started([sys.executable, "-c", "print('no room'); exit(3)"], log) as process,
    ):
        wait_for_step(process, tmp_path / "metrics.jsonl", log)


def test_ms_a_step_leaves_out_the_warm_up_and_counts_what_lies_between_steps() -> None:
    warm = [10.0 * i for i in range(train.WARM_UP)]
    after = [warm[-1] + seconds for seconds in (1.0, 2.0, 4.5)]
    assert train.ms_a_step([*warm, *after]) == pytest.approx(1500.0)


def test_train_rows_compare_the_medians_over_processes() -> None:
    measured = {train.RAY: [1000.0, 1100.0, 5000.0], train.TRAINER: [990.0, 1067.0, 900.0], train.LOOP: [1100.0] * 3}
    beside_trainer, beside_loop, *speeds = train.rows(measured, steps=15)
    assert (beside_trainer["ms"], beside_trainer["baseline_ms"], beside_trainer["target"]) == (1100, 990, 0.97)
    assert beside_trainer["ratio"] == pytest.approx(0.9)
    assert beside_trainer["ratios"] == pytest.approx([0.99, 0.97, 0.18])
    assert beside_loop["ratio"] == 1
    assert [round(row["value"]) for row in speeds] == [3724, 4137, 3724]  # 8 sequences of 512 tokens a step


def test_parts_add_up_to_the_whole_when_none_overlap() -> None:
    intervals = [{"part": "b", "start": 105.0, "end": 108.0}, {"part": "a", "start": 101.0, "end": 103.0}]
    parts = startup.parts_of(intervals, begin=100.0, end=110.0)
    assert parts == pytest.approx({"a": 2000, "b": 3000, startup.FIRST_STEP: 2000, startup.REST: 3000})
    assert sum(parts.values()) == pytest.approx(10_000)


def test_parts_that_overlap_are_not_taken_from_the_rest_twice() -> None:
    intervals = [
        {"part": "long", "start": 101.0, "end": 106.0},
        {"part": "inside", "start": 102.0, "end": 103.0},
        {"part": "across", "start": 105.0, "end": 107.0},
    ]
    parts = startup.parts_of(intervals, begin=100.0, end=107.0)
    assert parts[startup.REST] == pytest.approx(1000)
    assert parts[startup.FIRST_STEP] == 0


def test_the_parts_that_are_timed_exist() -> None:
    for _, module, attribute in probe.PARTS:
        owner, name = probe.owner_of(module, attribute)
        assert callable(getattr(owner, name))


def test_the_probe_is_shoal_itself() -> None:
    command = [sys.executable, "-m", "shoal.jobs.bench.probe", os.devnull, "config", "show", "tiny", "-o", "json"]
    assert json.loads(output_of(command))["recipe"]["model"]["layers"] == 4


def test_descendants_are_found_at_any_depth() -> None:
    parent_of = {2: 1, 3: 2, 4: 3, 5: 1, 6: 5, 9: 8}
    assert memory.descendants(2, parent_of) == {2, 3, 4}
    assert memory.descendants(1, parent_of) == {1, 2, 3, 4, 5, 6}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says what a process uses")
def test_memory_of_a_child_and_its_child_is_counted() -> None:
    inner = "bytearray(b'x') * 80_000_000; print(1, flush=True); input()"
    inner = f"held = {inner}"
    outer = f"import subprocess, sys; held = bytearray(b'x') * 40_000_000; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        found = memory.sample(process.pid)
        process.stdin.write(b"\n")
    assert len(found) == 2
    assert 0.12 < sum(found.values()) < 0.2
    assert 0.08 < max(found.values()) < 0.12


def test_memory_rows_name_the_largest_processes_of_the_higher_phase() -> None:
    preparing, training = memory.Peak(), memory.Peak()
    preparing.take({"shoal": 0.5})
    training.take({"shoal": 0.25, "rank": 0.5})
    training.take({"shoal": 0.25, "rank": 1.0, **{f"small {i}": 0.0625 for i in range(8)}})
    training.take({"shoal": 0.25})
    total, before, after, *named = memory.rows(preparing, training)
    assert (total["value"], total["ratio"], total["processes"]) == (1.75, 3 / 1.75, 10)
    assert (before["value"], after["value"]) == (0.5, 1.75)
    assert [row["what"].removeprefix("at the peak: ") for row in named[:2]] == ["rank", "shoal"]
    assert sum(row["value"] for row in named) == pytest.approx(total["value"])
    assert named[-1]["what"] == "at the peak: 4 more processes"


def test_a_benchmark_says_how_far_it_is() -> None:
    said: list[str] = []
    result = measure("cli", Settings(repeats=1, say=said.append))
    assert said == ["1 times shoal --help"]
    assert len(result["load_average"]) == 2
