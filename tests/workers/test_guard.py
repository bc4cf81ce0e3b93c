"""Numbers that are not finite stop all ranks at once, say where they came from, and never reach a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from small import small_corpus, small_recipe

from shoal.workers.checkpoint_files import list_checkpoints
from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement
from shoal.workers.trainer import NotFinite, Trainer


def _train(rank: int, world: int, tables: dict[str, Any], corpus: Path, checkpoints: Path) -> str:
    """Saves every step; returns why training stopped."""
    recipe = Recipe.model_validate(tables)
    mesh = make_mesh(Placement.of(recipe), rank)
    trainer = Trainer(recipe, corpus, checkpoints, mesh, torch.device("cpu"))
    try:
        while trainer.step < recipe.train.steps:
            trainer.advance()
            trainer.save()
    except NotFinite as error:
        return str(error)
    finally:
        trainer.settle()
    return ""


@pytest.mark.parametrize("placement", ["colocated", "1A:1F"])
@pytest.mark.parametrize("rate", [1e30, 1e200])
def test_a_wild_learning_rate_stops_all_ranks(rate: float, placement: str, tmp_path: Path) -> None:
    """Weights of 1e30 spoil the next step's loss; of 1e200, themselves (float32)."""
    tables = small_recipe(
        train__dtype="float32", train__steps=6, train__learning_rate=rate, train__warmup=0,
        parallel__ranks=2, parallel__placement=placement,
    )  # fmt: skip
    checkpoints = tmp_path / "checkpoints"
    one, other = run_ranks(2, _train, tables, small_corpus(tmp_path), checkpoints)
    assert one == other
    assert re.match(r"step \d: .*(layers\.\d|the embedding|the loss).* is not finite", one)
    for info in list_checkpoints(checkpoints):
        for file in info.path.glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(file).values())
