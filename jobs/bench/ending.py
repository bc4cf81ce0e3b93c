"""How a benchmark ends: with all of its rows, or, cut off by Ctrl-C, SIGTERM or SIGHUP, with those that it has by then.

``shoal bench NAME`` and ``python -m shoal.jobs.bench.NAME`` end alike: this needs neither typer nor Ray nor pydantic.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.cluster.local import heard
from shoal.jobs.bench.result import Document, Row, document, write
from shoal.jobs.interrupt import handled
from shoal.workers.errors import INTERRUPTED, ShoalError, TrainingFailed

CUT = "cut off: what would have followed has no rows"
NOTHING = "cut off before anything was measured"
AGAIN = 2.0
"""Seconds in which a further signal changes nothing: ``timeout`` sends one to its command and another to the group."""


@contextmanager
def cut_in_order() -> Iterator[None]:
    """In the block, signals that end a job raise KeyboardInterrupt, unless whoever started this process has them
    ignored; the process then ends with ``INTERRUPTED`` and a line, and with a line and its exit code for a ShoalError.
    Signals alone mean nothing outside the main thread.
    """
    keys = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else []
    with handled([*keys, *heard()], _Cut()):
        try:
            yield
        except KeyboardInterrupt as interrupt:
            print(str(interrupt) or CUT.partition(":")[0], file=sys.stderr)
            sys.exit(INTERRUPTED)
        except ShoalError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)


class _Cut:
    """Handles signals."""

    def __init__(self) -> None:
        self._until = float("-inf")

    def __call__(self, _number: int, _frame: object) -> None:
        now = time.monotonic()
        if now >= self._until:
            self._until = now + AGAIN
            raise KeyboardInterrupt


def as_far_as_it_came(
    measure: Callable[[], object], there: Callable[[], bool], result: Callable[[], Document]
) -> Document:
    """The result of what is there once all is measured, or, cut off before, see :func:`partial`. Raises
    KeyboardInterrupt where nothing is there by then."""
    try:
        measure()
    except KeyboardInterrupt:
        if not there():
            raise KeyboardInterrupt(NOTHING) from None
        return partial(result())
    return result()


def result_of(title: str, measured: Iterable[Row]) -> Document:
    """The result of rows as they come; where they are cut off, of those that have, see :func:`partial`.

    Rows that tell more beside others which come later may wait for these, if they come ``finally`` whatever ends the
    measuring. Where there are none, raises KeyboardInterrupt, or TrainingFailed if it was not cut off.
    """
    before, rows = os.getloadavg()[0], list[Row]()

    def gather() -> None:
        for row in measured:
            rows.append(row)

    def result() -> Document:
        if not rows:
            raise TrainingFailed(f"nothing was measured for {title}: what was said before tells why")
        return document(title, rows, (before, os.getloadavg()[0]))

    return as_far_as_it_came(gather, lambda: bool(rows), result)


def partial(result: Document) -> Document:
    """It as that of a benchmark which was cut off: its name ends with ``-cut``, so that it replaces no whole one, and
    ``CUT`` is among its ``notes``."""
    return result | {"benchmark": f"{result['benchmark']}-cut", "notes": [*result.get("notes", ()), CUT]}


def report(result: Document, folder: Path, show: Callable[[Path], object]) -> None:
    """Writes a result, then shows it: ``show`` gets the file. Ends the process where it was cut off."""
    show(write(result, folder))
    if CUT in result.get("notes", ()):
        print(CUT, file=sys.stderr)
        sys.exit(INTERRUPTED)


def report_as_it_goes(
    measure: Callable[[Callable[[], object]], object],
    result: Callable[[], Document],
    folder: Path,
    show: Callable[[Path], object],
) -> None:
    """As :func:`report`; meanwhile what there is stands in ``folder/NAME-cut.json``, which outlives even SIGKILL.

    measure: calls what it is given when there is more. result: of what there is. Raises KeyboardInterrupt where it is
    cut off before that.
    """
    there = False

    def after() -> None:
        nonlocal there
        there = True
        write(partial(result()), folder)

    found = as_far_as_it_came(lambda: measure(after), lambda: there, result)
    report(found, folder, show)
    if there:
        (folder / f"{partial(found)['benchmark']}.json").unlink()
