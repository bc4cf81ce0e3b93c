"""A folder of code as a .zip, small enough for a ConfigMap unless told otherwise: same files, same bytes."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput, NotFound

LARGEST = 900_000  # bytes; a ConfigMap holds 1 MiB, its text in base64 is what etcd and the API count
_OUTPUTS = {"runs", "data", "build", "dist"}  # at the root, where they are no packages
_CACHES = {"__pycache__", "node_modules", "venv", ".mypy_cache", ".pytest_cache", ".ruff_cache"}  # anywhere
_CHUNK = 1 << 16
_SHOWN = 8  # of what was left out
_EPOCH = (1980, 1, 1, 0, 0, 0)

NOTHING: Mapping[str, bytes] = {}

Skip = Callable[[Path], None]


def is_url(working_dir: str) -> bool:
    """Whether it is fetched by Ray rather than sent along."""
    return "://" in working_dir


def zip_folder(
    folder: str | None,
    told: Callable[[str], None] = lambda said: None,
    largest: int = LARGEST,
    more: Mapping[str, bytes] = NOTHING,
) -> bytes:
    """The folder's files, but for hidden ones, caches, and the root's runs, data, build and dist.

    Such a folder at the root is sent along where it is a package (has an ``__init__.py``). Links are followed within
    the folder, and left out where they lead elsewhere. told: is given a sentence on what was left out. largest: bytes
    of the .zip. more: files besides, by their paths; without a folder they are all.

    Raises NotFound, InvalidInput when it is empty, cannot be read, or is too large to be sent along.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in more.items():
            archive.writestr(_entry(name), content)
        if folder is not None:
            _add_folder(archive, folder, told, largest)
    return buffer.getvalue()


def _add_folder(archive: zipfile.ZipFile, folder: str, told: Callable[[str], None], largest: int) -> None:
    root, skipped, before = Path(folder), list[str](), len(archive.namelist())
    if not root.is_dir():
        raise NotFound(f"--working-dir {quote(folder)} is not a folder: name one, or the URL of a .zip")
    try:
        for path in _files(root, lambda path: skipped.append(path.relative_to(root).as_posix())):
            _add(archive, path, path.relative_to(root).as_posix(), folder, largest)
    except OSError as error:
        raise InvalidInput(
            f"--working-dir {quote(folder)}: {quote(str(error.filename))} cannot be read ({error.strerror}): "
            f"make it readable, or move it elsewhere"
        ) from None
    if len(archive.namelist()) == before:
        raise InvalidInput(f"--working-dir {quote(folder)} holds no file: name the folder of the code")
    _check_size(archive, folder, largest)
    if skipped:
        others = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        told(f"--working-dir {quote(folder)} goes without {', '.join(map(quote, skipped[:_SHOWN]))}{others}")


def _entry(name: str, executable: bool = False) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o755 if executable else 0o644) << 16
    return entry


def _add(archive: zipfile.ZipFile, path: Path, name: str, folder: str, largest: int) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidInput(
            f"--working-dir {quote(folder)}: the name of {quote(name)} is not UTF-8: give it another"
        ) from None
    entry = _entry(name, os.access(path, os.X_OK))
    with path.open("rb") as source, archive.open(entry, "w") as target:
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            _check_size(archive, folder, largest)


def _check_size(archive: zipfile.ZipFile, folder: str, largest: int) -> None:
    if archive.fp is not None and archive.fp.tell() > largest:
        raise InvalidInput(
            f"--working-dir {quote(folder)} is more than {largest / 1e6:.1f} MB zipped, which is what can be sent "
            f"along: put a .zip of it somewhere and give its URL"
        )


def _files(root: Path, skip: Skip, folder: Path | None = None, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files below a folder, sorted; a link to a folder above itself is not followed round and round."""
    whole, folder = _real(root), folder or root
    above |= {_real(folder)}
    for path in sorted(folder.iterdir()):
        if path.name in _CACHES or path.suffix in (".egg-info", ".pyc"):
            continue
        elsewhere = path.is_symlink() and not _real(path).is_relative_to(whole)
        output = folder == root and path.name in _OUTPUTS and path.is_dir() and not (path / "__init__.py").is_file()
        if path.name.startswith(".") or elsewhere or output:
            skip(path)
        elif path.is_file():
            yield path
        elif path.is_dir() and _real(path) not in above:
            yield from _files(root, skip, path, above)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises at a link to itself
