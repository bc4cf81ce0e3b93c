"""Tensors in safetensors files: read one at a time by name, written file by file, and room for them on the disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.jobs.data.publish import umask
from shoal.jobs.hf.layout import Shapes
from shoal.workers.errors import InvalidInput, NotFound

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ROOM = 1 << 26  # bytes beside tensors: heads, tokenizers, what the file system itself needs (an allowance)


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and what: ``dtype`` by PyTorch's name, or by that of safetensors where it has no such one."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of some files. Heads are read when it is made; a tensor is read when it is asked for.

    wanted: which names are taken; others are as if they were not there.

    Raises InvalidInput for a file that is damaged or cannot be read, and for a name that is in two of them.
    """

    def __init__(self, files: Iterable[Path], wanted: Callable[[str], bool] = lambda name: True) -> None:
        self.stored: dict[str, Stored] = {}
        for file in files:
            opened = _open(file)
            for name in filter(wanted, opened.keys()):
                if name in self.stored:
                    raise InvalidInput(f"tensor {name!r} is in {self.stored[name].file} and in {file}: remove one file")
                head = opened.get_slice(name)
                dtype = head.get_dtype()
                self.stored[name] = Stored(file, tuple(head.get_shape()), DTYPES.get(dtype, dtype))
        self._opened = lru_cache(maxsize=4)(_open)  # few: a checkpoint may have more files than a process may open

    def check(self, shapes: Shapes, whence: str) -> None:
        """Raises InvalidInput unless there are just these tensors, of these shapes. whence: the file that wants them
        so, in words."""
        for name, shape in shapes.items():
            if name not in self.stored:
                raise InvalidInput(f"tensor {name!r} is missing, which {whence} says there is: restore its file")
            if (found := self.stored[name]).shape != shape:
                raise InvalidInput(
                    f"tensor {name!r} is {list(found.shape)} in {found.file}, and {whence} makes it {list(shape)}: "
                    f"correct the one or restore the other"
                )
        if extra := next((name for name in self.stored if name not in shapes), None):
            raise InvalidInput(
                f"tensor {extra!r} in {self.stored[extra].file} is none that {whence} speaks of: remove it, or give "
                f"the config that belongs to these files"
            )

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, as it is stored."""
        file = self.stored[name].file
        try:
            tensor: Tensor = self._opened(file).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"tensor {name!r} cannot be read from {file} ({error}): restore that file") from None
        return tensor


class Shards:
    """Writes tensors to files ``model-00001.safetensors`` and so on, in the order that they come in.

    Only what goes to one file is in memory. limit: bytes of a file's tensors, but for a single one that is larger.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.files: dict[Path, list[str]] = {}
        self.bytes = 0
        self._held: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; one of a name each."""
        if self._held and sum(t.nbytes for t in self._held.values()) + tensor.nbytes > self.limit:
            self.flush()
        self._held[name] = tensor.contiguous()
        self.bytes += tensor.nbytes

    def flush(self) -> None:
        """Writes what is held."""
        if self._held:
            file = self.folder / f"model-{len(self.files) + 1:05d}.safetensors"
            try:
                save_file(self._held, file, {"format": "pt"})
            except SafetensorError as error:
                raise _as_os_error(error, file) from error
            file.chmod(0o666 & ~umask())  # the library writes a file that only its owner may read
            self.files[file] = list(self._held)
            self._held = {}

    def number(self) -> dict[str, str]:
        """Gives the files the names of Hugging Face, which say how many there are; each tensor's file."""
        self.flush()
        out: dict[str, str] = {}
        for i, (file, names) in enumerate(self.files.items()):
            named = file.rename(file.with_name(f"model-{i + 1:05d}-of-{len(self.files):05d}.safetensors"))
            out |= dict.fromkeys(names, named.name)
        return out


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder as Hugging Face keeps it: those of its index, or the single one.

    Raises NotFound, InvalidInput.
    """
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        raise NotFound(
            f"{folder} has neither {INDEX} nor {SINGLE}: give a folder with safetensors files (weights that were "
            f"pickled, *.bin, are not read)"
        )
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        names, plain = [], False
    if not names or not plain:
        raise InvalidInput(f"{index} names no files of its folder in weight_map: restore it")
    for name in names:
        if not (folder / name).is_file():
            raise NotFound(f"{folder / name} is missing, which {INDEX} names: fetch it")
    return [folder / name for name in names]


def bytes_of(shapes: Shapes, dtype: str) -> int:
    """What tensors take, in bytes."""
    return BYTES[dtype] * sum(math.prod(shape) for shape in shapes.values())


def check_room(place: Path, needed: int, option: str) -> None:
    """Raises InvalidInput unless ``needed`` bytes are free where ``place`` is to be. option: that chooses the place."""
    there = next(parent for parent in (place, *place.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed + ROOM:
        raise InvalidInput(
            f"{place} needs {(needed + ROOM) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there: "
            f"free some space or choose another {option}"
        )


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{file} is damaged or no safetensors file ({error}): fetch it again") from None


def _as_os_error(error: SafetensorError, file: Path) -> OSError:
    """What the system said, of which the library keeps the words alone."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(file))
