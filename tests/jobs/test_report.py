"""RunReport against the files and lines that a person finds afterwards."""

from __future__ import annotations

import io
import itertools
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shoal.jobs.report import RunReport, read_records
from shoal.jobs.report.journal import Journal
from shoal.workers.errors import InvalidInput


def train(step: int, **more: Any) -> dict[str, Any]:
    record = {
        "kind": "train",
        "step": step,
        "tokens": step * 4096,
        "loss": 2 + 6 / (1 + step / 10) + 0.1 * (-1) ** step,
        "balance_loss": 0.01,
        "learning_rate": 3e-4,
        "grad_norm": 1.5,
        "step_seconds": 0.25,
        "tokens_per_second": 16384.0,
        "expert_imbalance": 1.25,
        "time": 1.7e9 + step,
    }
    return record | more


def evaluation(step: int) -> dict[str, Any]:
    return {
        "kind": "eval",
        "step": step,
        "loss": 3.25,
        "bits_per_byte": 1.75,
        "unigram_bits_per_byte": 4.5,
        "gzip_bits_per_byte": 2.25,
        "tokens": 1000,
        "bytes": 3000,
    }


def load(step: int) -> dict[str, Any]:
    return {"kind": "load", "step": step, "load": [[0.5, 1.5, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0]]}


def event(step: int, name: str = "checkpoint", text: str = "checkpoint saved") -> dict[str, Any]:
    return {"kind": "event", "step": step, "event": name, "text": text}


def whole_run(steps: int) -> list[dict[str, Any]]:
    records = []
    for step in range(1, steps + 1):
        records.append(train(step))
        if step % 10 == 0:
            records += [load(step), evaluation(step), event(step)]
    return records


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# metrics.jsonl


def test_a_record_is_in_the_file_as_soon_as_it_is_reported(tmp_path: Path) -> None:
    report = RunReport(tmp_path, 10, plain())
    for count, record in enumerate([train(1), load(1), evaluation(1), event(1)], start=1):
        report.record(record)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == count
        assert json.loads(lines[-1]) == record
    report.close()


def test_resuming_removes_what_is_computed_again_and_keeps_events(tmp_path: Path) -> None:
    with RunReport(tmp_path, 40, plain()) as report:
        for record in whole_run(30):
            report.record(record)
    with RunReport(tmp_path, 40, plain(), resume_step=20) as report:
        for record in whole_run(40):
            if record["step"] > 20:
                report.record(record)
    records = list(read_records(tmp_path / "metrics.jsonl"))
    computed = [r for r in records if r["kind"] != "event"]
    assert computed == [r for r in whole_run(40) if r["kind"] != "event"]
    assert [r["step"] for r in records if r["kind"] == "event"] == [10, 20, 30, 30, 40]


def test_rewind_in_the_middle_of_a_run(tmp_path: Path) -> None:
    with RunReport(tmp_path, 40, plain()) as report:
        for record in whole_run(25):
            report.record(record)
        report.rewind(20)
        report.record(event(25, "recovered", "rank 1 was killed: went back to step 20"))
        report.record(train(21, loss=7.0))
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 22))
    assert records[-1]["loss"] == 7.0


def test_a_torn_last_line_is_dropped_and_the_next_record_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1)) + "\n" + json.dumps(train(2))[:40])
    assert list(read_records(path)) == [train(1)]
    with RunReport(tmp_path, 10, plain()) as report:
        report.record(train(2))
    assert list(read_records(path)) == [train(1), train(2)]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_last_line_that_only_lacks_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1)) + "\n" + json.dumps(train(2)))
    with RunReport(tmp_path, 10, plain(), resume_step=1) as report:
        report.record(train(2, loss=1.0))
    assert list(read_records(path)) == [train(1), train(2, loss=1.0)]


def test_numbers_that_are_not_finite_leave_valid_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with RunReport(tmp_path, 10, plain()) as report:
        report.record(train(1))
        report.record(train(2, loss=float("nan"), grad_norm=float("inf")))
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=refuse)["loss"] is None
    assert (tmp_path / "loss.png").exists()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.data())
def test_floats_come_back_to_the_bit_and_any_cut_of_the_file_is_survived(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    journal = Journal(path)
    for step, loss in enumerate(losses, start=1):
        journal.append({"kind": "train", "step": step, "loss": loss})
    journal.close()
    assert [r["loss"] for r in read_records(path)] == losses
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    journal = Journal(path, resume_step=len(losses))
    journal.append({"kind": "train", "step": 99, "loss": 0.5})
    journal.close()
    kept = whole[:cut].count(b"\n")
    assert [r["loss"] for r in read_records(path)] == [*losses[:kept], 0.5]


def test_a_full_disk_is_one_sentence_and_nothing_that_was_reported_is_lost(tmp_path: Path) -> None:
    console = plain()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # a write beyond it fails half-way, as on a full disk
    try:
        with (
            pytest.raises(InvalidInput, match=r"metrics\.jsonl cannot be written \(File too large\): free or unlock"),
            RunReport(tmp_path, 20, console) as report,
        ):
            for record in whole_run(20):
                report.record(record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "were not drawn" in text_of(console)
    kept = list(read_records(tmp_path / "metrics.jsonl"))
    assert len(kept) >= 4
    assert kept == whole_run(20)[: len(kept)]
    with RunReport(tmp_path, 20, plain(), resume_step=2) as report:
        for record in whole_run(20)[2:]:
            report.record(record)
    assert list(read_records(tmp_path / "metrics.jsonl")) == whole_run(20)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs a folder that not even root can write to")
def test_a_read_only_folder_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"/sys/kernel/metrics\.jsonl cannot be written \("):
        RunReport(Path("/sys/kernel"), 10, plain())


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InvalidInput, match=r"metrics\.jsonl cannot be written \(Is a directory\)"):
        RunReport(tmp_path, 10, plain())


# the console


def test_output_that_is_not_a_terminal_is_plain_lines(tmp_path: Path) -> None:
    console = plain()
    with RunReport(tmp_path, 20, console, clock=lambda: 0.0) as report:
        for record in whole_run(20):
            report.record(record)
    text = text_of(console)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    lines = text.splitlines()
    assert lines[0] == "step 1/20  loss 7.355  16,384 tok/s  lr 3.0e-04  imbalance 1.25  ETA 0:00:05"
    assert "step 10: validation loss 3.250, 1.750 bits per byte (unigram 4.500, gzip 2.250)" in lines
    assert "step 10: checkpoint saved" in lines
    assert any(line.startswith("step 20/20 ") for line in lines)


@pytest.mark.parametrize("seconds_a_step", [0.001, 0.3, 4.0])
def test_plain_lines_are_no_flood_and_no_silence(tmp_path: Path, seconds_a_step: float) -> None:
    console, now = plain(), [0.0]
    report = RunReport(tmp_path, 1000, console, plot_every=1e9, clock=lambda: now[0])
    times = []
    for step in range(1, 1001):
        now[0] += seconds_a_step
        before = len(text_of(console))
        report.record(train(step))
        if len(text_of(console)) > before:
            times.append(now[0])
    report.close()
    assert 10 <= len(times) <= 110
    assert all(later - earlier <= 60 + seconds_a_step for earlier, later in itertools.pairwise(times))


def test_an_event_of_any_text_is_shown_as_it_is(tmp_path: Path) -> None:
    console = plain()
    with RunReport(tmp_path, 20, console) as report:
        report.record(event(3, "recovered", "rank 1 [10.0.0.1] died: [/bold] " + "x" * 200))
    assert "step 3: rank 1 [10.0.0.1] died: [/bold] " + "x" * 200 in text_of(console).splitlines()


def test_a_terminal_gets_a_bar_with_all_figures_and_events_above_it(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False, _environ={})
    with RunReport(tmp_path, 20, console) as report:
        for record in whole_run(20):
            report.record(record)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text_of(console))
    last = [line for line in text.splitlines() if "20/20" in line][-1]
    for part in ("loss 4.100", "16,384 tok/s", "lr 3.0e-04", "imbalance 1.25", "ETA 0:00:00"):
        assert part in last
    assert text.index("step 10: checkpoint saved") < text.rindex("20/20")


def test_a_dense_model_shows_no_imbalance(tmp_path: Path) -> None:
    console = plain()
    with RunReport(tmp_path, 20, console) as report:
        report.record(train(1, expert_imbalance=None))
    assert "imbalance" not in text_of(console)
    assert not (tmp_path / "expert_load.png").exists()


# imports


def test_reporting_starts_without_heavy_imports(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from rich.console import Console
        from shoal.jobs.report import RunReport
        def loaded(): return {"torch", "tensorflow", "ray", "tensorboard", "matplotlib"} & set(sys.modules)
        report = RunReport(Path(sys.argv[1]), 10, Console())
        assert not loaded(), loaded()
        report.record({"kind": "train", "step": 1, "loss": 3.0})
        report.close()
        assert loaded() == {"tensorboard", "matplotlib"}, loaded()
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
