"""Signals that end a job, treated like Ctrl-C: what is under way cleans up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from shoal.cluster.local import heard


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block, SIGTERM and SIGHUP raise KeyboardInterrupt, but not those that whoever started this process has
    ignored."""
    with handled(heard(), _interrupt):
        yield


@contextmanager
def handled(numbers: Sequence[signal.Signals], handler: Callable[[int, object], None]) -> Iterator[None]:
    """In the block, signals have this handler. Outside the main thread, which alone may handle them, nothing
    changes."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
