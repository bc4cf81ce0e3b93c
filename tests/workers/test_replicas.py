"""Replicas keep a share of the optimizer's state each; checkpoints of them open on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from small import small_corpus, small_recipe
from torch import Tensor, nn

from shoal.workers.config import Recipe, TrainTable
from shoal.workers.mesh import make_mesh
from shoal.workers.optimizer import MasterAdamW
from shoal.workers.placement import Placement
from shoal.workers.replicas import share_out
from shoal.workers.trainer import Trainer

SHARED: dict[str, Any] = {"model__context": 96, "train__sequence": 96, "train__batch": 6}
"""Rows for the ranks of a context group, as of test_parallel.py."""
TWO_SHARE = {**SHARED, "parallel__ranks": 2, "parallel__context": 2}
TWO_OF_TWO = {**SHARED, "parallel__ranks": 4, "parallel__context": 2, "parallel__expert": 2}
ONE, APART = SHARED, {**SHARED, "parallel__placement": "2A:2F", "parallel__context": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20), st.booleans()), min_size=1, max_size=12),
    ranks=st.integers(1, 9),
)
def test_each_row_has_one_rank_and_ranks_have_about_as_much(shapes: list[tuple[int, int, bool]], ranks: int) -> None:
    """Only what is stacked is cut; no rank has more than a fair share and the largest piece."""
    shares = share_out([(i, torch.empty(rows, width), cut) for i, (rows, width, cut) in enumerate(shapes)], ranks)
    assert len(shares) == ranks
    seen = sorted((p.index, row) for share in shares for p in share for row in range(p.start, p.stop))
    assert seen == [(i, row) for i, (rows, _, _) in enumerate(shapes) for row in range(rows)]
    for share in shares:
        assert all(shapes[p.index][2] or (p.start, p.stop) == (0, shapes[p.index][0]) for p in share)
    sizes = [[(p.stop - p.start) * shapes[p.index][1] for p in share] for share in shares]
    fair = sum(map(sum, sizes)) / ranks
    assert max(map(sum, sizes)) <= fair + max(max(share, default=0) for share in sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_has_the_bits_of_pytorchs_adamw(dtype: torch.dtype) -> None:
    """On float32 masters, of which bfloat16 weights are rounded copies; norms do not decay."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 5), (6, 4, 3), (9,))]
    table = TrainTable(steps=3, batch=1, sequence=2, learning_rate=1e-2, weight_decay=0.1)
    optimizer = MasterAdamW(weights, table)
    masters = [nn.Parameter(x.detach().to(torch.float32, copy=True)) for x in weights]
    groups = [{"params": masters[:2], "weight_decay": 0.1}, {"params": masters[2:], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(table.beta1, table.beta2), eps=table.adam_eps, fused=True)
    for rate in (1e-2, 3e-3, 1e-3):
        for index, (weight, master) in enumerate(zip(weights, masters, strict=True)):
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
            master.grad = weight.grad.to(torch.float32, copy=True)
            optimizer.take(index)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        optimizer.step(rate)
        assert all(torch.equal(w, m.to(dtype)) for w, m in zip(weights, masters, strict=True))
    for index, master in enumerate(masters):
        kept = dict(optimizer.state_of(index))
        assert kept.keys() == {"exp_avg", "exp_avg_sq"} | ({"master"} if dtype == torch.bfloat16 else set())
        for kind, tensor in kept.items():
            assert torch.equal(tensor, master if kind == "master" else adam.state[master][kind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shares_of_an_update_are_the_same_bits_as_the_whole(dtype: torch.dtype) -> None:
    """Three ranks' optimizers, the weights handed on as bits, beside one that updates all; two backward passes each."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (6, 4, 3), (9,), (2, 8)]
    first = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    table = TrainTable(steps=3, batch=1, sequence=2, learning_rate=1e-2)
    whole = [nn.Parameter(x.clone()) for x in first]
    optimizer = MasterAdamW(whole, table)
    shares = share_out([(i, x, x.ndim == 3) for i, x in enumerate(first)], 3)
    replicas = [[nn.Parameter(x.clone()) for x in first] for _ in shares]
    parts = [MasterAdamW(held, table, share) for held, share in zip(replicas, shares, strict=True)]
    for _ in range(3):
        grads = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(2)]
        for some in (optimizer, *parts):
            for each in grads:
                for i, (parameter, grad) in enumerate(zip(some.parameters, each, strict=True)):
                    parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad
                    some.take(i)
            some.step(1e-2)
        for share, held in zip(shares, replicas, strict=True):
            for piece in share:
                for other in replicas:
                    piece.of(other).data.copy_(piece.of(held))
        for held in replicas:
            assert all(torch.equal(a, b) for a, b in zip(held, whole, strict=True))
    masters = {p: m for some in parts for p, m in zip(some.pieces, some.masters, strict=True)}
    for piece, master in masters.items():
        assert torch.equal(master, optimizer.masters[piece.index][piece.start : piece.stop])


def _buffers(rank: int, world: int, tables: dict[str, Any], corpus: str) -> dict[str, Any]:
    """Bytes of the optimizer's state on this rank, and the weights after two steps, by name."""
    trainer = _trainer(rank, tables, corpus, None)
    for _ in range(2):
        trainer.train_step()
    tensors = trainer.tensors()
    state = {name: x.nbytes for name, x in tensors.items() if name.startswith("optim.")}
    held = sum(x.nbytes for moments in trainer.optimizer.moments for x in moments[:2])
    held += sum(m.nbytes for m in trainer.optimizer.masters)
    weights = {name: x.clone() for name, x in tensors.items() if name.startswith("model.")}
    return {"state": state, "held": held, "weights": weights}


def test_state_falls_with_the_number_of_replicas_which_have_the_same_bits(corpus: Path) -> None:
    """One rank; four with two replicas of each expert, where all hold the dense weights."""
    (one,) = run_ranks(1, _buffers, small_recipe(train__dtype="bfloat16", **ONE), str(corpus))
    four = run_ranks(4, _buffers, small_recipe(train__dtype="bfloat16", **TWO_OF_TWO), str(corpus))
    assert sum(rank["held"] for rank in four) == one["held"] == sum(one["state"].values())
    names = [name for rank in four for name in rank["state"]]
    assert sorted(names) == sorted(one["state"])  # each once
    for rank in four:
        assert rank["held"] == sum(rank["state"].values())
        assert rank["held"] < 1.01 * one["held"] / 4
    for rank in four:
        for name, weights in rank["weights"].items():
            assert all(torch.equal(weights, other["weights"].get(name, weights)) for other in four), name


def _trainer(rank: int, tables: dict[str, Any], corpus: str, folder: Path | None) -> Trainer:
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(tables)
    mesh = make_mesh(Placement.of(recipe), rank)
    return Trainer(recipe, Path(corpus), folder, mesh, torch.device("cpu"))


def _begin(rank: int, world: int, tables: dict[str, Any], corpus: str, folder: Path) -> list[dict[str, Any]]:
    """Three steps, a checkpoint, three more: the records of those, and all tensors at the end."""
    trainer = _trainer(rank, tables, corpus, folder)
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    trainer.settle()
    return _three_more(trainer)


def _go_on(rank: int, world: int, tables: dict[str, Any], corpus: str, folder: Path) -> list[dict[str, Any]]:
    trainer = _trainer(rank, tables, corpus, folder)
    trainer.restore(3)
    return _three_more(trainer)


def _three_more(trainer: Trainer) -> list[dict[str, Any]]:
    records = [{k: r[k] for k in ("step", "loss", "grad_norm", "load")} for r in (trainer.train_step() for _ in "123")]
    return [*records, {name: x.clone() for name, x in trainer.tensors().items()}]


@pytest.mark.parametrize(
    ("before", "after"), [(TWO_SHARE, ONE), (TWO_OF_TWO, APART)], ids=["2 ranks, then one", "2 groups of 2, then 2A:2F"]
)
def test_a_checkpoint_of_ranks_that_share_sequences_opens_anywhere(
    corpus: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """The same bits on the same ranks; to rounding on others."""
    ranks = Recipe.model_validate(small_recipe(**before)).parallel.ranks
    first = run_ranks(ranks, _begin, small_recipe(**before), str(corpus), tmp_path)
    again = run_ranks(ranks, _go_on, small_recipe(**before), str(corpus), tmp_path)
    for a, b in zip(first, again, strict=True):
        assert a[:-1] == b[:-1]
        assert _same(a[-1], b[-1])
    everything = {name: tensor for rank in first for name, tensor in rank[-1].items()}
    world = Recipe.model_validate(small_recipe(**after)).parallel.ranks
    other = run_ranks(world, _go_on, small_recipe(**after), str(corpus), tmp_path)
    for result in other:
        for a, b in zip(first[0][:-1], result[:-1], strict=True):
            assert (a["step"], a["load"]) == (b["step"], b["load"])
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-9)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-9)
    found = {name: tensor for rank in other for name, tensor in rank[-1].items()}
    assert found.keys() == everything.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, everything[name], rtol=1e-6, atol=1e-9), name


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
