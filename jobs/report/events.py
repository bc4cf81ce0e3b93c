"""TensorBoard events, by tensorboard's own record format. Importing this loads tensorboard (0.1 to 0.4 s)."""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path

# Not EventFileWriter: where TensorFlow is installed, that one imports it.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from shoal.jobs.report.journal import Record
from shoal.workers.records import GATES, coverage_figures, spread

_files = itertools.count()


class EventLog:
    """Writes scalars to a new events file in ``folder``; ``restart_at`` is as for ``restart``. Raises OSError."""

    def __init__(self, folder: Path, restart_at: int | None = None) -> None:
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        self._writer = RecordWriter((folder / name).open("xb", buffering=0))
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        if restart_at is not None:
            self.restart(restart_at)

    def restart(self, step: int) -> None:
        """Tells TensorBoard to drop everything at ``step`` and later: it is about to be written anew."""
        self._write(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: Record) -> None:
        """Writes the numbers of a record; an event has none."""
        values = scalars(record)
        if values:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            self._write(Event(wall_time=record.get("time") or time.time(), step=record["step"], summary=summary))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())


def scalars(record: Record) -> dict[str, float]:
    """The curves that a record adds a point to: ``train/…``, ``eval/…``, ``expert_load/layer_N/…``, ``device_load/N``,
    ``device_load/layer_N/…``, ``gate/layer_N/…``, ``coverage/layer_N/…``."""
    kind = record["kind"]
    if kind in ("train", "eval"):
        return {
            f"{kind}/{key}": float(value)
            for key, value in record.items()
            if key not in ("step", "time") and isinstance(value, int | float)
        }
    if kind == "load":
        curves = {f"device_load/{i}": value for i, value in enumerate(record.get("devices") or ())}
        for what, layers in (("expert", record["load"]), ("device", record.get("layer_devices") or ())):
            for i, row in enumerate(layers):
                curves |= {f"{what}_load/layer_{i}/{key}": value for key, value in spread(row).items()}
        return curves
    if kind == "gates":
        return {
            f"gate/layer_{i}/{branch}": value
            for i, row in enumerate(record["gates"])
            for branch, value in zip(GATES, row, strict=True)
        }
    if kind == "coverage":
        return {
            f"coverage/layer_{i}/{name}": value
            for i, figures in enumerate(coverage_figures(record))
            for name, value in figures.items()
        }
    return {}
