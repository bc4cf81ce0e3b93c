"""Signals that end a job, treated like Ctrl-C: what is under way cleans up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.cluster.local import heard


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block, SIGTERM and SIGHUP raise KeyboardInterrupt, unless whoever started this process has them ignored.

    Outside the main thread, which alone may handle signals, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _interrupt) for number in heard()} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
