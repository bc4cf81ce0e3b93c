"""The next global batch is read while ranks compute with the present one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from shoal.workers.data.batch import PackedBatch
from shoal.workers.data.loader import TrainLoader


class Ahead:
    """A loader that is one global batch ahead, in a thread: a window of the corpus takes longer than many a step.

    Nobody else may use the loader. It begins with the first batch that is asked for. What goes wrong with a batch is
    raised where that one is asked for. part: what of a micro-batch is wanted. device: where it is to go; for a GPU, the
    host's memory is such that nobody waits for copies.
    """

    def __init__(
        self, loader: TrainLoader, part: Callable[[PackedBatch], PackedBatch], device: torch.device | None = None
    ) -> None:
        self._loader, self._part, self._state = loader, part, loader.state()
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "batches")
        self._coming: Future[tuple[list[PackedBatch], dict[str, Any]]] | None = None

    def next(self) -> list[PackedBatch]:
        """As :meth:`TrainLoader.next` has it, of each micro-batch the part that is wanted."""
        coming = self._coming or self._thread.submit(self._read)
        batches, self._state = coming.result()
        self._coming = self._thread.submit(self._read)
        return batches

    def state(self) -> dict[str, Any]:
        """As :meth:`TrainLoader.state` has it: after the batches that were asked for, whatever was read beyond."""
        return self._state

    def _read(self) -> tuple[list[PackedBatch], dict[str, Any]]:
        batches = [self._part(batch) for batch in self._loader.next()]
        if self._gpu is not None:
            with torch.cuda.device(self._gpu):  # another thread's is another one
                batches = [batch.pinned() for batch in batches]
        return batches, self._loader.state()
