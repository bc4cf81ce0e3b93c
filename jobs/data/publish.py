"""A folder that appears whole or not at all: written beside its target, flushed, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.jobs.interrupt import interruptible
from shoal.workers.data.manifest import is_corpus
from shoal.workers.errors import InvalidInput

SCRATCH = ".shoal-scratch-"  # begins the name of a folder that is being written
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def publishing(target: Path, force: bool = False, option: str = "--out") -> Iterator[Path]:
    """Yield a scratch folder that becomes ``target`` when the block ends well, and is removed when it does not.

    option: what of the command line chooses the target. force: replace a corpus. In the block, SIGTERM and SIGHUP are
    treated like Ctrl-C, so that they leave nothing either.

    Raises InvalidInput when ``target`` exists (with ``force``: when it is no corpus), is a symbolic link or no name of
    a folder, and when it cannot be written, be it a full disk, a read-only file system or a missing permission.
    """
    _check_target(target, force, option)
    with interruptible():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target)
            scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        except OSError as error:
            raise _refusal(target, error, option) from None
        lock = os.open(scratch, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            scratch.chmod(0o777 & ~umask())
            yield scratch
            _flush(scratch)
            _check_target(target, force, option)
            _move(scratch, target)
        except OSError as error:
            raise _refusal(target, error, option) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_target(target: Path, force: bool, option: str) -> None:
    if target.name in ("", ".."):
        raise InvalidInput(f"{target} is no name of a new folder: choose another {option}")
    if target.is_symlink():
        raise InvalidInput(f"{target} is a symbolic link: choose another {option}, or the place it points to")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        if not force:
            replaced = ", or replace it with --force" if option == "--out" else ""
            raise InvalidInput(f"{target} exists already: choose another {option}{replaced}")
        if not is_corpus(target):
            raise InvalidInput(f"{target} is not a corpus, so --force does not replace it: choose another {option}")


def _refusal(target: Path, error: OSError, option: str) -> InvalidInput:
    """One sentence for a failed write; pyarrow gives the number of an error, but no text of its own for it."""
    why = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = f"free some space there or choose another {option}" if full else f"choose another {option}"
    return InvalidInput(f"{target} cannot be written ({why}): {remedy}")


def umask() -> int:
    """The permissions that this process takes from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _prefix(target: Path) -> str:
    return f"{SCRATCH}{target.name}-"


def _remove_abandoned(target: Path) -> None:
    """Remove the scratch folders of processes that were killed: those whose lock nobody holds."""
    ours = re.compile(re.escape(_prefix(target)) + "[a-z0-9_]{8}")  # what mkdtemp appends
    for folder in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        with suppress(OSError):  # it may have become its target by now, or be another user's
            _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move(scratch: Path, target: Path) -> None:
    """Rename ``scratch`` to ``target``. What stood there ends up at ``scratch``, in one step where the system can."""
    if not target.exists() or not any(target.iterdir()):
        scratch.rename(target)
    elif not _exchange(scratch, target):
        aside = scratch.with_name(scratch.name + ".old")
        target.rename(aside)
        scratch.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once (Linux, renameat2); False where there is no such call."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
