"""Validation of a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shoal.jobs.load import Trained
from shoal.workers.data.loader import ValLoader
from shoal.workers.data.manifest import read_manifest
from shoal.workers.errors import InvalidInput
from shoal.workers.validate import validate


@torch.no_grad()
def evaluate_model(trained: Trained, corpus: Path, tokens: int) -> dict[str, Any]:
    """``loss`` (nats a token), ``bits_per_byte``, ``tokens``, ``bytes``, over whole validation documents of ``corpus``.

    Raises InvalidInput when the corpus has another tokenizer than the model's.
    """
    own, other = read_manifest(trained.corpus), read_manifest(corpus)
    if own.tokenizer.sha256 != other.tokenizer.sha256:
        raise InvalidInput(
            f"{corpus} has another tokenizer than the run's corpus {trained.corpus}: "
            f"prepare it again with --tokenizer {trained.corpus}/tokenizer.json"
        )
    t = trained.recipe.train
    loader = ValLoader(corpus, t.sequence, tokens, max(1, t.batch // t.accumulate), (0, 1))
    return validate(trained.model, loader)
