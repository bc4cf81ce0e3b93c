"""A progress bar on a terminal, plain lines elsewhere. Both show the same figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from shoal.jobs.report.journal import Record

TROUBLE = ("recovered", "waiting", "stopping", "stopped")
STYLES = {"failed": "red", "checkpoint": "dim", **dict.fromkeys(TROUBLE, "yellow")}


class View(Protocol):
    """Shows where a run stands."""

    def train(self, record: Record) -> None:
        """Shows a step's figures."""

    def say(self, text: str, style: str = "") -> None:
        """Shows one line that stays."""

    def rewind(self, step: int) -> None:
        """The run went back to ``step``."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


def make_view(console: Console, total: int, start: int, clock: Callable[[], float] = time.monotonic) -> View:
    """A bar where ``console`` is a terminal that can move its cursor, lines where it is not."""
    if console.is_terminal and not console.is_dumb_terminal:
        return Bar(console, total, start)
    return Lines(console, total, start, clock)


class Pace:
    """Time left, from a running mean of the seconds a step takes (weight 0.1 to the newest)."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds = 0.0

    def left(self, record: Record) -> str:
        """``h:mm:ss`` to the last step, as of this record of kind train."""
        took = record.get("step_seconds") or 0.0
        self.seconds = 0.9 * self.seconds + 0.1 * took if self.seconds else took
        return str(timedelta(seconds=round(max(0, self.total - record["step"]) * self.seconds)))


def figures(record: Record, left: str) -> str:
    """A train record as one line of text; figures that it lacks (a dense model has no imbalance) are left out."""
    parts = [
        ("loss", "loss {:.3f}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("learning_rate", "lr {:.1e}"),
        ("expert_imbalance", "imbalance {:.2f}"),
    ]
    shown = [form.format(record[key]) for key, form in parts if record.get(key) is not None]
    return "  ".join([*shown, f"ETA {left}"])


class Bar:
    """One live line at the bottom of the terminal; what is said goes above it."""

    def __init__(self, console: Console, total: int, start: int) -> None:
        self._pace = Pace(total)
        columns = [MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[figures]}", markup=False)]
        # Twice a second is enough for an eye, and the cores belong to the training.
        self._progress = Progress(*columns, console=console, refresh_per_second=2, expand=True)
        self._task = self._progress.add_task("", total=total, completed=start, figures="starting")
        self._progress.start()

    def train(self, record: Record) -> None:
        text = figures(record, self._pace.left(record))
        self._progress.update(self._task, completed=record["step"], figures=text)

    def say(self, text: str, style: str = "") -> None:
        self._progress.console.print(Text(text, style=style))

    def rewind(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """A line at the first and the last step and, between them, not more than about a hundred, or one a minute.

    A line is due after 10 % of the run, after 5 s if they brought 1 % of it, and after a minute in any case.
    """

    def __init__(self, console: Console, total: int, start: int, clock: Callable[[], float]) -> None:
        self._console = console
        self._total = total
        self._pace = Pace(total)
        self._clock = clock
        self._shown_step: int | None = None
        self._shown_at = 0.0

    def train(self, record: Record) -> None:
        left = self._pace.left(record)
        if self._due(record["step"]):
            self._shown_step, self._shown_at = record["step"], self._clock()
            self.say(f"step {record['step']}/{self._total}  {figures(record, left)}")

    def say(self, text: str, style: str = "") -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def rewind(self, step: int) -> None:
        if self._shown_step is not None:
            self._shown_step = min(self._shown_step, step)

    def close(self) -> None:
        pass

    def _due(self, step: int) -> bool:
        if self._shown_step is None or step >= self._total:
            return True
        share = (step - self._shown_step) / self._total
        waited = self._clock() - self._shown_at
        return share >= 0.1 or (waited >= 5 and share >= 0.01) or waited >= 60
