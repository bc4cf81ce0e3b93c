"""What balances experts is part of a run's state: saved, restored to the bit, and opened by any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import small_corpus, small_recipe

from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.model.feedforward import named_biases
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer
from shoal.workers.weights import load_model

KEYS = ("loss", "grad_norm", "load")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def _train(
    rank: int, world: int, tables: dict[str, Any], corpus: str, folder: str, start: int, until: int
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Biases where it begins, and records; a checkpoint of step 3 is written on the way."""
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(tables)
    mesh = make_mesh(Placement.of(recipe), rank)
    trainer = Trainer(recipe, Path(corpus), Path(folder), mesh, torch.device("cpu"))
    if start:
        trainer.restore(start)
    biases = {name: bias.clone() for name, bias in named_biases(trainer.model)}
    records = []
    while trainer.step < until:
        records.append({key: value for key, value in trainer.train_step().items() if key in KEYS})
        if trainer.step == 3:
            trainer.save()
    trainer.settle()
    return biases, records


def test_biases_are_saved_and_restored_to_the_bit_on_any_ranks(corpus: Path, tmp_path: Path) -> None:
    two = small_recipe(balance__bias_rate=0.02, train__dtype="float32", parallel__ranks=2)
    first = run_ranks(2, _train, two, str(corpus), str(tmp_path), 0, 6)
    again = run_ranks(2, _train, two, str(corpus), str(tmp_path), 3, 6)
    saved = dict(named_biases(load_model(Recipe.model_validate(two), tmp_path, 3)))
    assert len(saved) == 2
    for name, bias in saved.items():
        assert bias.dtype == torch.float32
        assert 0 < bias.abs().max() <= 3 * 0.0201, name
    for (_, whole), (biases, rest) in zip(first, again, strict=True):
        assert all(torch.equal(biases[name], saved[name]) for name in saved)
        assert rest == whole[3:]
    apart = small_recipe(balance__bias_rate=0.02, train__dtype="float32", parallel__placement="2A:2F")
    for biases, rest in run_ranks(4, _train, apart, str(corpus), str(tmp_path), 3, 4):
        assert all(torch.equal(biases[name], saved[name]) for name in saved)
        assert rest[0]["loss"] == pytest.approx(first[0][1][3]["loss"], rel=2e-5)
