"""Symmetric memory: slots in which ranks of a node put rows for one another, by copy engines, while all multiprocessors
compute; and whether the ranks of a group reach each other's. What is put there when is ``symmetric_flight.py``.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from shoal.workers.errors import last_line
from shoal.workers.mesh import COLLECTIVE_TIMEOUT, Group
from shoal.workers.slots import BACK, COUNTS, LETTER, OUT, WORDS_BACK, shapes, words_in
from shoal.workers.tallies import Tallies, Unheard, Unshared, open_tallies
from shoal.workers.transfer import HostReads, Moment

MOST_BEGUN = 256
"""Beginnings of slots that are kept as tensors."""

PATIENCE = 0.9 * COLLECTIVE_TIMEOUT
"""How long a GPU waits for another rank until it gives up: sooner than collectives behind, which know not for what."""


class OutOfReach(Exception):
    """The ranks of a group cannot write each other's memory; the message says why. Raised on all of them alike."""


class RowsMissing(RuntimeError):
    """A rank waited in vain for another one, which puts rows into its memory. Its GPU is of no use to it any more."""


class Inbox:
    """Symmetric memory of a rank: slots of ``capacity`` rows that each other rank of the group writes.

    What is in a slot is int32 words: a letter, which is counts ``[experts]`` and of each row out gates and choices
    ``[2K]``; the rows out; of each row that comes home, gradients of gates ``[K]`` and the row.
    """

    def __init__(
        self,
        group: Group,
        capacity: int,
        hidden: int,
        dtype: torch.dtype,
        choices: int,
        experts: int,
        device: torch.device,
    ) -> None:
        """choices: of a token, with float32 gates. Collective; raises RuntimeError where the memory cannot be had."""
        self.group, self.capacity = group, capacity
        self.tallies: Tallies | None = None  # where hosts read counts, if not what came into a slot
        self.untold = ""  # why there are none
        self.others = [rank for rank in range(group.size) if rank != group.index]
        # all ranks put to another one each at the same time: what comes to a GPU shares its links
        self.turns = [(group.index + i) % group.size for i in range(1, group.size)]
        parts = shapes(len(self.others), capacity, hidden * dtype.itemsize // 4, choices, experts)
        starts, total = {}, 0
        for part, shape in parts.items():
            starts[part] = total
            total += words_in(shape)
        self.nbytes = 4 * total  # beyond what PyTorch's allocator counts
        self._parts = [
            {part: memory[starts[part] :][: torch.Size(shape).numel()].view(shape) for part, shape in parts.items()}
            for memory in self._share(total, device)
        ]
        own = self._parts[group.index]
        kinds = {OUT: dtype, BACK: dtype}  # of all other parts words
        self._slots = {
            (part, rank): self._parts[rank][part][group.index - (group.index > rank)].view(kinds.get(part, torch.int32))
            for rank in self.others
            for part in parts
        }
        self._slots |= {(COUNTS, rank): self._slots[LETTER, rank][:experts] for rank in self.others}
        self._begun: dict[tuple[int, int, int], Tensor] = {}
        words = own[LETTER][:, experts:].unflatten(1, (capacity, -1))
        self._counts = own[LETTER][:, :experts]
        self._words = {LETTER: words, WORDS_BACK: own[WORDS_BACK].flatten(0, 1)}
        self._rows = {part: own[part].view(dtype).view(-1, hidden) for part in (OUT, BACK)}

    def _share(self, words: int, device: torch.device) -> list[Tensor]:
        """``[words]`` int32 of each rank of the group, which all of them can write."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        # Where each process sees its own GPU alone, as Ray's actors do, PyTorch takes them all for one: device 0.
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        import torch.distributed._symmetric_memory as symmetric

        assert self.group.handle is not None
        own: Tensor | None = None
        why = ""
        try:
            own = symmetric.empty(words, dtype=torch.int32, device=device)
        except RuntimeError as error:
            why = _first_line(error)
        why = self.group.reason(why)  # asked first: a rendezvous waits for ranks that never come
        if own is None or why:
            raise RuntimeError(why)
        self._memory = symmetric.rendezvous(own, self.group.handle)
        self._await, self._patience = self._memory.wait_signal, PATIENCE // timedelta(milliseconds=1)
        # where wait_signal looks for word of this rank, of each part
        size, index = self.group.size, self.group.index
        self._bells = {
            (part, rank): self._memory.get_signal_pad(rank, [1], torch.int32, size * part + index)
            for rank in self.others
            for part in (COUNTS, OUT, BACK)
        }
        self._word = torch.ones(1, dtype=torch.int32, device=device)
        return [self._memory.get_buffer(rank, (words,), torch.int32) for rank in range(self.group.size)]

    def share_counts(self, experts: int, device: torch.device) -> None:
        """Lets hosts tell each other counts, or keeps why they cannot: then these come into slots. Collective."""
        try:
            self.tallies = open_tallies(self.group, experts, device)
        except Unshared as error:
            self.untold = str(error)

    def arrives(self) -> bool:
        """Whether what ranks put comes to this one; every rank calls it before any other puts: of a GPU that a process
        does not see CUDA tells nothing."""
        mark = torch.full_like(self.counts()[0], -1 - self.group.index)
        for rank in self.others:
            self.put(COUNTS, rank, mark)
        Moment(mark.device).wait()
        self.group.reason("")  # all have put
        return [line.unique().tolist() for line in self.counts()] == [[-1 - rank] for rank in self.others]

    def counts(self) -> Tensor:
        """``[others, experts]`` int32 that came from other ranks."""
        return self._counts

    def words(self, part: int) -> Tensor:
        """``[others, capacity, 2K]`` int32 that came out, ``[others · capacity, K]`` that came home."""
        return self._words[part]

    def rows(self, part: int) -> Tensor:
        """``[others · capacity, hidden]`` that came."""
        return self._rows[part]

    def put(self, part: int, rank: int, values: Tensor) -> None:
        """Writes this rank's slot of another one, from its beginning; by a copy engine, on the current stream."""
        key = part, rank, values.shape[0]
        slot = self._begun.get(key)
        if slot is None:
            if len(self._begun) >= MOST_BEGUN:
                self._begun.clear()
            slot = self._begun[key] = self._slots[part, rank][: values.shape[0]]
        assert values.dtype == slot.dtype, "copies that convert are no work of a copy engine"
        slot.copy_(values)

    def say(self, part: int, rank: int) -> None:
        """Tells another rank that a part of this rank's slot is there, and what was put before it; on the current
        stream. That rank has heard what it was told of this part before: it has sent what it made of it.

        By a copy engine as well: PyTorch's kernel for it would find no multiprocessor while products hold them all, and
        what is to be put to the next rank would wait behind it."""
        self._bells[part, rank].copy_(self._word)

    def hear(self, part: int) -> None:
        """Waits, on the current stream, until all others have told of a part."""
        for rank in self.others:
            self._await(rank, part, self._patience)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Whoever waited in this context until patience came to its end fails with RowsMissing: the kernel that waits
        ends itself by a trap, of which CUDA says no more than that a launch failed. What fails for another reason
        keeps it."""
        began = time.monotonic()
        try:
            yield
        except RowsMissing:
            raise
        except RuntimeError as error:
            launch = "CUDA error" in str(error) or not self.counts()[0].is_cuda
            if time.monotonic() - began < PATIENCE.total_seconds() or not launch:
                raise
            raise self.missing(self.others, last_line(error)) from error

    def missing(self, ranks: list[int], why: str) -> RowsMissing:
        """The error of who waited for these ranks of the group until patience came to its end."""
        own, others = self.group.ranks[self.group.index], (str(self.group.ranks[rank]) for rank in ranks)
        return RowsMissing(
            f"rank {own} waited {PATIENCE.total_seconds():g} s for rank {' or '.join(others)}, which puts rows for "
            f"experts into its memory, in vain: that rank ended or hangs, see its log ({why})"
        )

    def read_tallies(self, reads: HostReads) -> list[list[int]]:
        """Counts ``[ranks, experts]`` of this pass, as ranks told them to hosts. Raises RowsMissing."""
        assert self.tallies is not None
        began = time.perf_counter()
        try:
            table = self.tallies.read(PATIENCE)
        except Unheard as error:
            raise self.missing(error.ranks, "its counts did not come") from error
        reads.add(time.perf_counter() - began)
        return table


@lru_cache(maxsize=4)
def inbox(
    group: Group, capacity: int, hidden: int, dtype: torch.dtype, choices: int, experts: int, device: torch.device
) -> Inbox:
    """The inbox that all layers of these sizes share, of rows of a multiple of 16 bytes; every rank of several calls it
    alike. Raises OutOfReach."""
    if device.type != "cuda":
        raise OutOfReach("ranks are on CPUs")
    own = torch.cuda.current_device() if device.index is None else device.index
    seen = {_gpu(index): index for index in range(torch.cuda.device_count())}
    found = group.all_gather_object((_container(), _gpu(own)))
    gpus = {gpu for _, gpu in found}
    if len({host for (host, _), _ in found}) > 1:
        raise OutOfReach("ranks are on several nodes")
    if len({place for place, _ in found}) > 1:
        raise OutOfReach("ranks are in several containers")
    if len(gpus) < group.size:
        raise OutOfReach("ranks share a GPU")
    reached = all(_reaches(own, seen[gpu]) for gpu in gpus & seen.keys() - {_gpu(own)})
    if why := group.reason("" if reached else "GPUs do not reach each other"):
        raise OutOfReach(why)
    box: Inbox | None = None
    try:  # memory, or what a container does not let its processes share
        box = Inbox(group, capacity, hidden, dtype, choices, experts, torch.device("cuda", own))
    except RuntimeError as error:
        why = f"a rank has no memory that others can write ({_first_line(error)})"
    why = group.reason(why)
    if box is None or why:
        raise OutOfReach(why)
    if why := group.reason("" if box.arrives() else "what a rank puts does not arrive"):
        raise OutOfReach(why)
    box.share_counts(experts, torch.device("cuda", own))
    return box


def _container() -> tuple[str, tuple[int, ...]]:
    """The node, and the namespaces of processes and files: within these PyTorch finds who hands memory over."""
    spaces = [Path(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt")]
    return socket.gethostname(), tuple(space.stat().st_ino for space in spaces if space.exists())


def _gpu(index: int) -> str:
    """The same in every process, whatever devices it sees."""
    return str(torch.cuda.get_device_properties(index).uuid)


def _reaches(own: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(torch.device("cuda", own), torch.device("cuda", other))


def _first_line(error: RuntimeError) -> str:
    """What went wrong: PyTorch may put a stack of C++ below."""
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
