"""A corpus is there whole or not at all: whatever fails, or is killed, leaves nothing beside what was there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from small_texts import SMALL, TEXTS, make

from shoal.jobs.data.inspect import check_files
from shoal.jobs.data.prepare import prepare
from shoal.jobs.data.publish import publishing
from shoal.jobs.data.readers import ReadOptions, TextSource, open_inputs
from shoal.workers.data.manifest import read_manifest
from shoal.workers.errors import InvalidInput


def test_force_replaces_a_corpus_and_only_a_corpus(tmp_path: Path) -> None:
    first = make(tmp_path / "c", TEXTS)
    with pytest.raises(InvalidInput, match=r"c exists already: .* --force"):
        make(tmp_path / "c", TEXTS[:20])
    assert read_manifest(tmp_path / "c") == first
    second = prepare([TextSource("texts", TEXTS[:20])], tmp_path / "c", SMALL, force=True)
    assert read_manifest(tmp_path / "c") == second != first
    assert set(check_files(tmp_path / "c").values()) == {"ok"}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(InvalidInput, match="home is not a corpus, so --force does not replace it"):
        prepare([TextSource("texts", TEXTS)], tmp_path / "home", SMALL, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "home"]


def test_a_failure_leaves_the_old_corpus_and_nothing_else(tmp_path: Path) -> None:
    old = make(tmp_path / "c", TEXTS)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(InvalidInput, match=r"bad\.jsonl, line 2 is not JSON"):
        prepare(open_inputs([bad], ReadOptions()), tmp_path / "c", SMALL, force=True)
    assert read_manifest(tmp_path / "c") == old and set(check_files(tmp_path / "c").values()) == {"ok"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "c"]


def test_a_killed_preparation_is_no_corpus_and_the_next_one_clears_it_away(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from shoal.jobs.data.publish import publishing\n"
        "with publishing(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'train-00000.parquet').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], timeout=60)
    assert killed.returncode == -9 and not (tmp_path / "c").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".shoal-scratch-c-")
    kept = ["c.tmp-keep", ".shoal-scratch-c-keep", ".shoal-scratch-c-x-abcd1234", f"{left.name}.old"]
    for name in kept:
        (tmp_path / name).mkdir()
    with publishing(tmp_path / "c") as own:
        assert not left.exists()
        with publishing(tmp_path / "c") as other:  # a second one at the same time leaves the first alone
            assert own.exists() and other != own
            (other / "x").touch()
        (own / "y").touch()
        (tmp_path / "c" / "x").unlink()
    with publishing(tmp_path / "*"), publishing(tmp_path / "?"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "c", "*", "?"])
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["y"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_preparation_that_is_told_to_end_clears_away_itself(number: signal.Signals, tmp_path: Path) -> None:
    """Unless whoever started it has the signal ignored, as nohup does."""
    code = (
        "import os, signal, sys; from pathlib import Path; from shoal.jobs.data.publish import publishing\n"
        "number = int(sys.argv[2]); signal.signal(number, getattr(signal, sys.argv[3]))\n"
        "with publishing(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'train-00000.parquet').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), number)\n"
        "print(signal.getsignal(number) is getattr(signal, sys.argv[3]))\n"
    )
    for handler in ("SIG_DFL", "SIG_IGN"):
        arguments = [sys.executable, "-c", code, str(tmp_path / "c"), str(number.value), handler]
        told = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
        if handler == "SIG_DFL":
            assert "KeyboardInterrupt" in told.stderr and list(tmp_path.iterdir()) == []
        else:
            assert told.stdout == "True\n", told.stderr
            assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", [".", "..", "a/..", "/", "empty", "dangling"])
def test_a_target_that_is_no_name_of_a_new_folder_is_refused_before_anything_is_done(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "a")
    (tmp_path / "there").mkdir()
    Path("empty").symlink_to(tmp_path / "there")
    Path("dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    said = "is a symbolic link: choose another --to" if name.isalpha() else "is no name of a new folder: choose"
    with pytest.raises(InvalidInput, match=said), publishing(Path(name), option="--to"):
        raise AssertionError("work was begun")
    assert sorted(tmp_path.rglob("*")) == before


def run_limited(prologue: str, inputs: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Prepare in a process that first runs ``prologue``; a ShoalError ends it with its exit code and its sentence."""
    code = f"""
import os, resource, sys
from pathlib import Path
from shoal.jobs.data.prepare import *
from shoal.jobs.data.readers import *
from shoal.workers.errors import ShoalError
import pyarrow.parquet, tokenizers
sources = open_inputs([Path(sys.argv[1])], ReadOptions())
{prologue}
try:
    prepare(sources, Path(sys.argv[2]), PrepareOptions(vocabulary=600, group_tokens=20000))
except ShoalError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    return subprocess.run(
        [sys.executable, "-c", code, str(inputs), str(out)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("limit", [1000, 20_000, 60_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """No file may grow beyond ``limit`` bytes: the tokenizer's, or the Parquet's, does not fit."""
    prologue = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = run_limited(prologue, Path(json.__file__).parents[1] / "asyncio", tmp_path / "c")
    assert (done.returncode, done.stderr) == (3, "")
    assert "c cannot be written (File too large): free some space there" in done.stdout and done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_is_one_sentence(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "in.txt").write_text("\n".join(TEXTS))
        closed = folder / "closed"
        closed.mkdir(mode=0o555)
        done = run_limited("os.getuid() or os.setresuid(65534, 65534, 65534)", folder / "in.txt", closed / "c")
        assert (done.returncode, done.stderr) == (3, "")
        assert "closed/c cannot be written (Permission denied)" in done.stdout
        assert list(closed.iterdir()) == []


def test_an_out_folder_below_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInput, match=r"file/c cannot be written \((Not a directory|File exists)\)"):
        make(tmp_path / "file" / "c", TEXTS)
