"""Rows put straight into the memory of the other GPUs of a node, by copy engines, while all multiprocessors compute.

Sizes are fixed: a rank puts the rows of all its tokens into a slot of each other rank, up to the slots' capacity, and
says behind each token what it chose. So nothing is packed, and no host reads a size. That pays where nearly every token
needs nearly every rank: of 64 experts, 6 of them chosen, 99 % of tokens need a given one of 2 ranks, 84 % one of 4.

A slot is written again only after its last content was used: a rank puts rows out when it has what came home from the
pass before, which the others sent after they had used all that came to them; and the other way round. So there is one
pass at a time, of all layers that share the slots.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.kernels.moe.fan import Fan, combine
from shoal.kernels.moe.plan import words_of
from shoal.workers.errors import last_line
from shoal.workers.flight import Arrived, Flight, Own
from shoal.workers.mesh import COLLECTIVE_TIMEOUT, Group
from shoal.workers.slots import BACK, COUNTS, LETTER, OUT, WORDS_BACK, has_room, rows_at_most, shapes, words_in
from shoal.workers.tallies import Tallies, Unheard, Unshared, open_tallies
from shoal.workers.transfer import HostReads, Moment, beside, on_host, used_here

if TYPE_CHECKING:
    from shoal.workers.dispatch import Dispatcher

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


class SymmetricFlight(Flight):
    """Rows that are put where they are needed. Gates are float32."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        x: Tensor,
        gates: Tensor,
        experts: Tensor,
        keep: bool,
        counts: Tensor | None = None,
    ) -> None:
        assert dispatcher.inbox is not None
        assert x.shape[0] <= dispatcher.inbox.capacity, (
            f"{len(x)} rows, and slots have room for {dispatcher.inbox.capacity}"
        )
        self._inbox = box = dispatcher.inbox
        super().__init__(dispatcher, x, gates, experts, keep, box.capacity, counts)
        letter = self._plan.letter
        assert letter is not None
        del self._plan
        away = len(box.others) * box.capacity
        self._places = (self.tokens + away) * min(self.choices, len(dispatcher.local))
        # of any rank: all of them decide alike
        most = rows_at_most(box.capacity, dispatcher.group.size, self.choices, dispatcher.most_local)
        self._out: dict[int, Tensor] = {}
        self._counted: Moment | None = None
        self._copied: Moment | None = None
        self._reads = not has_room(most, x.shape[1] * x.element_size())
        if self._reads and box.tallies is not None:
            with beside(x.device, lane=1):
                box.tallies.tell(self.counts)
        elif self._reads:
            with beside(x.device, lane=1):  # the host reads counts while rows are on their way
                self._put({COUNTS: self.counts}, COUNTS)
                box.hear(COUNTS)
                self._total = self._counts_of_all()
                self._host = on_host(self._total[None])
                self._counted = Moment(x.device)
        with beside(x.device):
            self._put({LETTER: letter, OUT: x}, OUT)

    def _counts_of_all(self) -> Tensor:
        """``[slots]`` int64, the sum over all ranks."""
        return self._inbox.counts().sum(0).add_(self.counts)

    def _put(self, parts: dict[int, Tensor], told: int) -> None:
        """The same to all others, on the current stream; of what goes home ``[others · capacity, …]`` to each its part.

        What goes out is kept until others' results have come home, which they made of it; when they have what goes home
        this pass need not hear.
        """
        box = self._inbox
        if BACK in parts:
            used_here(*parts.values())
        else:
            self._out = self._out | parts
        each = {part: values.split(box.capacity) for part, values in parts.items() if part in (BACK, WORDS_BACK)}
        for rank in box.turns:
            for part, values in parts.items():
                box.put(part, rank, each[part][box.others.index(rank)] if part in each else values)
            box.say(told, rank)

    def _hear(self, part: int) -> None:
        with self.dispatcher.waiting():
            self._inbox.hear(part)

    def _hear_back(self) -> None:
        self._hear(BACK)
        self._out.clear()

    def _slot_counts(self) -> Tensor:
        """To be called once rows have arrived."""
        if self._counted is not None:
            self._counted.before_here()
            used_here(self._total)
        return self._total

    def arrive(self, x: Tensor, gates: Tensor) -> Arrived:
        """As the base class has it; what came is copied where a backward pass will ask for it.

        Reads how many rows this rank's experts get, if that may be many, once all is launched that needs not know it.
        """
        box, d = self._inbox, self.dispatcher
        if self._counted is not None:
            self._counted.before_here()  # and so before word goes home that slots may be written again
        self._hear(OUT)
        if self._counted is None:
            self._total = self._counts_of_all()
        rows = box.rows(OUT)
        if self.keep:
            self._copy(rows)
        arrived = self._sorted((x, rows), gates, box.words(LETTER), self._places)
        if not self._reads:
            return arrived
        table = d.reads.of(self._host, self._counted) if self._counted else box.read_tallies(d.reads)
        places = sum(sum(counts[d.first : d.first + len(d.local)]) for counts in table)
        return replace(arrived, fan=Fan(arrived.fan.rows, arrived.fan.order[:places]))

    def _copy(self, rows: Tensor) -> None:
        """Beside the experts' products, and on the stream that later says that the slots may be written again."""
        self._copies = torch.empty_like(rows)
        with beside(rows.device):
            self._copies.copy_(rows)
            self._copied = Moment(rows.device)

    def give_back(self, arrived: Arrived, results: Tensor) -> None:
        """As the base class has it."""
        rows, gates = arrived.fan.rows[self.tokens :], arrived.gates[self.tokens :]
        sums = combine(results, rows, self.dispatcher.triton, gates)
        with beside(sums.device):
            self._put({BACK: sums}, BACK)

    def returned(self, base: Tensor, own: Own | None = None) -> Tensor:
        """As the base class has it."""
        self._hear_back()
        del self.counts  # others have read them, and the letter that they are part of would stay for the backward pass
        return self._at_home(self._inbox.rows(BACK), base, own)

    def kept(self, arrived: Arrived) -> Arrived:
        """As the base class has it: copies of the rows, since slots are written again."""
        if self._copied is None:
            return arrived
        self._copied.before_here()
        return replace(arrived, parts=(arrived.parts[0], self._copies))

    def send_grads(self, grad: Tensor) -> None:
        """As the base class has it."""
        with beside(grad.device):
            self._put({OUT: grad}, OUT)

    def arrive_grads(self, grad: Tensor) -> tuple[Tensor, ...]:
        """As the base class has it."""
        self._hear(OUT)
        return grad, self._inbox.rows(OUT)

    def give_back_grads(self, fan: Fan, d_rows: Tensor, d_gates: Tensor) -> None:
        """As the base class has it."""
        sums = combine(d_rows, fan.rows[self.tokens :], self.dispatcher.triton)
        words = words_of(d_gates[self.tokens :])
        with beside(sums.device):
            self._put({WORDS_BACK: words, BACK: sums}, BACK)

    def returned_gates(self, own: Tensor) -> Tensor:
        """As the base class has it."""
        self._hear_back()
        return self._gates_at_home(own, self._inbox.words(WORDS_BACK))

    def returned_grads(self, base: Tensor | None, own: Own, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As the base class has it."""
        return self._at_home(self._inbox.rows(BACK), base, own, product)
