"""Results of benchmarks: rows and their arithmetic, the table, the document and its file."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shoal.jobs.bench.result import document, table, time_row, value_row, write

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    time_row("a step", 1250.0, "a loop", 1000.0, 0.97, steps=15, ratios=[0.8, 1 / 3]),
    value_row("peak", 2.0, "GB", "limit", 3.0, 1.0),
    value_row("speed", 3276.8, "tokens/s"),
]


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


def test_the_table_says_beside_a_row_what_tells_it_from_others_and_once_what_all_share() -> None:
    facts = {"heads": 64, "peak_bytes": 1574499328, "mfu": 0.4, "fitted": False}
    rows = [
        time_row("NSA", 2.0, "cuDNN", 3.0, context=8192, **facts),
        time_row("NSA", 5.0, "cuDNN", 9.0, context=16384, **(facts | {"fitted": True})),
        {"what": "NSA", "target": 10 / 11, "predicted_ms": 12.0, "context": 32768, **facts},
    ]
    first, second, third, below = printed(document("nsa", rows, ()))[-4:]
    assert first.split("  ")[0] == "NSA (context 8192)"
    assert second.split("  ")[0] == "NSA (context 16384, fitted)"
    assert third.startswith("NSA (context 32768)") and "predicted 12.00 ms" in third and "0.909: not" in third
    assert below.strip() == "all: heads 64"


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
