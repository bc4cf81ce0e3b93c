"""A folder of code as a .zip small enough for a ConfigMap: the same files give the same bytes."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput, NotFound

LARGEST = 900_000  # bytes; a ConfigMap holds 1 MiB, its text in base64 is what etcd and the API count
_LEFT_OUT = {"__pycache__", "runs", "data", "build", "dist", "node_modules", "venv"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


def is_url(working_dir: str) -> bool:
    """Whether it is fetched by Ray rather than sent along."""
    return "://" in working_dir


def zip_folder(folder: str) -> bytes:
    """The folder's files, but for hidden ones, caches, runs and data; links are followed.

    Raises NotFound, InvalidInput when it is empty or too large to be sent along.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotFound(f"--working-dir {quote(folder)} is not a folder: name one, or the URL of a .zip")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _files(root):
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix(), _EPOCH)
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        empty = not archive.namelist()
    if empty:
        raise InvalidInput(f"--working-dir {quote(folder)} holds no file: name the folder of the code")
    if buffer.tell() > LARGEST:
        raise InvalidInput(
            f"--working-dir {quote(folder)} is {buffer.tell() / 1e6:.1f} MB zipped, and {LARGEST / 1e6:.1f} MB can be "
            f"sent along: put a .zip of it somewhere and give its URL"
        )
    return buffer.getvalue()


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files below a folder, sorted; a link to a folder above itself is not followed round and round."""
    above |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _LEFT_OUT or path.suffix in (".egg-info", ".pyc"):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in above:
            yield from _files(path, above)
