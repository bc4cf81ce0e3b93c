"""Benchmarks: one module each, found by ``registry``; ``result`` holds what they share."""

from __future__ import annotations

import os
import signal
import sys

from shoal.workers.errors import INTERRUPTED


def leave(_number: int, _frame: object) -> None:
    """Handles signals while a benchmark is imported: ends the process with a line. A KeyboardInterrupt would show a
    traceback of whatever torch was importing, or be swallowed there and break what is imported next."""
    os.write(sys.stderr.fileno(), b"cut off\n")
    os._exit(INTERRUPTED)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m shoal.jobs.bench.NAME` imports this before NAME, which imports torch; NAME then hears signals itself.
    signal.signal(signal.SIGINT, leave)
