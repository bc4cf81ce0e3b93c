"""``shoal data`` as a person runs it: files, exit codes, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal.jobs.cli.main import main


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Shoal = Callable[..., Done]


@pytest.fixture
def shoal(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shoal:
    """Run ``shoal data`` in the project's folder, through the entry point of the real command."""

    def run(*arguments: str) -> Done:
        monkeypatch.chdir(project)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["shoal", "data", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    for i in range(30):
        (tmp_path / "code" / f"m{i}.py").write_text(f"x{i} = {i}\nprint(x{i})\n" * (i + 1))
    return tmp_path


def result(done: Done) -> Any:
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


def test_prepare_show_verify(project: Path, shoal: Shoal) -> None:
    made = result(shoal("prepare", "code", "--vocab", "300", "-o", "json"))
    assert made["folder"] == "data/code" and made["vocabulary"] == 300
    assert {"tokenizer.json", "manifest.json"} <= {path.name for path in (project / "data" / "code").iterdir()}
    shown = result(shoal("show", "data/code", "-o", "json"))
    assert shown.pop("sample")["text"].startswith("x") and shown == made
    table = shoal("show", "data/code").stdout
    assert made["corpus_hash"] in table and f"{made['splits']['train']['tokens']:,}" in table and "print(x" in table
    assert result(shoal("verify", "data/code", "-o", "json"))["ok"] is True

    path = project / "data" / "code" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    (project / "data" / "code" / "unigram.npy").unlink()
    bad = shoal("verify", "data/code", "-o", "json")
    states = json.loads(bad.stdout)["files"]
    assert (states["tokenizer.json"], states["unigram.npy"], states["train-00000.parquet"]) == (
        "damaged",
        "missing",
        "ok",
    )
    assert bad.returncode == 3 and "data/code/tokenizer.json is damaged" in bad.stderr


def test_out_is_refused_when_there_and_replaced_with_force(project: Path, shoal: Shoal) -> None:
    arguments = ("prepare", "code", "--vocab", "300", "--out", "c")
    assert "hash" in shoal(*arguments).stdout
    again = shoal(*arguments)
    assert again.returncode == 3 and "c exists already" in again.stderr and again.stderr.count("\n") == 1
    assert shoal(*arguments, "--force", "--val-fraction", "0.5").returncode == 0
    assert result(shoal("show", "c", "-o", "json"))["val_fraction"] == 0.5


def test_mistakes_have_exit_codes(project: Path, shoal: Shoal) -> None:
    (project / "empty.txt").touch()
    (project / "t.json").write_text("{}")
    for arguments, code, sentence in [
        (("prepare", "absent.txt"), 5, "absent.txt does not exist"),
        (("prepare", ""), 5, "an empty INPUT names no file"),
        (("prepare", "empty.txt"), 3, "empty.txt is empty"),
        (("prepare", "code", "--tokenizer", "t.json"), 3, "t.json is not a tokenizer.json"),
        (("prepare", "code", "--tokenizer", "t.json", "--vocab", "300"), 2, "leave one out"),
        (("prepare", "code", "--vocab", "10"), 3, "--vocab 10 does not hold"),
        (("prepare",), 2, ""),
        (("show", "code"), 5, "code is not a prepared corpus"),
        (("verify", "absent"), 5, "absent is not a prepared corpus"),
    ]:
        done = shoal(*arguments)
        assert done.returncode == code and sentence in done.stderr, (arguments, done)
        assert "Traceback" not in done.stderr
    assert not list(project.glob("data/*"))
