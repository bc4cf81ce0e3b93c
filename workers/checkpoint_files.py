"""Checkpoints as files: what is there, whether it is whole, and how it comes and goes. Imports no torch.

A run's ``checkpoints`` folder holds one folder a checkpoint, ``step-N``, and in it:

- ``*.safetensors``: tensors by name, each in one file, it does not matter which. A name does not depend on the rank
  that hosts the tensor, so a checkpoint opens on any number of ranks. It is any text but ``__metadata__``.
- ``state.json``: everything that is not a tensor.
- ``manifest.json``: ``{"format": 1, "step", "time", "world", "software": {…}, "files": {name: {"sha256", "bytes"}}}``.

A folder without a manifest, or whose files differ from it, is damaged and never loaded. Nothing is ever unpickled.

A checkpoint is written in ``.step-N.tmp-RANDOM`` and renamed when every byte is on the disk, manifest last; its writer
holds a lock (flock) on the folder, which ends with the process. One that is removed is first renamed to
``.step-N.old-RANDOM``; one that is written anew steps aside as ``.step-N.replaced-RANDOM`` until the new one stands.
So a process may die at any instant: ``step-N`` is always whole, and ``clean_leftovers`` tidies up the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from shoal.workers.errors import InvalidInput, NotFound

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ".safetensors"
RESERVED = "__metadata__"  # the one name that a tensor of a safetensors file cannot have
_PUBLISHED = re.compile(r"step-(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"\.step-([0-9]+)\.(tmp|old|replaced)-[0-9a-f]+")


def _plain_name(name: str) -> str:
    """A file of the checkpoint's own folder: no path, so that a manifest cannot point outside."""
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{name!r} is a path, and a manifest may name only files of its own folder")
    return name


class FileEntry(BaseModel):
    """What a file of a checkpoint must be: its SHA-256 in hex and its size in bytes."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(BaseModel):
    """The content of ``manifest.json``. ``time`` is ISO 8601 in UTC, ``world`` the number of ranks that wrote it."""

    format: Literal[1] = 1
    step: int = Field(ge=0)
    time: str
    world: int = Field(ge=1)
    software: dict[str, str]
    files: dict[Annotated[str, AfterValidator(_plain_name)], FileEntry]


@dataclass(frozen=True)
class CheckpointInfo:
    """A published checkpoint; ``manifest`` is None when it cannot be read."""

    step: int
    path: Path
    manifest: Manifest | None

    @property
    def bytes(self) -> int:
        """Size of its files in bytes, as its manifest says."""
        return sum(entry.bytes for entry in self.manifest.files.values()) if self.manifest else 0


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step}"


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """The published checkpoints of a folder, by step; damaged ones too. Empty when there is no such folder."""
    found = []
    for path in _entries(folder):
        if (match := _PUBLISHED.fullmatch(path.name)) and path.is_dir():
            manifest = None
            with contextlib.suppress(InvalidInput):
                manifest = read_manifest(path)
            found.append(CheckpointInfo(int(match[1]), path, manifest))
    return sorted(found, key=lambda info: info.step)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``.

    Raises:
        InvalidInput: it is missing, cannot be read, or is not what a manifest must be.
    """
    file = path / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        raise InvalidInput(f"file {MANIFEST}: missing") from None
    except OSError as error:
        raise InvalidInput(f"file {MANIFEST}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"file {MANIFEST}: {where + ': ' if where else ''}{first['msg']}") from None


def verify(path: Path, hashes: bool = True) -> list[str]:
    """What is wrong with the checkpoint at ``path``, in words; empty when it is whole.

    Args:
        path: a ``step-N`` folder.
        hashes: read every byte. False compares only names and sizes, which costs nothing.
    """
    try:
        manifest = read_manifest(path)
    except InvalidInput as error:
        return [str(error)]
    problems = []
    if path.name != f"step-{manifest.step}":
        problems.append(f"file {MANIFEST}: it is of step {manifest.step}")
    for name, entry in sorted(manifest.files.items()):
        if problem := _problem_of_file(path / name, entry, hashes):
            problems.append(f"file {name}: {problem}")
    # A reader takes in every tensor file of the folder, so one that nobody vouches for counts as damage.
    for extra in sorted(file.name for file in _entries(path) if file.suffix == TENSORS):
        if extra not in manifest.files:
            problems.append(f"file {extra}: not in the manifest")
    if STATE not in manifest.files:
        problems.append(f"file {STATE}: not in the manifest")
    elif not problems:
        try:
            read_state(path)
        except (InvalidInput, NotFound) as error:
            problems.append(str(error))
    return problems


def _problem_of_file(file: Path, entry: FileEntry, hashes: bool) -> str:
    """What is wrong with one file, or an empty string."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        if status.st_size != entry.bytes:
            return f"{status.st_size} bytes instead of {entry.bytes}"
        if hashes and digest(file).sha256 != entry.sha256:
            return "hash differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def last_good(folder: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """The newest checkpoint whose hashes hold, and a sentence for each newer one that was skipped.

    Returns:
        ``(None, sentences)`` when none is whole. Reads the bytes of each checkpoint it looks at.
    """
    damaged: list[str] = [
        f"{path} is not a checkpoint (no folder named step-N)"
        for path in _entries(folder)
        if path.name.startswith("step-") and not (_PUBLISHED.fullmatch(path.name) and path.is_dir())
    ]
    good = None
    for info in reversed(list_checkpoints(folder)):
        problems = verify(info.path)
        if not problems:
            good = info
            break
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        damaged.append(f"checkpoint {info.path} is damaged ({problems[0]}{more})")
    instead = f"using {good.path.name}" if good else "and there is no older one that is whole"
    return good, [f"{sentence}: skipped, {instead}" for sentence in damaged]


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of the checkpoint at ``path``.

    Raises:
        NotFound: there is none.
        InvalidInput: it is not a JSON object.
    """
    file = path / STATE
    try:
        state = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{file} does not exist: choose another checkpoint") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file} is not valid JSON ({error}): choose another checkpoint") from None
    if not isinstance(state, dict):
        raise InvalidInput(f"{file} holds no JSON object: choose another checkpoint")
    return state


def tensor_names(path: Path) -> list[str]:
    """The names of all tensors of the checkpoint at ``path``, sorted. Reads the files' heads only.

    Raises:
        InvalidInput: a file is not safetensors.
    """
    names: set[str] = set()
    for file in sorted(path.glob(f"*{TENSORS}")):
        try:
            with safe_open(file, framework="numpy") as opened:
                names.update(opened.keys())
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"{file} is not a safetensors file ({error}): choose another checkpoint") from None
    return sorted(names)


# Writing


def prepare_folder(folder: Path) -> None:
    """Makes the folder, tries that it can be written, and tidies up after writers that died.

    Raises:
        InvalidInput: nothing can be written there.
    """
    if not folder.parent.exists():  # the driver made it: this is another machine, or it was removed
        raise InvalidInput(
            f"{folder.parent} is not there on {socket.gethostname()}, where rank 0 runs: "
            "put the runs on a file system that all nodes share"
        )
    try:
        folder.mkdir(exist_ok=True)
        clean_leftovers(folder)
        with draft(folder, 0):
            pass
    except OSError as error:
        raise InvalidInput(
            f"checkpoint folder {folder} cannot be written ({error.strerror}): "
            "make it writable or choose another run folder"
        ) from None


@contextlib.contextmanager
def draft(folder: Path, step: int) -> Iterator[Path]:
    """A locked temporary folder to write a checkpoint in. What of it was not published is removed at the end."""
    path = folder / f".step-{step}.tmp-{secrets.token_hex(4)}"
    path.mkdir()
    lock = os.open(path, os.O_RDONLY)
    try:
        # A network file system may know no locks: then a dead writer cannot be told from a live one, see _locked.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def write_json(file: Path, text: str) -> FileEntry:
    """Writes ``text`` to a new file and to the disk; returns its entry for the manifest."""
    file.write_text(text, encoding="utf-8")
    return digest(file, sync=True)


def digest(file: Path, sync: bool = False) -> FileEntry:
    """The manifest's entry of a file; with ``sync``, its bytes are on the disk when this returns."""
    with file.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileEntry(sha256=sha256, bytes=stream.tell())


def publish(drafted: Path, manifest: Manifest) -> Path:
    """Writes the manifest into ``drafted`` and gives the folder its final name, in one rename.

    An older checkpoint of the same step (one that was damaged, and whose steps were trained again) is replaced.

    Raises:
        OSError: ``drafted`` is still a draft, and the older checkpoint is where it was.
    """
    write_json(drafted / MANIFEST, manifest.model_dump_json(indent=1))
    _sync_folder(drafted)
    folder = drafted.parent
    target = checkpoint_path(folder, manifest.step)
    replaced = _set_aside(target, "replaced") if target.exists() else None
    try:
        drafted.rename(target)
    except OSError:
        if replaced:
            replaced.rename(target)
        raise
    _sync_folder(folder)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    return target


def prune(folder: Path, keep: int, newest: int) -> None:
    """Removes all but the ``keep`` last checkpoints up to step ``newest``, which was just published and stays.

    Checkpoints of later steps are of an earlier try; they are replaced when training gets there again.
    """
    steps = [info.path for info in list_checkpoints(folder) if info.step <= newest]
    for path in steps[: -max(keep, 1)]:
        shutil.rmtree(_set_aside(path, "old"), ignore_errors=True)


def clean_leftovers(folder: Path) -> None:
    """Removes what dead writers left, and puts back a checkpoint that was about to be replaced."""
    for path in _entries(folder):
        if not (match := _LEFTOVER.fullmatch(path.name)) or _locked(path):
            continue
        target = checkpoint_path(folder, int(match[1]))
        if match[2] == "replaced" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def wait_for_writers(folder: Path, seconds: float = 60.0) -> None:
    """Returns when no process holds a checkpoint in ``folder`` for writing, or after ``seconds``.

    A rank that was told to die may publish its last checkpoint, and prune older ones, a moment later.
    """
    deadline = time.monotonic() + seconds
    while any(_locked(path) for path in _entries(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _set_aside(path: Path, why: str) -> Path:
    return path.rename(path.with_name(f".{path.name}.{why}-{secrets.token_hex(4)}"))


def _locked(path: Path) -> bool:
    """Whether a live process writes in this folder. Without locks nobody does: a run has one trainer."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _sync_folder(folder: Path) -> None:
    """Puts the folder's entries on the disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
