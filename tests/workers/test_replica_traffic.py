"""Gradients and weights travel between replicas while ranks compute, and nobody computes with what has not come yet."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small import small_corpus, small_recipe
from torch import Tensor

from shoal.workers import replicas
from shoal.workers.config import Recipe
from shoal.workers.mesh import Group, make_mesh
from shoal.workers.placement import Placement
from shoal.workers.replica_traffic import GradientSums
from shoal.workers.replicas import Replicas, in_order, share_out
from shoal.workers.trainer import Trainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def _sum(rank: int, world: int, seed: int) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Gradients of this rank's pieces, and what they should be, of two groups that share the ranks."""
    replicas.BUCKET = 256
    shared, own = random.Random(seed), random.Random(1000 * seed + rank)
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    shapes = [(shared.randint(1, 6), shared.randint(1, 9), 3)[: shared.randint(2, 3)] for _ in range(12)]
    kinds = [shared.random() < 0.5 for _ in shapes]
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    # whole numbers: their sums are exact in any order
    every = [
        [torch.randint(-99, 99, s, generator=_generator(seed, i, r)) for i, s in enumerate(shapes)]
        for r in range(world)
    ]
    gradients = [x.double() for x in every[rank]]
    held = [(i, x, x.ndim == 3) for i, x in enumerate(gradients)]
    both = [Replicas(group, share_out([h for h in held if kinds[h[0]] == kind], world)) for kind in (False, True)]
    sums = GradientSums(in_order(both, gradients))
    for step in range(2):
        order = [i for i in range(len(shapes)) if own.random() < 0.8]
        own.shuffle(order)
        for i in order:
            sums.came(i, gradients[i])
        sums.finish(gradients)
        found[step] = []
        for each in both:
            for piece in each.own:
                wanted = sum(piece.of(other).double() for other in every)
                found[step].append((piece.of(gradients).clone(), torch.as_tensor(wanted)))
        for gradient, first in zip(gradients, every[rank], strict=True):
            gradient.copy_(first)
    return found


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


@pytest.mark.parametrize("seed", [1, 2])
def test_gradients_that_come_in_any_order_or_not_at_all_are_summed(seed: int) -> None:
    """Three ranks, whose gradients are complete in orders of their own; two steps."""
    for steps in run_ranks(3, _sum, seed):
        assert len(steps) == 2
        for pieces in steps.values():
            assert pieces
            for found, wanted in pieces:
                assert torch.equal(found, wanted)


class _Late:
    """An exchange that happens when it is waited for, and not before."""

    def __init__(self, begin: Any, tensor: Tensor, rank: int, group: Any) -> None:
        self._all = begin, tensor, rank, group

    def wait(self) -> None:
        begin, tensor, rank, group = self._all
        begin(tensor, rank, group=group)


def _train(rank: int, world: int, tables: dict[str, Any], corpus: str, late: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    replicas.BUCKET = 4096
    if late:
        kinds = {"reduce": dist.reduce, "broadcast": dist.broadcast}
        for name, begin in kinds.items():
            setattr(Group, name, lambda g, x, place, begin=begin: _Late(begin, x, g.ranks[place], g.handle))
    recipe = Recipe.model_validate(tables)
    trainer = Trainer(recipe, Path(corpus), None, make_mesh(Placement.of(recipe), rank), torch.device("cpu"))
    buckets, begun = len(trainer.sums._buckets), []
    finish = trainer.sums.finish

    def watched(gradients: Sequence[Tensor]) -> None:
        begun.append(buckets - len(trainer.sums._waiting))
        finish(gradients)

    trainer.sums.finish = watched  # type: ignore[method-assign]
    missing: dict[int, set[str]] = {}

    def note(layer: int, *_: Any) -> None:
        missing.setdefault(layer, _missing(trainer))

    for i, layer in enumerate(trainer.model.layers):
        layer.register_forward_pre_hook(partial(note, i))
    records = [trainer.train_step()]
    missing.clear()
    records += [trainer.train_step() for _ in range(4)]
    evaluation = trainer.evaluate()
    tensors = {name: x.clone() for name, x in trainer.tensors().items()}
    found = {"records": records, "eval": evaluation, "tensors": tensors}
    return {**found, "buckets": buckets, "begun": begun, "missing": missing}


def _missing(trainer: Trainer) -> set[str]:
    """Weights that are on their way still."""
    names, travelling = list(trainer.parameters), trainer.weights._travelling
    pairs = zip(trainer.weights._buckets, travelling, strict=True)
    return {names[piece.index] for bucket, on_its_way in pairs if on_its_way for piece in bucket.pieces}


CASES: dict[str, dict[str, Any]] = {
    "2 replicas of all": {"parallel__ranks": 2, "parallel__expert": 1},
    "2 sets of experts over 4, computed again": {
        "parallel__ranks": 4,
        "parallel__expert": 2,
        "train__recompute": 1,
        "train__dtype": "bfloat16",
        "model__tied_embeddings": True,
    },
    "2A:2F": {"parallel__placement": "2A:2F"},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "2 replicas of all" else ()) for case in CASES]
)
def test_nothing_is_computed_with_that_has_not_come(corpus: Path, case: str) -> None:
    """Exchanges as late as they may be give the bits of those that happen at once, in steps, in validation and in what
    a checkpoint holds. All sums have begun when the backward pass ends. A layer waits for what it and those before it
    compute with, and the head, the largest of all, travels behind all of them."""
    tables = small_recipe(**CASES[case])
    ranks = Recipe.model_validate(tables).parallel.ranks
    late, soon = (run_ranks(ranks, _train, tables, str(corpus), how) for how in (True, False))
    for a, b in zip(late, soon, strict=True):
        assert [r["loss"] for r in a["records"]] == [r["loss"] for r in b["records"]]
        assert [r["grad_norm"] for r in a["records"]] == [r["grad_norm"] for r in b["records"]]
        assert a["eval"]["loss"] == b["eval"]["loss"]
        assert all(torch.equal(x, b["tensors"][name]) for name, x in a["tensors"].items())
    for rank in soon:
        assert rank["buckets"] == 0 or set(rank["begun"]) == {rank["buckets"]}
        assert list(rank["missing"]) == [0, 1, 2]
        for layer, names in rank["missing"].items():
            come = ("embedding.", *(f"layers.{i}." for i in range(layer + 1)))
            assert not [name for name in names if name.startswith(come)]
        if rank["buckets"] and "model__tied_embeddings" not in CASES[case]:
            assert "head.weight" in rank["missing"][2]
    assert any(rank["buckets"] > 2 for rank in soon)


def test_a_model_goes_with_its_trainer(corpus: Path) -> None:
    """Whose hooks its parameters have: of two runs in one process the second one needs the memory of the first."""
    recipe = Recipe.model_validate(small_recipe())
    trainer = Trainer(recipe, corpus, None, make_mesh(Placement.of(recipe)), torch.device("cpu"))
    trainer.train_step()
    model = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None
