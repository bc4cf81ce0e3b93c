"""What balances experts is part of a run's state: saved, restored to the bit, and opened by any ranks. Experts that
move to other ranks while a run goes on change nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small import small_corpus, small_recipe

from shoal.cluster.expert_placement import place
from shoal.workers.checkpoint_files import checkpoint_path, read_state
from shoal.workers.config import Recipe
from shoal.workers.expert_plan import Plan
from shoal.workers.flight import Flight, PackedFlight
from shoal.workers.mesh import make_mesh
from shoal.workers.model.feedforward import MoE, named_biases
from shoal.workers.model.load import MoELoad
from shoal.workers.placement import Placement
from shoal.workers.records import load_figures
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


def test_a_run_may_begin_with_weights_of_one_with_biases_or_without(corpus: Path, tmp_path: Path) -> None:
    for name, rate in (("with", 0.02), ("without", 0.0)):
        _train(0, 1, small_recipe(balance__bias_rate=rate), str(corpus), str(tmp_path / name), 0, 3)
        recipe = Recipe.model_validate(small_recipe(balance__bias_rate=0.02))
        trainer = Trainer(recipe, corpus, None, make_mesh(Placement.of(recipe)), torch.device("cpu"))
        trainer.begin_with(tmp_path / name / "step-3")
        assert all(bool(bias.any()) == (rate > 0) for _, bias in named_biases(trainer.model))


PLACEMENTS: dict[str, dict[str, Any]] = {
    "2 colocated": {"parallel__ranks": 2},
    "4 colocated, 2 sets of experts": {"parallel__ranks": 4, "parallel__expert": 2},
    "2A:2F": {"parallel__placement": "2A:2F"},
}


def _random_plan(places: int, seed: int) -> Plan:
    """Of two layers of eight experts: any, as many to each place."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(8, generator=generator).tolist() for _ in range(2)]
    return tuple(tuple((n * places // 8,) for n in order) for order in orders)


def _everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What all ranks hold, by name; copies of one tensor must be the same."""
    found: list[dict[str, torch.Tensor]] = [{}] * trainer.mesh.world.size
    dist.all_gather_object(found, {name: tensor.clone() for name, tensor in trainer.tensors().items()})
    whole: dict[str, torch.Tensor] = {}
    for tensors in found:
        for name, tensor in tensors.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), name
    return whole


def _move(rank: int, world: int, tables: dict[str, Any], corpus: str, folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(tables)
    trainer = Trainer(recipe, Path(corpus), Path(folder), make_mesh(Placement.of(recipe), rank), torch.device("cpu"))
    records = []
    for step in range(6):
        if step in (2, 4):
            before, plan = _everything(trainer), _random_plan(recipe.parallel.expert_ranks, step)
            trainer.place_experts(plan)
            after = _everything(trainer)
            assert trainer.plan == plan
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
        if step in (2, 5):
            trainer.save()
        records.append(trainer.train_step())
    trainer.settle()
    figures = load_figures(records[-1]["load"], trainer.by_place(records[-1]["load"]))
    again = Trainer(recipe, Path(corpus), Path(folder), trainer.mesh, torch.device("cpu"))
    again.restore(5)
    assert again.plan == trainer.plan
    last = again.train_step()
    for key in KEYS:
        assert last[key] == records[5][key], "a resumed run has the same bits"
    again.settle()
    again.restore(2)
    assert again.plan == _random_plan(recipe.parallel.expert_ranks, 2) != trainer.plan
    last = again.train_step()
    for key in KEYS:
        assert last[key] == records[2][key], "experts are back where they were before the last move"
    return {"records": records, "figures": figures, "plan": trainer.plan}


@pytest.mark.parametrize(
    "placement",
    [pytest.param(name, marks=pytest.mark.slow if name == "2 colocated" else ()) for name in PLACEMENTS],
)
def test_experts_that_move_change_nothing_else(corpus: Path, tmp_path: Path, placement: str) -> None:
    tables = small_recipe(**PLACEMENTS[placement])
    ranks = Recipe.model_validate(tables).parallel.ranks
    moved = run_ranks(ranks, _move, tables, str(corpus), str(tmp_path / "moved"))
    stayed = run_ranks(ranks, _train, tables, str(corpus), str(tmp_path / "stayed"), 0, 6)
    for result, (_, records) in zip(moved, stayed, strict=True):
        for got, want in zip(result["records"], records, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-12)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-10)
            assert got["load"] == want["load"]
        load, plan = torch.tensor(result["records"][-1]["load"]), result["plan"]
        for layer, row in enumerate(result["figures"]["layer_devices"]):
            mine = [sum(load[layer, e] for e in range(8) if plan[layer][e] == (place,)) / 4 for place in range(2)]
            assert row == pytest.approx([float(x) for x in mine])
    folder = tmp_path / "moved"
    assert read_state(checkpoint_path(folder, 5))["expert_plan"] == [[list(x) for x in own] for own in plan]
    # on other ranks, from the checkpoint before the last move as well
    alone = small_recipe()
    for step in (2, 5):
        _, rest = _train(0, 1, alone, str(corpus), str(folder), step, step + 1)
        assert rest[0]["loss"] == pytest.approx(stayed[0][1][step]["loss"], rel=1e-9)


def _reached(rank: int, world: int, tables: dict[str, Any]) -> list[list[int]]:
    """Of each of a rank's tokens the ranks that it goes to: as experts lie at first, and once groups have moved."""
    recipe = Recipe.model_validate(tables)
    layer = MoE(recipe, make_mesh(Placement.of(recipe), rank), torch.device("cpu"), torch.float64).double()
    generator, found, flights = torch.Generator().manual_seed(rank), [], []
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    dispatcher, groups = layer.dispatcher, recipe.balance.device_groups
    start = dispatcher.start

    def watched(*arguments: Any) -> Flight:
        flights.append(start(*arguments))
        return flights[-1]

    dispatcher.start = watched  # type: ignore[method-assign, assignment]
    load = torch.rand(8, generator=torch.Generator().manual_seed(2)).tolist()
    moved = place(load, [0] * world, 8 // groups) if groups % world == 0 else layer.homes
    assert (moved != layer.homes) == (groups % world == 0)
    for homes in (layer.homes, moved):
        layer.assign(homes)
        x = torch.randn(300, recipe.model.hidden, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            layer(x, torch.zeros(300, dtype=torch.int64), MoELoad(300, balance=False))
        flight = flights[-1]
        assert isinstance(flight, PackedFlight)
        away = flight.home >= 0
        assert int(away.sum()) == sum(flight.out), "these are the rows that left"
        here = (dispatcher.ways.hosts[flight.slots.long()] == rank).any(1)
        found.append((away.sum(1) + here).tolist())
    return found


@pytest.mark.parametrize(
    ("ranks", "groups", "limit", "most"),
    [(4, 4, 2, 2), (4, 4, 0, 3), (2, 4, 1, 1), (4, 8, 3, 3), (4, 2, 1, 2)],
    ids=["a group a rank", "no limit", "two groups a rank", "an expert a group", "a group on two ranks"],
)
def test_a_token_goes_to_as_many_ranks_as_its_groups_lie_on(ranks: int, groups: int, limit: int, most: int) -> None:
    """``route.max_devices`` bounds groups: where ranks host whole groups, rows of a token go to M ranks at most, also
    when groups have moved."""
    top_k = 2 if limit == 1 and groups == 4 else 3  # no more than the experts of so many groups
    tables = small_recipe(
        parallel__ranks=ranks, balance__device_groups=groups, route__max_devices=limit, moe__top_k=top_k
    )
    for found in run_ranks(ranks, _reached, tables):
        assert [max(each) for each in found] == [most, most]
