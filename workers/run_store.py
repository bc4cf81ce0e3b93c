"""Runs in an object store, by a URL that fsspec reads (``s3://bucket/runs/first``): fetched into a cache, and checked.

A run's folder there is what ``runs/NAME`` is here. Of it, what a model takes to be used is fetched: recipe.toml,
run.json, tokenizer.json with its settings, and one checkpoint, file by file. A download that was interrupted goes on
where it was; a checkpoint gets its name in the cache when the size and the SHA-256 of every file are those of its
manifest.

The cache is ``SHOAL_CACHE``, else ``~/.cache/shoal``. Several processes of a machine fetch a run once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shoal.workers.checkpoint_files import MANIFEST, FileEntry, Manifest, checkpoint_path, digest, read_manifest, verify
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, ShoalError, last_line

IDENTITY = ("recipe.toml", "run.json", "tokenizer.json", "tokenizer_config.json")  # the first alone must be there
STREAMS = 4  # files that are fetched at once
TRIES = 4  # of a file whose connection breaks
PAUSE = 0.5  # seconds before the second try; doubled for each further one
PIECE = 8 << 20  # bytes read at a time
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of this package, by the URL's scheme
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")


Told = Callable[[str], None]


class _Damaged(Exception):
    """A file in the store is not what its manifest says."""


@dataclass(frozen=True)
class Fetched:
    """A run in the cache. skipped: a sentence for each newer checkpoint that is damaged in the store."""

    folder: Path
    step: int
    skipped: list[str]


def is_url(run: str) -> bool:
    """Whether a RUN is in an object store."""
    return "://" in run


def check_url(url: str) -> None:
    """Refuses what is no URL of a folder, and one with a password in it. Raises InvalidInput."""
    try:
        parts = urlsplit(url)
        secret = parts.password is not None
    except ValueError:
        parts, secret = urlsplit(""), False
    if secret:
        raise InvalidInput(
            f"the URL of a run at {parts.hostname} has a password in it, for all to read: set the variables that the "
            f"store's driver reads instead"
        )
    named = parts.netloc or parts.path.strip("/")
    if not parts.scheme or not named or parts.query or parts.fragment or not url.isprintable():
        raise InvalidInput(f"RUN {url!r} is not the URL of a run: write, say, s3://bucket/runs/first")


def cache_root() -> Path:
    """Where runs are fetched to."""
    return Path(os.environ.get("SHOAL_CACHE") or Path("~/.cache/shoal").expanduser())


def cached_folder(url: str) -> Path:
    """The folder of a run in the cache, whether or not it is there."""
    plain = url.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain.rpartition("/")[2])[:80]
    return cache_root() / "runs" / f"{name}-{hashlib.sha256(plain.encode()).hexdigest()[:12]}"


def checkpoints_here(checkpoints: str, step: int) -> Path:
    """The folder of checkpoints on this machine. checkpoints: its path, or the URL of its run, which is fetched if need
    be. Raises ShoalError."""
    if not is_url(checkpoints):
        return Path(checkpoints)
    folder = cached_folder(checkpoints) / "checkpoints"
    if not checkpoint_path(folder, step).is_dir():  # one that has its name was checked when it was fetched
        fetch_run(checkpoints, step)
    return folder


def fetch_run(url: str, step: int | None = None, told: Told = lambda said: None) -> Fetched:
    """Fetches a run with one checkpoint: that of ``step``, else the newest one that is whole.

    What is in the cache already, and is still what the store's manifest says, is not fetched again. told: is given a
    sentence when something is fetched.

    Raises NotFound, InvalidInput (no driver for the URL, a damaged checkpoint, a full disk), ClusterRefused (the store
    does not let it be read, or cannot be reached).
    """
    check_url(url)
    store = _Store(url)
    folder = cached_folder(url)
    checkpoints = folder / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            for name in IDENTITY:
                _write_whole(folder / name, store.read(name))
            if not (folder / IDENTITY[0]).exists():
                raise NotFound(f"{url} is not a run (it has no recipe.toml): correct the URL")
            chosen, skipped = _fetch_newest(store, checkpoints, step, told)
    except OSError as error:
        raise InvalidInput(
            f"{error.filename or folder} cannot be written ({error.strerror}): free or unlock its disk, or set "
            f"SHOAL_CACHE to another folder"
        ) from None
    return Fetched(folder, chosen, skipped)


def _fetch_newest(store: _Store, checkpoints: Path, step: int | None, told: Told) -> tuple[int, list[str]]:
    steps = [step] if step is not None else store.steps()
    skipped: list[str] = []
    for each in steps:
        try:
            _fetch_checkpoint(store, checkpoints, each, told)
        except _Damaged as damage:
            if step is not None:
                raise InvalidInput(
                    f"checkpoint step-{each} of {store.url} is damaged ({damage}): leave --step out for the newest "
                    f"whole one"
                ) from None
            skipped.append(f"checkpoint step-{each} of {store.url} is damaged ({damage}): skipped")
            continue
        return each, skipped
    if step is None and not skipped:
        raise NotFound(f"{store.url} has no checkpoint: copy its folder checkpoints there")
    raise NotFound(f"{store.url} has no whole checkpoint ({skipped[0]}): copy one there anew")


def _fetch_checkpoint(store: _Store, checkpoints: Path, step: int, told: Told) -> None:
    """Raises _Damaged, NotFound, ShoalError."""
    place = f"checkpoints/step-{step}"
    text = store.read(f"{place}/{MANIFEST}")
    if text is None:
        if store.exists(place):
            raise _Damaged(f"file {MANIFEST}: missing")
        raise NotFound(f"{store.url} has no checkpoint of step {step}: leave --step out for the newest")
    target, drafted = checkpoint_path(checkpoints, step), checkpoint_path(checkpoints / ".fetching", step)
    drafted.parent.mkdir(exist_ok=True)
    if target.is_dir():
        if (target / MANIFEST).is_file() and (target / MANIFEST).read_bytes() == text and not verify(target):
            return
        shutil.rmtree(drafted, ignore_errors=True)
        target.rename(drafted)  # what is whole of it need not be fetched again
    drafted.mkdir(exist_ok=True)
    _write_whole(drafted / MANIFEST, text)
    manifest = _manifest(drafted, step)
    for extra in {path.name for path in drafted.iterdir()} - {MANIFEST, *manifest.files}:
        (drafted / extra).unlink()
    size = sum(entry.bytes for entry in manifest.files.values())
    told(f"fetching checkpoint step-{step} of {store.url}, {size / 1e6:,.1f} MB, to {checkpoints.parent}")
    with ThreadPoolExecutor(STREAMS) as pool:
        jobs = [
            pool.submit(_fetch_file, store, f"{place}/{name}", drafted / name, entry)
            for name, entry in manifest.files.items()
        ]
        for job in jobs:
            job.result()
    if problems := verify(drafted, hashes=False):
        raise _Damaged(problems[0])
    drafted.rename(target)


def _manifest(folder: Path, step: int) -> Manifest:
    try:
        found = read_manifest(folder)
    except InvalidInput as error:
        raise _Damaged(str(error)) from None
    if found.step != step:
        raise _Damaged(f"file {MANIFEST}: it is of step {found.step}")
    return found


def _fetch_file(store: _Store, place: str, target: Path, entry: FileEntry) -> None:
    """Goes on with what is there of the file. Raises _Damaged, ShoalError, OSError of this machine's disk."""
    for fresh in (False, True):
        if fresh:
            target.unlink(missing_ok=True)
        have = target.stat().st_size if target.exists() else 0
        if have > entry.bytes:
            target.unlink()
        if have != entry.bytes or not target.exists():
            _download(store, place, target, entry.bytes)
        if digest(target, sync=True).sha256 == entry.sha256:
            return
    raise _Damaged(f"file {target.name}: hash differs")


def _download(store: _Store, place: str, target: Path, size: int) -> None:
    pause = PAUSE
    for attempt in range(TRIES):
        with target.open("ab") as file:
            try:
                for piece in store.pieces(place, file.tell(), size):
                    file.write(piece)
                return
            except ClusterRefused:
                if attempt == TRIES - 1:
                    raise
        time.sleep(pause)
        pause *= 2


def _write_whole(file: Path, content: bytes | None) -> None:
    """Writes a file, whole or not at all; None removes one that is not in the store any more."""
    if content is None:
        file.unlink(missing_ok=True)
        return
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_bytes(content)
    draft.replace(file)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a run in the cache for one process, no longer than the process lives."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system may know no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class _Store:
    """The folder at a URL, as fsspec sees it; what it raises is said in a sentence."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = self.url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise InvalidInput(f"{url} takes fsspec to be read, which is not installed: pip install fsspec") from None
        try:
            self._fs, self._root = url_to_fs(self.url)
            self._fs.invalidate_cache()
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            remedy = f"pip install 'shoal[{extra}]'" if extra else "install it"
            raise InvalidInput(
                f"{url} takes a driver of fsspec that is not installed ({last_line(error)}): {remedy}"
            ) from None
        except ValueError as error:
            raise InvalidInput(f"{url} cannot be read by fsspec ({last_line(error)}): correct the URL") from None
        except Exception as error:  # each driver has errors of its own
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> ShoalError:
        return ClusterRefused(
            f"{self.url} cannot be read ({last_line(error) or type(error).__name__}): check the URL, and the "
            f"credentials that its driver is given"
        )

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What the store answers, None for what is not there."""
        try:
            return ask()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except Exception as error:
            raise self._refused(error) from None

    def read(self, place: str) -> bytes | None:
        """A small file, None when it is not there."""
        found: bytes | None = self._asked(lambda: self._fs.cat_file(f"{self._root}/{place}"))
        return found

    def exists(self, place: str) -> bool:
        """Whether there is such a folder."""
        return bool(self._asked(lambda: self._fs.ls(f"{self._root}/{place}", detail=False)))

    def steps(self) -> list[int]:
        """Steps of the checkpoints there, the newest first."""
        names = self._asked(lambda: self._fs.ls(f"{self._root}/checkpoints", detail=False)) or []
        found = [_STEP.fullmatch(str(name).rstrip("/").rpartition("/")[2]) for name in names]
        return sorted({int(match[1]) for match in found if match}, reverse=True)

    def pieces(self, place: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes of a file from ``begin`` to ``end``. Raises _Damaged when it is shorter or not there."""
        try:
            with self._fs.open(f"{self._root}/{place}", "rb", block_size=PIECE) as source:
                source.seek(begin)
                while begin < end:
                    piece = source.read(min(PIECE, end - begin))
                    if not piece:
                        raise _Damaged(f"file {place.rpartition('/')[2]}: {begin} bytes instead of {end}")
                    begin += len(piece)
                    yield piece
        except (_Damaged, GeneratorExit):
            raise
        except FileNotFoundError:
            raise _Damaged(f"file {place.rpartition('/')[2]}: missing") from None
        except Exception as error:
            raise self._refused(error) from None
