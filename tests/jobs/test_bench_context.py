"""``shoal bench context`` on a CPU: trainings over two gloo ranks and on one, and what is written of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import small_corpus, small_recipe

from shoal.jobs.bench import context_rank
from shoal.jobs.bench.command import environment
from shoal.jobs.bench.context import long_document
from shoal.jobs.bench.scale_series import SETTLED
from shoal.jobs.recipe import load_recipe
from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.model.load import MoELoad
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer


def test_experts_are_even_before_the_first_step(tmp_path: Path) -> None:
    """As far as one batch differs from the next; nothing but biases changes, and without biases nothing does."""
    corpus = small_corpus(tmp_path)
    for rate in (1e-6, 0.0):
        recipe = Recipe.model_validate(small_recipe(balance__bias_rate=rate, train__batch=32, train__dtype="float32"))
        trainer = Trainer(recipe, corpus, None, make_mesh(Placement.of(recipe)), torch.device("cpu"))
        weights = [p.detach().clone() for p in trainer.parameters.values()]
        with torch.no_grad():
            before = _fullest(context_rank.counts_of(trainer))
            context_rank.settle(trainer)
            after = _fullest(context_rank.counts_of(trainer))
        assert all(torch.equal(a, b) for a, b in zip(weights, trainer.parameters.values(), strict=True))
        assert before > 1.4
        assert after < 1.1 if rate else after > 1.4


def test_sequences_that_come_later_are_even_too_where_routers_see_tokens(tmp_path: Path) -> None:
    """Each by itself, of one long document. With small embeddings a new router sees what attention adds, which is one
    for all tokens of a sequence and another for the next one's: then biases that suit both do not exist."""
    corpus = long_document(tmp_path, 200_000)
    sizes = (
        "model.layers=3", "model.hidden=64", "model.heads=4", "model.kv_heads=1", "model.head_dim=64",
        "model.dense_hidden=64", "model.init_std=0.08", "model.vocab=512", "moe.experts=32", "moe.top_k=6",
        "moe.expert_hidden=16", "attention.window=64", "attention.slc_count=4", "model.context=1024",
        "model.rope_original=128", "train.sequence=1024", "train.batch=4", "train.accumulate=4", "train.dtype=float32",
        "data.shuffle_tokens=65536", "parallel.device=cpu", "parallel.ranks=1", "parallel.context=1",
    )  # fmt: skip
    busiest = {}
    for wide in (True, False):
        recipe = load_recipe("nsa-64k-small", [*sizes, *SETTLED, *([] if wide else ["model.embedding_std=0"])])
        trainer = Trainer(recipe, corpus, None, make_mesh(Placement.of(recipe)), torch.device("cpu"))
        with torch.no_grad():
            assert len(context_rank.settle(trainer, 8)) == 8
            later = [_of_four_ranks(_next_sequence(trainer)) for _ in range(4)]
        busiest[wide] = sum(later) / len(later)
    assert busiest[True] < 1.15
    assert busiest[False] > 1.2


def _next_sequence(trainer: Trainer) -> torch.Tensor:
    load = MoELoad(1)
    trainer.model(trainer.loader.next()[0], load)
    assert load.counts is not None
    return load.counts


def _of_four_ranks(counts: torch.Tensor) -> float:
    """Rows of the busiest, as a multiple of a fair share, the mean over layers."""
    ranks = counts.double().unflatten(1, (4, -1)).sum(-1)
    return float((ranks.amax(1) / ranks.mean(1)).mean())


def _fullest(counts: torch.Tensor) -> float:
    """Tokens of each layer's fullest expert, as a multiple of the mean; of all layers the most."""
    return float((counts.amax(1) / counts.double().mean(1)).max())


@pytest.mark.slow
def test_two_ranks_lose_what_one_loses_and_all_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal.jobs.bench.context", "--out", str(tmp_path), "--steps", "3"]
    subprocess.run([*command, "--data-dir", str(tmp_path / "data")], check=True, env=environment(), timeout=300)
    result = json.loads((tmp_path / "context.json").read_text())
    losses = {(r["context"], r["attention"], r["ranks"]): r["losses"] for r in result["rows"]}
    assert set(losses) == {(2048, kind, ranks) for kind in ("nsa", "full") for ranks in (1, 2)} | {(8192, "nsa", 2)}
    for kind in ("nsa", "full"):
        assert losses[2048, kind, 2] == pytest.approx(losses[2048, kind, 1], rel=1e-5)
    beside = {(r["attention"], r["ranks"], r["baseline"]) for r in result["rows"] if "ratio" in r}
    assert beside == {
        ("nsa", 2, "full attention"),
        ("nsa", 2, "one rank"),
        ("full", 2, "one rank"),
        ("nsa", 1, "full attention"),
    }
    records = [json.loads(line) for line in (tmp_path / "64k-nsa-2.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
