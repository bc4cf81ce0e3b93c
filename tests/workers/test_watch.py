"""What a trainer says of its own steps: where their time went, how branches are mixed, how full the devices are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import small_corpus, small_recipe

from shoal.workers.clock import Clock
from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.model.attention import NativeSparseAttention, Projected
from shoal.workers.placement import Placement
from shoal.workers.records import PARTS
from shoal.workers.trainer import Trainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def _trainer(tables: dict[str, Any], corpus: Path | str, rank: int = 0) -> Trainer:
    recipe = Recipe.model_validate(tables)
    return Trainer(recipe, Path(corpus), None, make_mesh(Placement.of(recipe), rank), torch.device("cpu"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gates_are_means_of_those_that_attention_used(
    corpus: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(small_recipe(train__accumulate=accumulate, balance__over="micro_batch"), corpus)
    used: dict[Any, list[torch.Tensor]] = {}
    project = NativeSparseAttention.project

    def seen(layer: NativeSparseAttention, *arguments: Any) -> Projected:
        found = project(layer, *arguments)
        used.setdefault(layer, []).append(found.gates.detach().double())
        return found

    monkeypatch.setattr(NativeSparseAttention, "project", seen)
    record = trainer.train_step()
    layers = [layer.attention for layer in trainer.model.layers]
    assert [len(used[layer]) for layer in layers] == [accumulate] * 3
    expected = [torch.cat(used[layer]).mean((0, 1)) for layer in layers]
    assert torch.allclose(torch.tensor(record["gates"], dtype=torch.float64), torch.stack(expected), rtol=1e-6)


def test_parts_of_a_step_make_up_its_time_and_are_told_where_it_is_logged(corpus: Path) -> None:
    trainer = _trainer(small_recipe(train__log_every=2, train__steps=4), corpus)
    kinds = [{record["kind"]: record for record in trainer.advance()} for _ in range(4)]
    assert [("train" in found) for found in kinds] == [False, True, False, True]
    for found in (kinds[1]["train"], kinds[3]["train"]):
        parts = {part: found[f"{part}_seconds"] for part in PARTS}
        assert all(parts[part] > 0 for part in ("data", "forward", "backward", "update"))
        assert sum(parts.values()) == pytest.approx(found["step_seconds"])
        assert found["dispatch_seconds"] == 0, "one rank waits for nobody"


def _step(rank: int, world: int, tables: dict[str, Any], corpus: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return _trainer(tables, corpus, rank).advance()


@pytest.mark.parametrize(("placement", "devices"), [("colocated", 2), ("1A:1F", 1)])
def test_devices_have_the_tokens_of_their_experts_and_wait_for_one_another(
    corpus: Path, placement: str, devices: int
) -> None:
    tables = small_recipe(parallel__ranks=2, parallel__placement=placement)
    for records in run_ranks(2, _step, tables, str(corpus)):
        found = {record["kind"]: record for record in records}
        load = torch.tensor(found["load"]["load"], dtype=torch.float64)
        per_device = load.view(len(load), devices, -1).mean((0, 2))
        assert torch.allclose(torch.tensor(found["load"]["devices"], dtype=torch.float64), per_device)
        per_layer = load.view(len(load), devices, -1).mean(2)
        assert torch.allclose(torch.tensor(found["load"]["layer_devices"], dtype=torch.float64), per_layer)
        assert found["load"]["max_over_mean"] == load.amax(1).tolist()
        shares = load / load.sum(1, keepdim=True)
        entropy = torch.special.entr(shares).sum(1) / torch.tensor(load.shape[1]).log()
        assert torch.allclose(torch.tensor(found["load"]["entropy"], dtype=torch.float64), entropy)
        train = found["train"]
        assert 0 < train["dispatch_seconds"] < train["forward_seconds"] + train["backward_seconds"]


@pytest.mark.gpu
def test_time_on_a_gpu_is_that_of_its_stream() -> None:
    clock = Clock(torch.device("cuda"))
    clock.on = True
    for cycles in (100_000_000, 200_000_000):
        with clock.part("sleep"):
            torch.cuda._sleep(cycles)  # returns at once
    torch.cuda.synchronize()
    assert 0.05 < clock.read()["sleep"] < 2.0
    assert clock.read() == {}
