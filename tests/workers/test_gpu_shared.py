"""Two GPUs: a trainer whose ranks share each sequence, over NCCL, trains as one GPU does, with experts on each GPU or
spread over both, between which they move as it goes on, with dense weights in shards and layers that are computed
again, and with experts on a third GPU.

Needs no Ray: ``pytest -m gpu tests/workers/test_gpu_shared.py`` on a machine with two GPUs, or three for the last. On
ranks of the CPU the same runs, over gloo.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import small_corpus, small_recipe

from shoal.workers.config import Recipe
from shoal.workers.mesh import Mesh, make_mesh
from shoal.workers.model import contexts
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer

STEPS = 4
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "all experts on each": {"parallel": {"ranks": 2, "expert": 1}},
    "experts over both": {"parallel": {"ranks": 2, "expert": 2}},
    "experts move between both": {"parallel": {"ranks": 2, "expert": 2}},
    "dense weights in shards, layers computed again": {
        "parallel": {"ranks": 2, "shard_dense": True},
        "train": {"recompute": 2},
    },
}
APART: dict[str, dict[str, dict[str, Any]]] = {"experts on a third": {"parallel": {"placement": "2A:1F"}}}
WAYS = {"nsa": {"sequence_attention"}, "full": {"ring_attention", "gather_attention"}}
"""How shared sequences are attended to, in the steps of a run."""
BOUNDS = {"float32": (1e-4, 1e-3), "bfloat16": (0.01, 0.05)}
"""Relative errors of losses and of gradient norms: rounding may swap two equally good experts or blocks."""

SHRINK = 4
"""How many times smaller a model and its sequences are on a CPU."""

Runs = dict[tuple[str, str, str], dict[str, Any]]


def tables_of(kind: str, dtype: str, device: str) -> dict[str, Any]:
    """A recipe for one rank, with batches of one row, some of which hold a single document."""
    by = 1 if device == "cuda" else SHRINK
    model = {"hidden": 128, "head_dim": 128, "value_dim": 128, "context": 512}
    train = {"sequence": 512 // by, "batch": 1, "warmup": 1, "steps": STEPS, "dtype": dtype}
    tables = small_recipe(parallel__device="auto")
    tables["model"] |= {key: size // by for key, size in model.items()}
    tables["train"] |= train
    blocks = {"cmp_block": 32, "cmp_stride": 16, "slc_block": 64, "window": 100}
    tables["attention"] = {"kind": kind, "slc_count": 4} | {key: size // by for key, size in blocks.items()}
    return tables


def _counted(way: Callable[..., Any], taken: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any, **more: Any) -> Any:
        taken[way.__name__] += 1
        return way(*args, **more)

    return counted


def _trained(
    tables: dict[str, Any], mesh: Mesh, corpus: Path, device: torch.device, moves: bool = False
) -> dict[str, Any]:
    """Losses and gradient norms of some steps, the loss of a validation, and how often which way was taken. moves:
    whether experts change their rank between steps, half of them first, then all."""
    taken: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in sorted(WAYS["nsa"] | WAYS["full"]):
            patch.setattr(contexts, name, _counted(getattr(contexts, name), taken))
        trainer = Trainer(Recipe.model_validate(tables), corpus, None, mesh, device)
        steps = []
        for step in range(STEPS):
            if moves and step:
                homes = tuple(((expert // 2 + step) % 2,) for expert in range(trainer.recipe.moe.experts))
                trainer.place_experts((homes,) * len(trainer.plan))
                assert trainer.plan == (homes,) * len(trainer.plan)
            steps.append(trainer.train_step())
        losses = [step["loss"] for step in steps] + [trainer.evaluate()["loss"]]
    return {"losses": losses, "norms": [step["grad_norm"] for step in steps], "taken": taken}


def on_rank(rank: int, world: int, corpus: Path, device: str, layouts: dict[str, dict[str, dict[str, Any]]]) -> Runs:
    """Of each kind of attention and dtype, one rank's run and those of all."""
    # with its number: processes here see all GPUs, and a thread's current one is the first
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    meshes: dict[Placement, Mesh] = {}
    found: Runs = {}
    for kind in WAYS:
        for dtype in BOUNDS:
            for name in ("alone", *layouts):
                tables = tables_of(kind, dtype, device)
                if name in layouts:
                    tables["parallel"]["context"] = 2
                for table, keys in layouts.get(name, {}).items():
                    tables[table] |= keys
                placement = Placement.of(Recipe.model_validate(tables))
                if placement not in meshes:
                    meshes[placement] = make_mesh(placement, rank if name in layouts else 0, place)
                moves = name == "experts move between both"
                found[kind, dtype, name] = _trained(tables, meshes[placement], corpus, place, moves)
    return found


DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


def _run(device: str, world: int, folder: Path, layouts: dict[str, dict[str, dict[str, Any]]]) -> list[Runs]:
    """What all ranks found, of all runs in one go, since starting processes and NCCL takes long."""
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA GPUs")
    corpus = small_corpus(folder, longest=2000)
    results: list[Runs] = run_ranks(world, on_rank, corpus, device, layouts, device=device)
    return results


@pytest.fixture(scope="module", params=DEVICES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    """Of two ranks."""
    return _run(str(request.param), 2, tmp_path_factory.mktemp("small"), LAYOUTS)


@pytest.fixture(scope="module", params=DEVICES)
def found_apart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    """Of three, the last of which hosts experts alone."""
    return _run(str(request.param), 3, tmp_path_factory.mktemp("apart"), APART)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", WAYS)
def test_ranks_that_share_sequences_train_as_one(found: list[Runs], kind: str, dtype: str, layout: str) -> None:
    for runs in found:
        check(runs, kind, dtype, layout, WAYS[kind])


@pytest.mark.parametrize("layout", APART)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", WAYS)
def test_so_they_do_with_experts_elsewhere(found_apart: list[Runs], kind: str, dtype: str, layout: str) -> None:
    for rank, runs in enumerate(found_apart):
        check(runs, kind, dtype, layout, set() if rank == 2 else WAYS[kind])


def check(runs: Runs, kind: str, dtype: str, layout: str, ways: set[str]) -> None:
    """A rank's run beside one rank's."""
    of_loss, of_norm = BOUNDS[dtype]
    alone, shared = runs[kind, dtype, "alone"], runs[kind, dtype, layout]
    assert not alone["taken"] and set(shared["taken"]) == ways
    assert shared["losses"] == pytest.approx(alone["losses"], rel=of_loss)
    assert shared["norms"] == pytest.approx(alone["norms"], rel=of_norm)
