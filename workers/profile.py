"""Traces of training steps by PyTorch's profiler, with the parts of a step by name."""

from __future__ import annotations

import gzip
import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType, profiler
from torch.profiler import ProfilerActivity, profile, record_function

from shoal.workers.records import PROFILE, TABLE

if TYPE_CHECKING:
    from torch.autograd import _KinetoEvent

    from shoal.workers.config import TrainTable

MOST = 10  # in the table
NAME = 80  # characters of an operation's name; those of kernels made from templates go on for lines
_NOTHING = nullcontext()

logger = logging.getLogger(__name__)


def span(name: str) -> AbstractContextManager[object]:
    """A named range of the trace that is being recorded; where none is, nothing."""
    return record_function(name) if profiler._is_profiler_enabled else _NOTHING


class StepProfile:
    """Traces the steps that ``train.profile_at`` and ``profile_steps`` name: into profile/ of the run's folder each
    rank writes ``rank-K.json.gz``, since ranks do different things and wait for one another, and rank 0 a table of the
    operations that took most time. A step is a range ``ProfilerStep#N``, by which tools divide a trace.

    What is computed is the same. A run that goes on within these steps traces those that are left. Nothing is traced
    without a folder.
    """

    def __init__(self, table: TrainTable, run: Path | None, rank: int, device: torch.device) -> None:
        first = table.profile_at
        self.steps = range(first, first + table.profile_steps) if first and run else range(0)
        self.folder, self.rank = (run or Path()) / PROFILE, rank
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._trace: profile | None = None
        self._first = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A ``with`` block of the step of that number; every step has one."""
        # prepared a step ahead, where there is one: on a GPU that takes long, and slows down what comes next
        if self._trace is None and (number in self.steps or number + 1 in self.steps):
            self._trace = profile(activities=self._activities, record_shapes=True)
            self._trace.prepare_trace()
        if self._trace is None or number not in self.steps:
            yield
            return
        if not self._first:
            self._first = number
            if self.rank == 0:  # an older trace, maybe of more ranks; none writes before all have done this step
                shutil.rmtree(self.folder, ignore_errors=True)
            self._trace.start_trace()
        with span(f"ProfilerStep#{number}"):
            yield

    def ends(self, number: int) -> bool:
        """Whether that step, which was done, is the last one that is traced."""
        return self._trace is not None and number == self.steps[-1]

    def finish(self, number: int) -> dict[str, Any]:
        """Writes the trace, once it ends; returns an event. No collective may be under way: gloo's threads write to the
        trace as well, and to stop beneath them ends the process."""
        assert self._trace is not None
        trace, self._trace = self._trace, None
        trace.stop_trace()
        which = f"steps {self._first} to {number}" if number > self._first else f"step {number}"
        text = f"traced {which}: ui.perfetto.dev shows {PROFILE}/rank-K.json.gz, {PROFILE}/{TABLE} what took most time"
        try:
            self._write(trace, which)
        except OSError as error:  # no reason to stop
            text = f"the trace of {which} could not be written to {self.folder} ({error.strerror})"
            logger.warning(text)
        return {"kind": "event", "step": number, "event": "profiled", "text": text}

    def _write(self, trace: profile, which: str) -> None:
        self.folder.mkdir(exist_ok=True)
        plain, packed = (self.folder / f".rank-{self.rank}.json{end}" for end in ("", ".gz"))
        try:
            trace.export_chrome_trace(str(plain))
            if not plain.exists():  # PyTorch's library leaves a part under another name, and says nothing
                raise OSError(ENOSPC, "is the disk full?")
            with plain.open("rb") as source, gzip.open(packed, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)  # PyTorch would do it line by line
            packed.replace(self.folder / packed.name[1:])
        finally:
            for left in self.folder.glob(f".rank-{self.rank}.json*"):
                left.unlink()
        if self.rank == 0:
            assert trace.profiler and trace.profiler.kineto_results
            (self.folder / TABLE).write_text(_table(trace.profiler.kineto_results.events(), which), "utf-8")


def _table(events: list[_KinetoEvent], which: str) -> str:
    """The operations that took most time by themselves: kernels where there are any, else PyTorch's operators.

    PyTorch's own summary takes some 0.1 ms an event, of tens of thousands in a step, and the other ranks wait for it.
    """
    kernels = [(event, event.duration_ns()) for event in events if event.device_type() == DeviceType.CUDA]
    times: dict[str, list[int]] = {}  # ns of each call
    for event, time in kernels or _own_times(events):
        if not event.is_user_annotation():
            times.setdefault(event.name(), []).append(time)
    spent = sorted(((sum(each), len(each), name) for name, each in times.items()), reverse=True)
    total = sum(time for time, _, _ in spent) or 1
    lines = [f"{which} on rank 0: {total / 1e6:,.1f} ms in {'kernels' if kernels else 'operators on the CPU'}"]
    for time, calls, name in spent[:MOST]:
        lines.append(f"{time / total:6.1%} {time / 1e6:10,.1f} ms {calls:8,} calls  {name[:NAME]}")
    return "\n".join(lines) + "\n"


def _own_times(events: list[_KinetoEvent]) -> Iterator[tuple[_KinetoEvent, int]]:
    """Ranges on the CPU, and the time that each took without those within it, in ns."""
    ranges = [e for e in events if e.device_type() == DeviceType.CPU and not e.is_async()]
    ranges.sort(key=lambda e: (e.start_thread_id(), e.start_ns(), -e.duration_ns()))
    own = [each.duration_ns() for each in ranges]
    around: list[tuple[int, int, int]] = []  # thread, end and number of what a range lies in, outermost first
    for i, each in enumerate(ranges):
        thread, begin = each.start_thread_id(), each.start_ns()
        while around and (around[-1][0] != thread or around[-1][1] <= begin):
            around.pop()
        if around:
            own[around[-1][2]] -= own[i]
        around.append((thread, each.end_ns(), i))
    return zip(ranges, own, strict=True)
