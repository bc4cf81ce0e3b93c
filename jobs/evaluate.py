"""Validation of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from shoal.jobs.load import Trained
from shoal.jobs.run_folder import TOKENIZER
from shoal.workers.data.batch import PackedBatch
from shoal.workers.data.loader import ValLoader
from shoal.workers.data.manifest import read_manifest
from shoal.workers.errors import InvalidInput
from shoal.workers.validate import validate


class _Watched(ValLoader):
    """Tells before each step how many are done, and of how many."""

    told: Callable[[int, int], None]

    def __iter__(self) -> Iterator[PackedBatch]:
        for done, batch in enumerate(super().__iter__()):
            self.told(done, len(self))
            yield batch
        self.told(len(self), len(self))


@torch.no_grad()
def evaluate_model(
    trained: Trained, corpus: Path, tokens: int, told: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """``loss`` (nats a token), ``bits_per_byte``, ``tokens``, ``bytes``, over whole validation documents of ``corpus``.

    told: gets how many steps are done, and of how many. Raises InvalidInput when the corpus has another tokenizer than
    the model's.
    """
    if trained.folder.tokenizer_hash() != read_manifest(corpus).tokenizer.sha256:
        own = trained.folder.path / TOKENIZER
        raise InvalidInput(
            f"{corpus} has another tokenizer than the run {trained.folder.name}: prepare it again with "
            f"--tokenizer {own if own.exists() else trained.corpus / TOKENIZER}"
        )
    t = trained.recipe.train
    loader = _Watched(corpus, t.sequence, tokens, max(1, t.batch // t.accumulate), (0, 1))
    loader.told = told
    return validate(trained.model, loader)
