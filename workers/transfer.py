"""Rows on their way between ranks: buffers, streams, and what the host must know of their number.

On a GPU, exchanges run on a stream of their own, behind the work that was launched before a :class:`Moment` and beside
the work that is launched after it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.workers.mesh import Group, all_gather_single

ALIGN = 8  # words: a row of letters begins on 32 bytes, what memory is read by


@dataclass
class HostReads:
    """How often a host waited for sizes that it must know, and how long in all."""

    count: int = 0
    seconds: float = 0.0

    def of(self, table: Tensor, there: Moment) -> list[list[int]]:
        """A table of sizes that is on the host from that moment on."""
        began = time.perf_counter()
        there.wait()
        numbers: list[list[int]] = table.tolist()
        self.add(time.perf_counter() - began)
        return numbers

    def add(self, seconds: float) -> None:
        """Counts a wait."""
        self.count += 1
        self.seconds += seconds


@dataclass(frozen=True)
class Letters:
    """Rows ``[R, hidden]`` of one dtype with ``words`` int32 behind each, in one buffer: one exchange carries both."""

    buffer: Tensor
    hidden: int
    dtype: torch.dtype
    words: int

    @classmethod
    def empty(cls, count: int, like: Tensor, words: int) -> Letters:
        """For ``count`` rows of the dtype and width of ``like``."""
        width = _words(like) + words
        buffer = torch.empty(count, -(-width // ALIGN) * ALIGN, dtype=torch.int32, device=like.device)
        return cls(buffer, like.shape[1], like.dtype, words)

    def of(self, buffer: Tensor) -> Letters:
        """The same in another buffer."""
        return Letters(buffer, self.hidden, self.dtype, self.words)

    @property
    def rows(self) -> Tensor:
        """``[R, hidden]``, a view."""
        return self.buffer.view(self.dtype)[:, : self.hidden]

    @property
    def behind(self) -> Tensor:
        """``[R, words]`` int32, a view."""
        return self.buffer[:, self.buffer.shape[1] - self.words :]


def _words(rows: Tensor) -> int:
    return -(-rows.shape[1] * rows.element_size() // 4)


class Moment:
    """All that this rank has launched on the current stream so far. Without a GPU it is over at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()

    def before_here(self) -> None:
        """What is launched on the current stream from now on comes after it."""
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)

    def wait(self) -> None:
        """The host waits until it is over."""
        if self.event is not None:
            self.event.synchronize()


class _Lane(AbstractContextManager[None]):
    """A stream that is the current one within the context. Rows of few tokens are bound by the host, which would take
    longer for PyTorch's own context and an event made anew each time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._now = device, torch.cuda.Stream(device, priority=-1), torch.cuda.Event()
        self.after: Moment | None = None

    def __enter__(self) -> None:
        self._outside = torch.cuda.current_stream(self._device)
        if self.after is None:
            self._now.record(self._outside)  # waits for what was recorded before are not changed by that
            self._stream.wait_event(self._now)
        elif self.after.event is not None:
            self._stream.wait_event(self.after.event)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *raised: object) -> None:
        torch.cuda.set_stream(self._outside)


@lru_cache(maxsize=8)
def _lane(device: torch.device, lane: int) -> _Lane:
    return _Lane(device)


def beside(device: torch.device, after: Moment | None = None, lane: int = 0) -> AbstractContextManager[None]:
    """What is launched in this context runs beside the current stream, after a moment, by default the one at which the
    context begins, and beside other lanes."""
    if device.type != "cuda":
        return nullcontext()
    found = _lane(device, lane)
    found.after = after
    return found


def used_here(tensor: Tensor, *more: Tensor) -> Tensor:
    """A tensor of another stream that the current stream goes on with: its memory is kept until that is done; and more
    of them."""
    if tensor.is_cuda:
        stream = torch.cuda.current_stream(tensor.device)
        for each in (tensor, *more):
            each.record_stream(stream)
    return tensor


def on_host(table: Tensor) -> Tensor:
    """A copy that the host may read when the current stream has come so far; on a CPU the table itself."""
    if not table.is_cuda:
        return table
    return torch.empty(table.shape, dtype=table.dtype, pin_memory=True).copy_(table, non_blocking=True)


class Table:
    """A row of int32 of every rank, ``[ranks, N]``: on the device at once, on the host when it is asked for."""

    def __init__(self, group: Group, own: Tensor, after: Moment) -> None:
        with beside(own.device, after):
            self._all = group.all_gather(used_here(own))
            self._host = on_host(self._all)
            self._there = Moment(own.device)

    def here(self) -> Tensor:
        """The table for the current stream."""
        self._there.before_here()
        return used_here(self._all)

    def read(self, reads: HostReads) -> list[list[int]]:
        """The table for the host, which waits for it."""
        return reads.of(self._host, self._there)


class EvenExchange:
    """As many rows to and from each rank of a group, in flight: a CUDA graph can hold it, since no size depends on
    numbers. Beside what is launched meanwhile; the sent buffer is kept alive until it is over."""

    def __init__(self, group: Group, rows: Tensor, everywhere: bool) -> None:
        """everywhere: all rows ``[R, …]`` go to every rank; otherwise an equal part of them to each, in order."""
        assert group.handle is not None
        self._sending = rows.contiguous()
        shape = (group.size * len(rows), *rows.shape[1:]) if everywhere else rows.shape
        self._receiving = rows.new_empty(shape)
        exchange = all_gather_single if everywhere else dist.all_to_all_single
        self._work: dist.Work | None = exchange(self._receiving, self._sending, group=group.handle, async_op=True)

    def wait(self) -> Tensor:
        """What came, by rank; what is launched on the current stream from now on comes after it."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        del self._sending
        return self._receiving


class OneWayExchange(EvenExchange):
    """So many rows from each of some ranks of a group to each of some others, in flight, as the base class has it: what
    every rank sends and gets is known beforehand. A sender has them in the order of those that they go to."""

    def __init__(self, group: Group, rows: Tensor, senders: Sequence[int], receivers: Sequence[int], each: int) -> None:
        """senders, receivers: places in the group, in order; every rank of the group calls it."""
        assert group.handle is not None
        self._sending = rows.contiguous()
        send, receive = (
            [each * (group.index in ours and rank in theirs) for rank in range(group.size)]
            for ours, theirs in ((senders, receivers), (receivers, senders))
        )
        self._receiving = rows.new_empty(sum(receive), *rows.shape[1:])
        self._work = dist.all_to_all_single(
            self._receiving, self._sending, receive, send, group=group.handle, async_op=True
        )


class Exchange:
    """One all-to-all in flight. It keeps the sent buffer alive until the transfer is over."""

    def __init__(self, group: Group, rows: Tensor, send: list[int], receive: list[int], after: Moment) -> None:
        self._sending = rows[: sum(send)].contiguous()
        with beside(rows.device, after):
            self._receiving = rows.new_empty(sum(receive), *rows.shape[1:])
            self._work: dist.Work | None = dist.all_to_all_single(
                self._receiving, self._sending, receive, send, group=group.handle, async_op=True
            )

    def wait(self) -> Tensor:
        """``[sum(receive), …]``; what is launched on the current stream from now on comes after the transfer."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        del self._sending
        return used_here(self._receiving)
