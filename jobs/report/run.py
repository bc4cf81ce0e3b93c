"""RunReport: takes the records of a run as they arrive and tells them everywhere they belong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console

from shoal.jobs.report.journal import Journal, Record
from shoal.jobs.report.progress import STYLES, View, make_view

if TYPE_CHECKING:
    from shoal.jobs.report.events import EventLog


class RunReport:
    """Reports one run to ``run_dir``: metrics.jsonl, TensorBoard events, loss.png, expert_load.png; and to a console.

    resume_step: the step of the checkpoint that the run goes on from; None for a new run. plot_every: seconds between
    two drawings of the plots, which are drawn at the end in any case. A record is a dict with ``kind`` and ``step``:

    - train: loss, balance_loss, learning_rate, grad_norm, step_seconds, tokens_per_second, expert_imbalance,
      dispatch_reads (of sizes, by a rank's host), dispatch_wait_seconds (how long it waited for them in the step),
      tokens (since the first step), time (seconds since 1970), mfu; of rank 0, parts of step_seconds: data_seconds,
      forward_seconds, backward_seconds, reduce_seconds, update_seconds, and dispatch_seconds, which lies within them
    - eval: loss (nats a token), bits_per_byte, unigram_bits_per_byte, gzip_bits_per_byte, tokens, bytes
    - load: load, ``[MoE layers][experts]``, devices, ``[expert ranks of a set]``, the mean of layer_devices, ``[MoE
      layers][expert ranks of a set]``: 1.0 = fair share; of each layer's experts entropy (1.0 = even) and max_over_mean
    - gates: gates, ``[layers][3]``: means of NSA's gates (compressed, selected, window)
    - event: event, text

    metrics.jsonl is the run's record, so a failure to write it raises InvalidInput. Events files and plots can be made
    again from it: a failure to write them is said once, and the run goes on; so it does when ``console`` fails.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        console: Console,
        resume_step: int | None = None,
        *,
        plot_every: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_dir = run_dir
        self._restart_at = None if resume_step is None else resume_step + 1
        self._journal = Journal(run_dir / "metrics.jsonl", resume_step)
        self._view: View | None = make_view(console, total_steps, resume_step or 0, clock)
        self._events: EventLog | None = None
        self._events_failed = False
        self._plot_every = plot_every
        self._plotted_at = clock()
        self._clock = clock
        self._closed = False

    def record(self, record: Record) -> None:
        """Takes one record. Raises InvalidInput when metrics.jsonl cannot be written."""
        self._journal.append(record)
        kind = record["kind"]
        if kind == "train":
            self._show(lambda view: view.train(record))
        elif kind == "eval":
            self._say(_validation(record))
        elif kind == "event":
            self._say(f"step {record['step']}: {record['text']}", STYLES.get(record["event"], ""))
        if kind != "event":
            self._to_events(lambda events: events.write(record))
        if self._clock() - self._plotted_at >= self._plot_every:
            self._plot()

    def rewind(self, step: int) -> None:
        """The run went back to ``step``: what was reported of later steps is removed, events excepted."""
        self._journal.rewind(step)
        self._show(lambda view: view.rewind(step))
        self._restart_at = step + 1
        if self._events is not None:
            self._to_events(lambda events: events.restart(step + 1))

    def close(self) -> None:
        """Draws the plots and closes everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._plot()
        self._show(lambda view: view.close())
        self._journal.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(self, text: str, style: str = "") -> None:
        self._show(lambda view: view.say(text, style))

    def _show(self, show: Callable[[View], None]) -> None:
        """Shows something, as long as it can be shown: a full disk under the output is no reason to end a run."""
        if self._view is None:
            return
        try:
            show(self._view)
        except OSError:
            self._view = None

    def _to_events(self, write: Callable[[EventLog], None]) -> None:
        if self._events_failed:
            return
        try:
            if self._events is None:
                # Loaded here, after the first step, so that no step waits for it.
                from shoal.jobs.report.events import EventLog

                self._events = EventLog(self.run_dir, self._restart_at)
            write(self._events)
        except OSError as error:
            self._events_failed = True
            self._say(f"TensorBoard events are no longer written ({error.strerror}); metrics.jsonl is", "yellow")

    def _plot(self) -> None:
        self._plotted_at = self._clock()
        try:
            from shoal.jobs.report.plots import draw

            draw(self.run_dir)
        except Exception as error:  # whatever is wrong with a picture, the run it shows is worth more
            self._say(f"the plots in {self.run_dir} were not drawn ({error})", "yellow")


def _validation(record: Record) -> str:
    text = f"step {record['step']}: validation loss {record['loss']:.3f}"
    if record.get("bits_per_byte") is not None:
        text += f", {record['bits_per_byte']:.3f} bits per byte"
    beside = [
        f"{name} {record[key]:.3f}"
        for name, key in (("unigram", "unigram_bits_per_byte"), ("gzip", "gzip_bits_per_byte"))
        if record.get(key) is not None
    ]
    return text + (f" ({', '.join(beside)})" if beside else "")


def draw_missing(run_dir: Path) -> None:
    """Draws the plots of a run that ended before it could; a failure leaves them out."""
    from shoal.jobs.report.plots import draw

    if not (run_dir / "loss.png").exists():
        with contextlib.suppress(Exception):
            draw(run_dir)
