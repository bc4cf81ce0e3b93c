"""The next global batch is read while ranks compute with the present one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from shoal.workers.data.batch import PackedBatch
from shoal.workers.data.loader import TrainLoader


class Ahead:
    """A loader that is one global batch ahead, in a thread: a window of the corpus takes longer than many a step.

    Nobody else may use the loader. It begins with the first batch that is asked for. What goes wrong with a batch is
    raised where that one is asked for.
    """

    def __init__(self, loader: TrainLoader) -> None:
        self._loader, self._state = loader, loader.state()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: Future[tuple[list[PackedBatch], dict[str, Any]]] | None = None

    def next(self) -> list[PackedBatch]:
        """As :meth:`TrainLoader.next` has it."""
        coming = self._coming or self._thread.submit(self._read)
        batches, self._state = coming.result()
        self._coming = self._thread.submit(self._read)
        return batches

    def state(self) -> dict[str, Any]:
        """As :meth:`TrainLoader.state` has it: after the batches that were asked for, whatever was read beyond."""
        return self._state

    def _read(self) -> tuple[list[PackedBatch], dict[str, Any]]:
        return self._loader.next(), self._loader.state()
