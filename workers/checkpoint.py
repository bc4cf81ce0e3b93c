"""Saving and loading a run's tensors and state, from all ranks at once.

Tensors go through torch.distributed.checkpoint in the safetensors format, the rest is JSON; the layout of the files and
how they are published stands in ``shoal.workers.checkpoint_files``. Every rank hands over a flat dict of the tensors it
hosts. A name means the same tensor on every rank, so a tensor that several ranks hand over is written once, and a rank
that loads asks for the names it hosts, whatever ranks wrote them.
"""

from __future__ import annotations

import errno
import json
import logging
import platform
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

import shoal
from shoal.workers import checkpoint_files as files
from shoal.workers.errors import InvalidInput, NotFound, ShoalError

T = TypeVar("T")
logger = logging.getLogger(__name__)

# The safetensors writer holds a file in memory, several times over, while it writes it: this bounds a file's bytes.
FILE_BYTES = 1 << 28
_REMEDIES = {
    errno.ENOSPC: "free space there or lower checkpoint.keep",
    errno.EDQUOT: "raise the quota or lower checkpoint.keep",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "make it writable or choose another run folder",
    errno.EACCES: "make it writable or choose another run folder",
    errno.EPERM: "make it writable or choose another run folder",
}


class Checkpointer:
    """Writes checkpoints in the background and reads them, on every rank of a run.

    ``save`` blocks only while it copies the tensors to CPU memory. One thread of ours does the rest, in order: write,
    hash, agree with the other ranks, publish, prune. (torch's ``async_save`` does the first of these in a thread of its
    own; the others would need a second thread beside it, with collectives on the same group.)

    Args:
        folder: the run's ``checkpoints`` folder; rank 0 makes it, and tidies up what a dead writer left in it.
        keep: how many of the last checkpoints stay, 1 or more.
        group: a gloo group of all ranks that nobody else uses, since its collectives run in the background; None when
            ``world`` is 1, where torch.distributed need not be set up.
        rank: of this process in ``group``.
        world: number of ranks.
        file_bytes: largest size of a file, in bytes of tensors (a single larger tensor makes a larger file).

    Raises:
        InvalidInput: on rank 0, when nothing can be written in ``folder``.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        group: dist.ProcessGroup | None,
        rank: int,
        world: int,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.group = group
        self.rank = rank
        self.world = world
        self.file_bytes = file_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        # no_dist is what we ask for, so torch need not warn of it
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        if rank == 0:
            files.prepare_folder(folder)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Starts to write a checkpoint, after the previous one is published. All ranks call it, with the same step.

        Args:
            step: steps trained so far.
            tensors: what this rank hosts, by placement-independent name; may be empty. Copied before this returns. A
                DTensor is written as one tensor, by one of the ranks that hold parts of it, which name it alike.
            state: what else to keep, as JSON knows it (keys of dicts are str); the same on all ranks.

        Raises:
            ShoalError: the previous checkpoint could not be written.
        """
        self.wait()
        text = json.dumps(state)
        snapshot = _copy_to_cpu(tensors)
        self._pending = self._thread.submit(self._write, step, snapshot, text)

    def wait(self) -> None:
        """Returns when no checkpoint is under way.

        Raises:
            ShoalError: the last one could not be written, on whatever rank. Those before it stand.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    @property
    def done(self) -> bool:
        """Whether the last checkpoint, if any, is written, or has failed: ``wait`` returns at once."""
        return self._pending is None or self._pending.done()

    def load(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fills ``tensors`` in place with what was saved under their names, or with their parts of it where they are
        DTensors, and returns the saved state.

        Ranks load on their own: no collective, any subset of names. Sizes of files are compared with the manifest,
        their hashes are not: ``checkpoint_files.last_good`` chooses a checkpoint whose hashes hold, for all ranks.

        Raises:
            NotFound: there is no checkpoint of this step.
            InvalidInput: it is damaged, or a tensor is not in it or has another shape or dtype there.
        """
        path = files.checkpoint_path(self.folder, step)
        if not path.is_dir():
            there = ", ".join(info.path.name for info in files.list_checkpoints(self.folder)) or "no checkpoint"
            raise NotFound(f"checkpoint {path} does not exist: {self.folder} holds {there}")
        if problems := files.verify(path, hashes=False):
            raise InvalidInput(f"checkpoint {path} is damaged ({'; '.join(problems)}): choose another one")
        reader = HuggingFaceStorageReader(str(path))
        try:
            _check_against(reader.read_metadata(), tensors, path)
            if tensors:
                planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
                state_dict_loader.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=True)
        except ShoalError:
            raise
        except (Exception, CheckpointException) as error:
            raise InvalidInput(f"checkpoint {path} cannot be read ({_cause(error)[0]}): choose another one") from error
        return files.read_state(path)

    # In the background

    def _write(self, step: int, tensors: dict[str, Tensor], state: str) -> None:
        try:
            with ExitStack() as stack:
                begun = self._together(lambda: self._begin(step, tensors, stack))
                drafted = Path(begun[0][0])
                self._write_tensors(drafted, tensors, {k: v for _, part in reversed(begun) for k, v in part.items()})
                parts = self._together(lambda: self._digest_own_files(drafted))
                written = {name: entry for part in parts for name, entry in part.items()}
                self._together(lambda: self._publish(drafted, step, state, written))
        except (Exception, CheckpointException) as error:
            raise self._failure(step, error) from error

    def _begin(self, step: int, tensors: dict[str, Tensor], stack: ExitStack) -> tuple[str, dict[str, int]]:
        """The temporary folder, which rank 0 makes, and this rank's cut of its tensors into files of bounded size."""
        drafted = str(stack.enter_context(files.draft(self.folder, step))) if self.rank == 0 else ""
        file_of, total = {}, 0
        for name, tensor in tensors.items():
            file_of[name] = 1 + total // self.file_bytes
            total += tensor.nbytes
        return drafted, file_of

    def _write_tensors(self, drafted: Path, tensors: dict[str, Tensor], file_of: dict[str, int]) -> None:
        """Collective; torch raises CheckpointException on all ranks when it fails on one."""
        writer = HuggingFaceStorageWriter(str(drafted), fqn_to_index_mapping=file_of or None, save_distributed=True)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        alone = self.world == 1
        state_dict_saver.save(
            dict[str, Any](tensors),
            storage_writer=writer,
            planner=planner,
            process_group=None if alone else self.group,
            no_dist=alone,
        )

    def _digest_own_files(self, drafted: Path) -> dict[str, files.FileEntry]:
        """Entries of the files that this rank wrote, which are on the disk when it returns."""
        own = f"shard-{self.rank + 1:05d}-*{files.TENSORS}"
        return {file.name: files.digest(file, sync=True) for file in drafted.glob(own)}

    def _publish(self, drafted: Path, step: int, state: str, written: dict[str, files.FileEntry]) -> None:
        if self.rank != 0:
            return
        there = {file.name for file in drafted.glob(f"*{files.TENSORS}")}
        if there != set(written):
            raise RuntimeError(f"files without a hash: {', '.join(sorted(there ^ set(written)))}")
        manifest = files.Manifest(
            step=step,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            world=self.world,
            software={"shoal": shoal.__version__, "torch": torch.__version__, "python": platform.python_version()},
            files={files.STATE: files.write_json(drafted / files.STATE, state), **written},
        )
        files.publish(drafted, manifest)
        try:
            files.prune(self.folder, self.keep, step)
        except OSError as error:  # the new checkpoint stands; an old one too many is no reason to stop
            logger.warning("an old checkpoint in %s could not be removed (%s)", self.folder, error.strerror)

    def _together(self, step: Callable[[], T]) -> list[T]:
        """Runs ``step`` on every rank; the results of all ranks, or on all ranks a failure of one of them."""
        result: T | None = None
        problem: tuple[str, str] | None = None
        try:
            result = step()
        except Exception as error:
            logger.debug("a checkpoint failed on rank %d", self.rank, exc_info=True)
            problem = _cause(error)
        outcomes: list[Any] = [(result, problem)]
        if self.world > 1:
            outcomes *= self.world
            dist.all_gather_object(outcomes, (result, problem), group=self.group)
        for rank, (_, failed) in enumerate(outcomes):
            if failed:
                raise _Failed(rank, *failed)
        return [value for value, _ in outcomes]

    def _failure(self, step: int, error: BaseException) -> ShoalError:
        """InvalidInput where the disk refused, which a person can mend; else ShoalError."""
        rank, (cause, remedy) = self.rank, _cause(error)
        if isinstance(error, CheckpointException):
            rank = min(error.failures)
        elif isinstance(error, _Failed):
            rank = error.args[0]
        where = f" on rank {rank}" if self.world > 1 else ""
        before = ", ".join(info.path.name for info in files.list_checkpoints(self.folder))
        kept = f"earlier ones are untouched ({before})" if before else "there is no earlier one"
        path = files.checkpoint_path(self.folder, step)
        kind = InvalidInput if remedy in _REMEDIES.values() else ShoalError
        return kind(f"checkpoint {path} could not be written ({cause}{where}), {kept}: {remedy}")


class _Failed(Exception):
    """A rank failed; the arguments are the rank, and the cause and the remedy in words."""


def _cause(error: BaseException) -> tuple[str, str]:
    """Why something failed, and what to do about it."""
    if isinstance(error, _Failed):
        return error.args[1], error.args[2]
    if isinstance(error, CheckpointException):  # torch's, of all ranks: the lowest speaks for them
        return _cause(error.failures[min(error.failures)][0])
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error), _REMEDIES.get(error.errno, "check the disk and resume the run")
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}", "resume the run from the last checkpoint"


def _copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory, contiguous and sharing no storage, as safetensors wants them."""
    if files.RESERVED in tensors:
        raise InvalidInput(f"tensor {files.RESERVED!r} has a name that safetensors keeps for itself: rename it")
    # Pinned memory makes the copy from a GPU some 30 times faster; torch keeps it for the next checkpoint.
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda).copy_(
            tensor.detach(), non_blocking=True
        )
        for name, tensor in _whole(tensors)
    }
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


def _whole(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors as they are; those in parts are gathered, one at a time, and each goes to one of their ranks: to
    the one that has least by then. Collective over these."""
    shares: list[int] = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            yield name, tensor
            continue
        mesh, whole = tensor.device_mesh, tensor.full_tensor()
        shares = shares or [0] * mesh.size()
        place = shares.index(min(shares))
        shares[place] += whole.nbytes
        if place == mesh.get_local_rank():
            yield name, whole


def _check_against(metadata: Metadata, tensors: dict[str, Tensor], path: Path) -> None:
    """Names, shapes and dtypes, which torch would convert silently."""
    for name, tensor in tensors.items():
        saved = metadata.state_dict_metadata.get(name)
        if not isinstance(saved, TensorStorageMetadata):
            raise InvalidInput(f"tensor {name!r} is not in checkpoint {path}: load it with the recipe that wrote it")
        there, here = (saved.properties.dtype, tuple(saved.size)), (tensor.dtype, tuple(tensor.shape))
        if there != here:
            raise InvalidInput(
                f"tensor {name!r} is {there[0]} {list(there[1])} in checkpoint {path}, not {here[0]} {list(here[1])}: "
                "load it with the recipe that wrote it"
            )
