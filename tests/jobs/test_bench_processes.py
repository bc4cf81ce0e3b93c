"""What benchmarks see of real processes: their memory, their records, how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from shoal.jobs.bench import command, memory
from shoal.jobs.bench.command import output_of, started, train_records, wait_for_step
from shoal.jobs.bench.registry import Settings
from shoal.workers.errors import TrainingFailed

PATIENCE = 60.0  # seconds; a machine may be busy
linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says what a process uses")


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
