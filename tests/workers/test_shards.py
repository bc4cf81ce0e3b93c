"""Dense weights in shards (FSDP2): one rank's numbers, a share of its bytes, and checkpoints that open anywhere."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from small import small_corpus, small_recipe
from torch import Tensor, nn

from shoal.workers.checkpoint import Checkpointer
from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement
from shoal.workers.sample import sample
from shoal.workers.shards import local, shard_dim
from shoal.workers.trainer import NotFinite, Trainer
from shoal.workers.weights import load_model, weights_of

KEYS = ("loss", "balance_loss", "grad_norm")
STEPS = 6  # the rate still rises in the first three
SHARED: dict[str, Any] = {"model__context": 96, "train__sequence": 96, "train__batch": 6}
"""Rows for the ranks of a context group, as of test_parallel.py, and for parts of a batch."""
EVEN: dict[str, Any] = {"balance__sequence": 0.05, "balance__z_loss": 0.02, "balance__bias_rate": 0.05}
LAYOUTS: dict[str, dict[str, Any]] = {
    "2 colocated": {"parallel__ranks": 2},
    "2 groups of 2, 2 sets of experts": {
        "parallel__ranks": 4, "parallel__context": 2, "parallel__expert": 2, "train__recompute": 2,
    },
    "2A:1F, in parts": {"parallel__placement": "2A:1F", "train__accumulate": 3},
    "2A:2F, all of it": {
        "parallel__placement": "2A:2F", "parallel__context": 2, "train__recompute": 3, "train__accumulate": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def _trainer(rank: int, tables: dict[str, Any], corpus: Path, folder: Path | None = None) -> Trainer:
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(tables)
    return Trainer(recipe, corpus, folder, make_mesh(Placement.of(recipe), rank), torch.device("cpu"))


def _ranks(fn: Any, tables: dict[str, Any], *args: Any) -> list[Any]:
    return run_ranks(Recipe.model_validate(tables).parallel.ranks, fn, tables, *args)


def _sharded(**changes: Any) -> dict[str, Any]:
    return small_recipe(parallel__shard_dense=True, **changes)


def _train(
    rank: int, world: int, tables: dict[str, Any], corpus: Path, folder: Path, start: int, until: int
) -> list[dict[str, Any]]:
    """From a checkpoint to another one: records of the steps between, a validation, and a sample."""
    trainer = _trainer(rank, tables, corpus, folder)
    if start:
        trainer.restore(start)
    records = [trainer.train_step() for _ in range(start, until)]
    records += [{"loss": trainer.evaluate()["loss"], "sample": sample(trainer.model, [1, 2, 3], 4, temperature=0.0)}]
    trainer.save()
    trainer.settle()
    return [{key: r[key] for key in (*KEYS, "load", "gates", "sample") if key in r} for r in records]


def _saved(folder: Path, step: int, like: Trainer) -> dict[str, Tensor]:
    """All tensors of a checkpoint, each as large as on one rank."""
    into = {name: torch.empty_like(tensor) for name, tensor in like.tensors().items()}
    Checkpointer(folder, 3, None, 1, 1).load(step, into)
    return into


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What one rank makes of so many steps, and its checkpoints of the third and the last."""
    folder = tmp_path_factory.mktemp("one")
    tables = small_recipe(**SHARED, **EVEN)
    return _train(0, 1, tables, corpus, folder, 0, 3)[:-1] + _train(0, 1, tables, corpus, folder, 3, STEPS), folder


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if "all of it" in name else pytest.mark.slow) for name in LAYOUTS]
)
def test_shards_train_as_one_rank_does(
    corpus: Path, tmp_path: Path, one: tuple[list[dict[str, Any]], Path], layout: str
) -> None:
    """Losses, norms and the whole state after the last step, by a checkpoint that has each tensor once and whole."""
    records, folder = one
    many = _ranks(_train, _sharded(**SHARED, **EVEN, **LAYOUTS[layout]), corpus, tmp_path, 0, STEPS)
    for rank, result in enumerate(many):
        for a, b in zip(records[:-1], result[:-1], strict=True):
            assert all(b[key] == pytest.approx(a[key], rel=1e-9) for key in KEYS)
            assert b["load"] == a["load"]
            assert torch.allclose(torch.tensor(b["gates"]), torch.tensor(a["gates"]))
        assert result[-1]["loss"] == pytest.approx(records[-1]["loss"], rel=1e-9)
        assert result[-1]["sample"] == (records[-1]["sample"] if rank == 0 else [])
    like = _trainer(0, small_recipe(**SHARED, **EVEN), corpus)
    want, found = (_saved(place, STEPS, like) for place in (folder, tmp_path))
    for name, tensor in found.items():
        assert (tensor - want[name]).norm() <= 1e-9 * want[name].norm(), name


@pytest.mark.slow
def test_parts_may_be_uneven_and_some_empty(corpus: Path, tmp_path: Path) -> None:
    """Three ranks, of which the last has nothing of φ's weights for two KV heads."""
    sizes: dict[str, Any] = {"model__hidden": 48, "train__batch": 6}
    three = _sharded(parallel__ranks=3, parallel__expert=1, **sizes)
    one = _train(0, 1, small_recipe(**sizes), corpus, tmp_path / "one", 0, 3)
    _ranks(_train, three, corpus, tmp_path / "three", 0, 2)
    for result in _ranks(_train, three, corpus, tmp_path / "three", 2, 3):
        assert all(result[0][key] == pytest.approx(one[2][key], rel=1e-9) for key in KEYS)
    like = _trainer(0, small_recipe(**sizes), corpus)
    want, found = (_saved(tmp_path / name, 3, like) for name in ("one", "three"))
    assert all((x - want[name]).norm() <= 1e-9 * want[name].norm() for name, x in found.items())


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_two_ranks_have_the_bits_of_two_with_whole_weights(corpus: Path, tmp_path: Path, dtype: str) -> None:
    """A sum of two gradients is the same in any order, and none is clipped. In 16 bits the shards are the masters."""
    tables = {"train__dtype": dtype, "train__clip": 0.0, "parallel__ranks": 2}
    whole = _ranks(_train, small_recipe(**tables), corpus, tmp_path / "whole", 0, 5)
    parts = _ranks(_train, _sharded(**tables), corpus, tmp_path / "parts", 0, 5)
    assert [[r["loss"] for r in rank] for rank in whole] == [[r["loss"] for r in rank] for rank in parts]
    like = _trainer(0, small_recipe(train__dtype=dtype), corpus)
    want, found = (_saved(tmp_path / name, 5, like) for name in ("whole", "parts"))
    assert all(torch.equal(want[name], tensor) for name, tensor in found.items())
    assert any(name.startswith("optim.master.layers.1.moe.shared.1") for name in found) == (dtype == "bfloat16")
    model = load_model(Recipe.model_validate(_sharded(train__dtype=dtype)), tmp_path / "parts", 5)  # as a service does
    assert all(torch.equal(want[name], tensor) for name, tensor in weights_of(model).items())


@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_checkpoints_open_on_other_ranks_and_with_whole_weights(corpus: Path, tmp_path: Path, dtype: str) -> None:
    """Step by step from ranks to ranks, in shards or not; the same ranks go on with the same bits."""
    tables = {"train__dtype": dtype}
    two, apart = _sharded(parallel__ranks=2, **tables), _sharded(parallel__placement="2A:2F", **tables)
    alone = small_recipe(**tables)
    straight = _ranks(_train, two, corpus, tmp_path / "straight", 0, 4)
    first = _ranks(_train, two, corpus, tmp_path / "run", 0, 2)
    again = _ranks(_train, two, corpus, tmp_path / "run", 2, 4)
    assert [a[:-1] + b for a, b in zip(first, again, strict=True)] == straight
    like = _trainer(0, alone, corpus)
    resumed = _saved(tmp_path / "run", 4, like)
    assert all(torch.equal(resumed[name], x) for name, x in _saved(tmp_path / "straight", 4, like).items())
    rel = 1e-9 if dtype == "float64" else 0.02
    for step, tables in enumerate((alone, apart, alone), 4):
        want = _train(0, 1, alone, corpus, tmp_path / "straight", step, step + 1)
        for result in _ranks(_train, tables, corpus, tmp_path / "run", step, step + 1):
            assert result[0]["loss"] == pytest.approx(want[0]["loss"], rel=rel)


def _masters(rank: int, world: int, tables: dict[str, Any], corpus: Path, checkpoint: Path) -> list[str]:
    """Of a rank that begins with a checkpoint and goes on: masters that were not the weights of the same name."""
    trainer = _trainer(rank, tables, corpus)
    trainer.begin_with(checkpoint)
    began = {name: local(tensor).float().clone() for name, tensor in trainer.tensors().items()}
    masters = [name for name in began if name.startswith("optim.master.")]
    assert masters and trainer.train_step()["loss"] < 10
    return [name for name in masters if not torch.equal(began[name], began[name.replace("optim.master", "model")])]


def test_weights_alone_become_masters_whole_or_in_shards(corpus: Path, tmp_path: Path) -> None:
    """A checkpoint that was imported has nothing else."""
    tables = small_recipe(train__dtype="bfloat16")
    writer = Checkpointer(tmp_path, 1, None, 0, 1)
    state = {"step": 0, "dtype": "bfloat16", "weights_alone": True}
    writer.save(0, weights_of(_trainer(0, {**tables, "train": {**tables["train"], "seed": 1}}, corpus).model), state)
    writer.wait()
    assert _masters(0, 1, tables, corpus, tmp_path / "step-0") == []
    two = _sharded(train__dtype="bfloat16", parallel__ranks=2)
    assert _ranks(_masters, two, corpus, tmp_path / "step-0") == [[], []]


def _alive(kind: type[Tensor]) -> int:
    """Bytes of all tensors of a kind in this process, in float64 as weights are; those that share memory count once."""
    found = {}
    for tensor in gc.get_objects():
        # what type() says first, since there are half a million objects, and some warn when they are asked
        if issubclass(type(tensor), Tensor) and isinstance(tensor, kind) and tensor.dtype == torch.float64:
            storage = local(tensor).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _bytes(rank: int, world: int, tables: dict[str, Any], corpus: Path) -> dict[str, int]:
    """Of weights and what else outlives a step; the same with gradients; and the most of weights within a pass."""
    trainer = _trainer(rank, tables, corpus)
    trainer.train_step()
    held = {"step": 0, "update": 0, "pass": 0}
    update = trainer.optimizer.step

    def before_update(rate: float) -> None:
        held["update"] = _alive(Tensor)
        update(rate)

    def within(*_: Any) -> None:
        held["pass"] = max(held["pass"], _alive(nn.Parameter))

    trainer.optimizer.step = before_update  # type: ignore[method-assign]
    for block in trainer.model.layers:
        attention = block.get_submodule("attention")
        attention.register_forward_hook(within)
        attention.register_full_backward_hook(within)
    gc.collect()
    trainer.train_step()
    held["step"] = _alive(Tensor)
    return held


def test_each_rank_holds_a_share_of_the_bytes(corpus: Path) -> None:
    """Weights, gradients and moments of a dense model of 8 layers, and whole weights of at most two of its blocks."""
    sizes: dict[str, Any] = {"model__layers": 8, "model__dense_layers": 8, "model__hidden": 64, "moe__experts": 0}
    sizes |= {"model__dense_hidden": 256, "balance__device_groups": 1}
    (one,) = run_ranks(1, _bytes, small_recipe(**sizes), corpus)
    model = _trainer(0, small_recipe(**sizes), corpus).model
    weights = sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.layers[0].parameters())
    outside = weights - 8 * block
    assert one["pass"] == weights
    assert (one["step"], one["update"]) == pytest.approx((3 * weights, 4 * weights), rel=1e-4)
    for held in run_ranks(4, _bytes, _sharded(parallel__ranks=4, **sizes), corpus):
        slack = 0.01 * weights  # rows that make shards equal, and what is no weight
        assert held["step"] < 3 * weights / 4 + slack
        assert held["update"] < 4 * weights / 4 + slack
        assert held["pass"] < weights / 4 + outside + 2 * block + slack


@given(shape=st.lists(st.integers(1, 12), min_size=1, max_size=3), ranks=st.integers(2, 8), stacked=st.booleans())
def test_a_tensor_is_cut_evenly_where_it_can_be(shape: list[int], ranks: int, stacked: bool) -> None:
    """Of experts each along one of its own dimensions: the model's hidden size divides over the ranks."""
    shape = [*shape, 2 * ranks] if stacked else shape
    dim = shard_dim(shape, ranks, stacked)
    assert dim >= stacked
    assert shape[dim] % ranks == 0 or (dim == 0 and all(size % ranks for size in shape))


def _spoilt(rank: int, world: int, tables: dict[str, Any], corpus: Path, folder: Path, where: str) -> str:
    """Why training stops once a weight is no number: in the pass that follows, or when it is saved."""
    trainer = _trainer(rank, tables, corpus, folder)
    if where == "saved":
        trainer.train_step()
        trainer.evaluate()
    part = local(trainer.parameters["layers.1.attention.wo.weight"]).detach()
    if rank == 0:
        part.flatten()[0] = torch.nan
    try:
        trainer.save() if where == "saved" else trainer.train_step()
    except NotFinite as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("where", "said"), [("pass", "the output of layers.1 is"), ("saved", "a weight of layers.1 is")]
)
def test_what_is_not_finite_is_named(corpus: Path, tmp_path: Path, where: str, said: str) -> None:
    first, second = _ranks(_spoilt, _sharded(parallel__ranks=2), corpus, tmp_path, where)
    assert first == second
    assert f"{said} not finite" in first


def _move(rank: int, world: int, tables: dict[str, Any], corpus: Path) -> list[float]:
    """Losses of steps between which experts change their ranks, if there are several."""
    trainer = _trainer(rank, tables, corpus)
    losses = []
    for step in range(3):
        if step and world > 1:
            places = [(e + step) % 2 for e in range(8)]
            trainer.place_experts(tuple(tuple((place,) for place in places) for _ in trainer.plan))
        losses.append(trainer.train_step()["loss"])
    return losses


def test_experts_move_beside_shards(corpus: Path) -> None:
    one = _move(0, 1, small_recipe(), corpus)
    for losses in _ranks(_move, _sharded(parallel__ranks=2), corpus):
        assert losses == pytest.approx(one, rel=1e-9)
