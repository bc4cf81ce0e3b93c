"""Runs in an object store: fetched whole or named as damaged, gone on with after a break, never fetched twice."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from shoal.workers import run_store
from shoal.workers.checkpoint import Checkpointer
from shoal.workers.checkpoint_files import verify
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound
from shoal.workers.run_store import cached_folder, checkpoints_here, fetch_run

IDENTITY = {
    "recipe.toml": "name = 'first'", "run.json": "{}", "tokenizer.json": "{}", "tokenizer_config.json": "{}"
}  # fmt: skip


class Shaky(LocalFileSystem):
    """A store over a folder that counts the bytes it gives of tensors, and breaks once it gave ``budget`` of them."""

    protocol = "shaky"
    given = 0
    budget: int | None = None
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("shaky://").rstrip("/")

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **more: Any) -> Any:
        return _Counted(Path(path).open(mode), path.endswith(".safetensors"))


class _Counted:
    def __init__(self, file: Any, counts: bool) -> None:
        self._file, self._counts = file, counts

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    close = __exit__

    def seek(self, *where: int) -> int:
        return int(self._file.seek(*where))

    def read(self, size: int = -1) -> bytes:
        if not self._counts:
            return bytes(self._file.read(size))
        with Shaky.lock:
            if Shaky.budget is not None:
                if Shaky.given >= Shaky.budget:
                    raise ConnectionError("the line broke")
                size = min(size, Shaky.budget - Shaky.given)
            piece = bytes(self._file.read(size))
            Shaky.given += len(piece)
        return piece


fsspec.register_implementation("shaky", Shaky, clobber=True)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_store, "PAUSE", 0.0)
    Shaky.given, Shaky.budget = 0, None
    yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in the store, with checkpoints of steps 20 and 40."""
    folder = tmp_path / "store" / "runs" / "first"
    folder.mkdir(parents=True)
    for name, text in IDENTITY.items():
        (folder / name).write_text(text)
    save(folder, 20, 40)
    return folder


def save(run: Path, *steps: int, value: float = 1.0) -> None:
    checkpointer = Checkpointer(run / "checkpoints", keep=9, group=None, rank=0, world=1)
    for step in steps:
        checkpointer.save(step, {"w": torch.full((5000,), step * value)}, {"step": step})
    checkpointer.wait()


def url(run: Path) -> str:
    return f"shaky://{run}"


def tensors(folder: Path, step: int) -> Path:
    (file,) = (folder / "checkpoints" / f"step-{step}").glob("*.safetensors")
    return file


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_the_newest_checkpoint_is_fetched_once(run: Path) -> None:
    said: list[str] = []
    found = fetch_run(url(run), told=said.append)
    assert (found.step, found.skipped) == (40, []) and found.folder == cached_folder(url(run) + "/")
    assert {path.name for path in found.folder.glob("*.*")} == set(IDENTITY)
    assert tensors(found.folder, 40).read_bytes() == tensors(run, 40).read_bytes()
    assert [path.name for path in (found.folder / "checkpoints").glob("step-*")] == ["step-40"]
    assert len(said) == 1 and "fetching checkpoint step-40 of shaky://" in said[0]
    size = Shaky.given
    assert size == tensors(run, 40).stat().st_size
    assert fetch_run(url(run), told=said.append) == found
    assert checkpoints_here(url(run), 40) == found.folder / "checkpoints"
    assert (Shaky.given, len(said)) == (size, 1)
    (run / "tokenizer_config.json").unlink()  # few runs have one
    assert fetch_run(url(run)) == found and not (found.folder / "tokenizer_config.json").exists()
    assert checkpoints_here(url(run), 20) == found.folder / "checkpoints" and tensors(found.folder, 20).exists()
    assert checkpoints_here("/a/path", 3) == Path("/a/path")


def test_an_interrupted_download_goes_on_where_it_was(run: Path) -> None:
    size = tensors(run, 40).stat().st_size
    Shaky.budget = size // 3
    with pytest.raises(ClusterRefused, match=r"cannot be read \(the line broke\): check the URL, and the credentials"):
        fetch_run(url(run))
    assert Shaky.given == size // 3 and not (cached_folder(url(run)) / "checkpoints" / "step-40").exists()
    Shaky.budget = None
    found = fetch_run(url(run))
    assert Shaky.given == size and verify(found.folder / "checkpoints" / "step-40") == []


def test_a_broken_download_of_another_file_is_begun_anew(run: Path) -> None:
    size = tensors(run, 40).stat().st_size
    Shaky.budget = size // 3
    with pytest.raises(ClusterRefused):
        fetch_run(url(run))
    (part,) = cached_folder(url(run)).rglob("*.safetensors")
    flip(part)
    Shaky.budget = None
    found = fetch_run(url(run))
    assert tensors(found.folder, 40).read_bytes() == tensors(run, 40).read_bytes()
    assert Shaky.given == size + size, "what was there, the rest, and all of it again"


def _shorten(run: Path) -> None:
    file = tensors(run, 40)
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: flip(tensors(run, 40)), "hash differs"),
        (_shorten, "bytes instead of"),
        (lambda run: tensors(run, 40).unlink(), "missing"),
        (lambda run: (run / "checkpoints" / "step-40" / "manifest.json").unlink(), "file manifest.json: missing"),
        (lambda run: (run / "checkpoints" / "step-40" / "manifest.json").write_text("{"), "file manifest.json: "),
    ],
)
def test_a_checkpoint_that_is_damaged_in_the_store_is_passed_over(run: Path, damage: Any, says: str) -> None:
    damage(run)
    found = fetch_run(url(run))
    assert found.step == 20 and len(found.skipped) == 1 and says in found.skipped[0]
    assert not (found.folder / "checkpoints" / "step-40").exists()
    with pytest.raises(InvalidInput, match=rf"step-40 of \S+ is damaged \(.*{says}.*\): leave --step out"):
        fetch_run(url(run), 40)


def test_a_manifest_cannot_write_outside_the_cache(run: Path) -> None:
    file = run / "checkpoints" / "step-40" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"]["../../../evil"] = {"sha256": "0" * 64, "bytes": 0}
    file.write_text(json.dumps(manifest))
    assert fetch_run(url(run)).step == 20


def test_a_cache_that_was_damaged_or_is_old_is_made_good(run: Path) -> None:
    found = fetch_run(url(run))
    flip(tensors(found.folder, 40))
    before = Shaky.given
    assert fetch_run(url(run)) == found and verify(found.folder / "checkpoints" / "step-40") == []
    assert Shaky.given - before == tensors(run, 40).stat().st_size
    shutil.rmtree(run / "checkpoints")
    save(run, 40, value=3.0)  # trained again, to the same step
    (run / "recipe.toml").write_text("name = 'anew'")
    fetch_run(url(run))
    assert tensors(found.folder, 40).read_bytes() == tensors(run, 40).read_bytes()
    assert (found.folder / "recipe.toml").read_text() == "name = 'anew'"


def test_processes_that_want_a_run_at_once_fetch_it_once(run: Path) -> None:
    threads = [threading.Thread(target=fetch_run, args=(url(run),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Shaky.given == tensors(run, 40).stat().st_size


def test_other_stores_are_read_as_fsspec_reads_them(run: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/bucket/runs/first", recursive=True)
    found = fetch_run("memory://bucket/runs/first")
    assert found.step == 40 and found.folder.name.startswith("first-")
    assert fetch_run(f"file://{run}").step == 40


@pytest.mark.parametrize(
    ("where", "kind", "says"),
    [
        ("shaky:///none", NotFound, r"is not a run \(it has no recipe.toml\)"),
        ("nosuch://bucket/run", InvalidInput, r"cannot be read by fsspec \(Protocol not known: nosuch\)"),
        ("s3://me:secret@bucket/run", InvalidInput, "has a password in it, for all to read"),
        ("s3://", InvalidInput, "is not the URL of a run"),
        ("s3://bucket/run?x=1", InvalidInput, "is not the URL of a run"),
    ],
)
def test_what_is_no_run_is_refused(where: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as refused:
        fetch_run(where)
    assert "secret" not in str(refused.value)


def test_a_driver_that_is_missing_is_named_with_its_remedy() -> None:
    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(
        InvalidInput, match=r"takes a driver of fsspec that is not installed .*: pip install 'shoal\[s3"
    ):
        fetch_run("s3://bucket/run")


def test_a_run_without_checkpoints_or_space_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has no checkpoint of step 30: leave --step out"):
        fetch_run(url(run), 30)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(NotFound, match="has no checkpoint: copy its folder checkpoints there"):
        fetch_run(url(run))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InvalidInput, match=r"cannot be written .* set SHOAL_CACHE to another folder"):
        fetch_run(url(run))
