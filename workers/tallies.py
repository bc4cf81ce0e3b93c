"""Counts of all ranks of a node, in memory that their hosts share: a host reads them while all multiprocessors compute.

A GPU's copy engine writes its rank's counts there, then the number of the pass. So neither is a kernel, which might
have to wait for a multiprocessor until a long product ends. A rank writes the next pass's counts only when all others
have read these: it has what came home from them, which they sent afterwards.
"""

from __future__ import annotations

import mmap
import os
import time
import weakref
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.workers.mesh import Group
from shoal.workers.transfer import Moment

LINE = 16  # words: a mark begins on 64 bytes, what processors exchange
MARKS = 256
"""Passes are numbered up to so many, again and again: no rank is more than one ahead of another."""

SPINS, NAP = 200, 20e-6
"""How often a host looks before it sleeps, and for how many seconds then: counts come within some 0.1 ms."""

ASK = 1.0
"""Seconds after which a host asks, again and again, whether its own GPU failed, which shared memory does not tell."""

TRIAL = timedelta(seconds=10)


class Unheard(Exception):
    """Ranks of the group, by their places in it, did not say what they have."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(*ranks)
        self.ranks = ranks


class Unshared(Exception):
    """Hosts or GPUs of a group cannot share memory; the message says why. Raised on all of them alike."""


class Tallies:
    """``[experts]`` int32 of every rank of the group. memory: zeros at first, of :func:`words_for`, shared by all."""

    def __init__(self, memory: Tensor, group: Group, experts: int, device: torch.device) -> None:
        self._group, self._experts, self._device = group, experts, device
        lines = memory.view(group.size, -1)
        self._counts, self._mark = lines[group.index, :experts], lines[group.index, -LINE:][:1]
        array: Any = memory.numpy()
        self._words = memoryview(array)
        self._starts = [rank * lines.shape[1] for rank in range(group.size)]
        self._marks = [start + lines.shape[1] - LINE for start in self._starts]
        # copied from the GPU, behind the counts, and made before: a pass would launch a kernel for it
        self._numbers = torch.arange(MARKS + 1, dtype=torch.int32, device=device).split(1)
        self._number = 0

    def tell(self, counts: Tensor) -> None:
        """Begins a pass: writes this rank's counts, on the current stream; they must be kept until others have read."""
        self._number = self._number % MARKS + 1
        self._counts.copy_(counts, non_blocking=True)
        self._mark.copy_(self._numbers[self._number], non_blocking=True)

    def read(self, patience: timedelta) -> list[list[int]]:
        """The counts of all ranks; the host waits until they are there. Raises Unheard where patience ends, or
        sooner what CUDA says of this rank's own GPU."""
        end = ask = 0.0
        looks = 0
        while missing := [rank for rank, mark in enumerate(self._marks) if self._words[mark] != self._number]:
            looks += 1
            if looks < SPINS:
                continue
            now = time.monotonic()
            end, ask = end or now + patience.total_seconds(), ask or now + ASK
            if now > end:
                if self._group.index in missing:
                    Moment(self._device).wait()
                raise Unheard(missing)
            if now > ask and self._device.type == "cuda":
                ask = now + ASK
                torch.cuda.current_stream(self._device).query()  # raises what any kernel before failed of
            time.sleep(NAP)
        return [self._words[start : start + self._experts].tolist() for start in self._starts]


def words_for(ranks: int, experts: int) -> int:
    """int32 words: of each rank its counts, and on a line of its own which pass they are of."""
    return ranks * (-(-experts // LINE) + 1) * LINE


def open_tallies(group: Group, experts: int, device: torch.device) -> Tallies:
    """Collective over ranks in one container. Raises Unshared."""
    size = 4 * words_for(group.size, experts)
    own, why = _made(size) if group.index == 0 else (-1, "")
    memory: Tensor | None = None
    try:
        place, why = group.all_gather_object((f"/proc/{os.getpid()}/fd/{own}", why))[0]
        if not why:
            memory, why = _opened(place, size)
        if memory is not None:
            why = _registered(memory, device)
        first = group.reason(why)
    finally:
        if own >= 0:
            os.close(own)  # who has mapped it keeps it, and nobody else can find it
    if memory is None or why:
        raise Unshared(first)
    tallies = Tallies(memory, group, experts, device)
    if device.type == "cuda":
        finalizer = weakref.finalize(tallies, _unregister, memory)  # which lives as long
        finalizer.atexit = False  # the driver forgets it with the process, and would wait for what is under way
    if not first:
        first = group.reason("" if _arrives(tallies, group, experts, device) else "what a GPU writes does not arrive")
    if first:
        raise Unshared(first)
    return tallies


def _made(size: int) -> tuple[int, str]:
    """Memory without a name in any file system, so that none is left behind by a process that is killed; or why not,
    with what was made of it."""
    made = -1
    try:
        made = os.memfd_create("shoal-counts")
        os.ftruncate(made, size)
    except (OSError, AttributeError) as error:
        return made, f"memory to share cannot be made ({error})"
    return made, ""


def _opened(place: str, size: int) -> tuple[Tensor | None, str]:
    try:
        with Path(place).open("r+b", buffering=0) as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.int32), ""
    except (OSError, ValueError) as error:
        return None, f"a rank cannot open another one's memory ({error})"


def _registered(memory: Tensor, device: torch.device) -> str:
    """Why copies to it would wait for the host; "" where they need not."""
    if device.type != "cuda":
        return ""
    runtime: Any = torch.cuda.cudart()
    if not (code := int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))):
        return ""
    with suppress(RuntimeError):  # what went wrong would else be said of the next launch
        torch.zeros(1, device=device)
    return f"CUDA does not register shared memory (error {code})"


def _unregister(memory: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(memory.data_ptr())


def _arrives(tallies: Tallies, group: Group, experts: int, device: torch.device) -> bool:
    """Whether what all GPUs write is there for this host."""
    counts = torch.full((experts,), -1 - group.index, dtype=torch.int32, device=device)
    tallies.tell(counts)
    try:
        return tallies.read(TRIAL) == [[-1 - rank] * experts for rank in range(group.size)]
    except Unheard:
        return False
