"""Benchmarks that are cut off while their ranks measure: what they have by then is a result, and no rank is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from shell import SHOAL, environment

from shoal.jobs.bench.ending import CUT, NOTHING
from shoal.workers.errors import INTERRUPTED

PHASES = ["forward", "backward", "forward+backward"]


@dataclass
class Ended:
    """What a command did: its exit code, what it said, and what it wrote, by name."""

    code: int
    said: str
    written: dict[str, Any]

    def result(self, name: str) -> Any:
        """Its one result, which says that it is not whole."""
        assert self.code == INTERRUPTED and "Traceback" not in self.said, self.said
        assert CUT in self.said.splitlines()
        assert list(self.written) == [name]
        assert self.written[name]["notes"][-1] == CUT
        assert f"{self.written[name]['benchmark']}.json" == name
        return self.written[name]


def cut(command: Sequence[str], after: str, out: Path, *numbers: int, group: bool = True) -> Ended:
    """Runs a command until it says a line with ``after``, then signals it, and with ``group`` its process group after
    it, as ``timeout`` does. Its output ends with the last of its ranks, which have inherited it."""
    process = subprocess.Popen(
        [*command, "--out", str(out)], env=environment(PYTHONUNBUFFERED="1", CUDA_VISIBLE_DEVICES=""), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever tests may have it ignored
    )  # fmt: skip
    said = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if after in line:
                break
        for number in numbers:
            process.send_signal(number)
            if group:
                os.killpg(process.pid, number)
        said += process.stdout.readlines()
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
    return Ended(code, "".join(said), {path.name: json.loads(path.read_text()) for path in out.glob("*.json")})


def module(name: str, *arguments: str) -> list[str]:
    """A benchmark without Shoal's command line."""
    return [sys.executable, "-m", f"shoal.jobs.bench.{name}", *arguments]


def test_ranks_that_are_about_to_begin_end_without_a_word(tmp_path: Path) -> None:
    ended = cut(module("sequence", "--contexts", "256"), "1 rank: nsa 256", tmp_path, signal.SIGINT)
    assert ended.code == INTERRUPTED and not ended.written
    assert ended.said.splitlines() == ["1 rank: nsa 256, full 256", NOTHING]


@pytest.mark.parametrize("command", [module("sequence"), [*SHOAL, "bench", "sequence"]])
def test_a_benchmark_that_imports_ends_without_a_traceback(command: list[str], tmp_path: Path) -> None:
    """Python tells what it has imported: a part of torch, and not yet all of it."""
    command = [command[0], "-X", "importtime", *command[1:]]
    ended = cut(command, " torch.version\n", tmp_path, signal.SIGINT)
    said = [line for line in ended.said.splitlines() if not line.startswith(("import time: ", "warning: "))]
    assert (ended.code, said) == (INTERRUPTED, ["cut off"])


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_exchanges_and_layers_of_so_many_tokens_are_told_once_they_are_measured(tmp_path: Path, number: int) -> None:
    command = module("dispatch", "--device", "cpu", "--tokens", "64,262144")
    rows = cut(command, "64 tokens, layer, all_to_all", tmp_path, number).result("dispatch-cpu-cut.json")["rows"]
    assert {row["tokens"] for row in rows} == {64}
    assert [row["what"] for row in rows] == [
        "exchange, row per copy",
        "exchange, row per rank",
        "dispatch, all_to_all",
        "layer, one rank",
        "layer, all_to_all",
    ]
    assert all("ratio" in row for row in rows)


@pytest.mark.slow
def test_two_ranks_stand_beside_one_when_the_rest_is_cut_off(tmp_path: Path) -> None:
    command = module("sequence", "--contexts", "256,4096", "--repeats", "1")
    ended = cut(command, "measured on 2 ranks: nsa 256", tmp_path, signal.SIGINT)
    rows = [row for row in ended.result("sequence-2xcpu-cut.json")["rows"] if "phase" in row]
    assert {(row["attention"], row["context"]) for row in rows if row["ranks"] == 1} == {
        (kind, context) for kind in ("nsa", "full") for context in (256, 4096)
    }
    one = {(row["attention"], row["context"], row["phase"]): row["ms"] for row in rows if row["ranks"] == 1}
    two = [row for row in rows if row["ranks"] == 2 and row["context"] == 256 and row["attention"] == "nsa"]
    assert [row["phase"] for row in two] == PHASES
    for row in two:
        assert row["baseline_ms"] == one["nsa", 256, row["phase"]]


@pytest.mark.slow
def test_the_command_line_cuts_off_as_well(tmp_path: Path) -> None:
    command = [*SHOAL, "bench", "sequence", "--plots", str(tmp_path)]
    ended = cut(command, "measured on 1 rank: full 2048", tmp_path, signal.SIGTERM, group=False)
    rows = ended.result("sequence-cut.json")["rows"]
    assert [(row["attention"], row["phase"]) for row in rows] == [(kind, p) for kind in ("nsa", "full") for p in PHASES]
    assert (tmp_path / "sequence-cut.png").exists()


@pytest.mark.slow
def test_scaling_is_told_as_far_as_it_was_measured(tmp_path: Path) -> None:
    command = module("scale", "--device", "cpu", "--parts", "moe")
    result = cut(command, " ms\n", tmp_path, signal.SIGINT).result("scale-cpu-moe-cut.json")
    assert result["facts"] and any(row["measured"] for row in result["rows"] if "measured" in row)


@pytest.mark.slow
def test_a_training_that_was_measured_outlives_the_next_one(tmp_path: Path) -> None:
    command = module("context", "--steps", "3", "--data-dir", str(tmp_path / "data"))
    out = tmp_path / "out"
    (row,) = cut(command, "full at 64k on 2 ranks", out, signal.SIGINT).result("context-cut.json")["rows"]
    assert (row["attention"], row["ranks"], row["steps"]) == ("nsa", 2, 3)
    assert "baseline" not in row and (out / "64k-nsa-2.jsonl").exists()
