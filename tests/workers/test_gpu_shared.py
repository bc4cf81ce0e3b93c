"""Two GPUs: a trainer whose ranks share each sequence, over NCCL, trains as one GPU does, with experts on each GPU or
spread over both, between which they move as it goes on, where a plan says so or the load that was measured, with heads
of keys in turns, with dense weights in shards and layers that are computed again, and with experts on a third GPU.

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
from ranks import asked_for, run_ranks
from small import small_corpus, small_recipe

from shoal.cluster.expert_placement import better_plan, place
from shoal.workers.config import Recipe
from shoal.workers.expert_plan import Plan, place_loads
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
    "a head of keys at a time": {"parallel": {"ranks": 2, "context_heads": 1, "context_gradients": "float32"}},
}
APART: dict[str, dict[str, dict[str, Any]]] = {"experts on a third": {"parallel": {"placement": "2A:1F"}}}
WAYS = {"nsa": {"sequence_attention"}, "full": {"ring_attention", "gather_attention"}}
"""How shared sequences are attended to, in the steps of a run."""
BOUNDS = {"float32": (1e-4, 1e-3), "bfloat16": (0.01, 0.05)}
"""Relative errors of losses and of gradient norms: rounding may swap two equally good experts or blocks."""

SHRINK = 4
"""How many times smaller a model and its sequences are on a CPU."""

Runs = dict[tuple[str, str, str], dict[str, Any]]
Between = Callable[[Trainer, int], None]
"""What happens to a trainer before each step, of that number from 0."""


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
    tables: dict[str, Any], mesh: Mesh, corpus: Path, device: torch.device, between: Between | None = None
) -> dict[str, Any]:
    """Losses, gradient norms and loads of some steps, the loss of a validation, and how often which way was taken."""
    taken: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in sorted(WAYS["nsa"] | WAYS["full"]):
            patch.setattr(contexts, name, _counted(getattr(contexts, name), taken))
        trainer = Trainer(Recipe.model_validate(tables), corpus, None, mesh, device)
        steps = []
        for step in range(STEPS):
            if between is not None:
                between(trainer, step)
            steps.append(trainer.train_step())
        losses = [step["loss"] for step in steps] + [trainer.evaluate()["loss"]]
    loads = [step["load"] for step in steps]
    return {"losses": losses, "norms": [step["grad_norm"] for step in steps], "loads": loads, "taken": taken}


def _given(trainer: Trainer, step: int) -> None:
    """Experts change their rank between steps, half of them first, then all."""
    if step:
        homes = tuple(((expert // 2 + step) % 2,) for expert in range(trainer.recipe.moe.experts))
        trainer.place_experts((homes,) * len(trainer.plan))
        assert trainer.plan == (homes,) * len(trainer.plan)


def on_rank(
    rank: int,
    world: int,
    corpus: Path,
    device: str,
    layouts: dict[str, dict[str, dict[str, Any]]],
    wanted: list[tuple[str, str, str]],
) -> Runs:
    """Of those kinds of attention, dtypes and layouts one rank's run and those of all."""
    # with its number: processes here see all GPUs, and a thread's current one is the first
    at = torch.device(device, rank) if device == "cuda" else torch.device(device)
    meshes: dict[Placement, Mesh] = {}
    found: Runs = {}
    alone = dict.fromkeys((kind, dtype, "alone") for kind, dtype, _ in wanted)
    for kind, dtype, name in [*alone, *wanted]:
        tables = tables_of(kind, dtype, device)
        if name in layouts:
            tables["parallel"]["context"] = 2
        for table, keys in layouts.get(name, {}).items():
            tables[table] |= keys
        placement = Placement.of(Recipe.model_validate(tables))
        if placement not in meshes:
            meshes[placement] = make_mesh(placement, rank if name in layouts else 0, at)
        between = _given if name == "experts move between both" else None
        found[kind, dtype, name] = _trained(tables, meshes[placement], corpus, at, between)
    return found


DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


def _run(
    request: pytest.FixtureRequest, world: int, folder: Path, layouts: dict[str, dict[str, dict[str, Any]]]
) -> list[Runs]:
    """What all ranks found, of all runs that were asked for in one go, since starting processes and NCCL takes long."""
    device = str(request.param)
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA GPUs")
    corpus = small_corpus(folder, longest=2000)
    asked = asked_for(request, **{str(request.fixturename): device})
    wanted = list(dict.fromkeys((each["kind"], each["dtype"], each["layout"]) for each in asked))
    results: list[Runs] = run_ranks(world, on_rank, corpus, device, layouts, wanted, device=device)
    return results


@pytest.fixture(scope="module", params=DEVICES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    """Of two ranks."""
    return _run(request, 2, tmp_path_factory.mktemp("small"), LAYOUTS)


@pytest.fixture(scope="module", params=DEVICES)
def found_apart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    """Of three, the last of which hosts experts alone."""
    return _run(request, 3, tmp_path_factory.mktemp("apart"), APART)


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
    check_run(runs[kind, dtype, layout], runs[kind, dtype, "alone"], dtype, ways)


def check_run(shared: dict[str, Any], alone: dict[str, Any], dtype: str, ways: set[str]) -> None:
    of_loss, of_norm = BOUNDS[dtype]
    assert not alone["taken"] and set(shared["taken"]) == ways
    assert shared["losses"] == pytest.approx(alone["losses"], rel=of_loss)
    assert shared["norms"] == pytest.approx(alone["norms"], rel=of_norm)


def uneven(trainer: Trainer) -> None:
    """All tokens choose three of the first four experts, which lie on the first of two ranks."""
    for layer in trainer.model.moe_layers:
        assert layer.bias is not None
        layer.bias[:4] = 1.0  # more than any score


def held(trainer: Trainer) -> dict[str, float]:
    """Of all that this rank has of routed experts, weights and moments, a sum that bits decide, by name."""
    tensors = {name: tensor.cpu().double() for name, tensor in trainer.tensors().items() if ".moe.experts." in name}
    return {name: float((x * torch.linspace(1, 2, x.numel()).view_as(x)).sum()) for name, x in tensors.items()}


def by_load(rank: int, world: int, corpus: Path, device: str) -> dict[str, dict[str, Any]]:
    """What :func:`by_load_in` finds, of each dtype."""
    at = torch.device(device, rank) if device == "cuda" else torch.device(device)
    return {dtype: by_load_in(dtype, rank, world, corpus, at) for dtype in BOUNDS}


def by_load_in(dtype: str, rank: int, world: int, corpus: Path, at: torch.device) -> dict[str, Any]:
    """A run of all ranks whose experts move between steps to where the load so far is even, and one rank's alone. held:
    what this rank had before and after each move. busiest: of each step and layer, the load of the busier rank."""
    moves: list[list[dict[str, float]]] = []
    plans: list[Plan] = []

    def staying(trainer: Trainer, step: int) -> None:
        if not step:
            uneven(trainer)

    def moving(trainer: Trainer, step: int) -> None:
        staying(trainer, step)
        if step:  # as a run's supervisor does it
            nodes = [0] * world
            plan = better_plan(trainer.measured.tolist(), trainer.plan, nodes, lambda row: place(row, nodes))
            before = held(trainer)
            trainer.place_experts(plan)
            moves.append([before, held(trainer)])
        plans.append(trainer.plan)

    tables = tables_of("nsa", dtype, at.type)
    tables["balance"]["bias_rate"] = 1e-3
    both = tables | {"parallel": tables["parallel"] | {"ranks": world, "expert": world, "context": world}}
    runs = []
    for each, between in ((tables, staying), (both, moving)):
        placement = Placement.of(Recipe.model_validate(each))
        mesh = make_mesh(placement, rank if placement.ranks > 1 else 0, at)
        runs.append(_trained(each, mesh, corpus, at, between))
    alone, shared = runs
    busiest = [
        [max(place_loads(row, homes, world)) for row, homes in zip(load, plan, strict=True)]
        for load, plan in zip(shared["loads"], plans, strict=True)
    ]
    return {"alone": alone, "shared": shared, "moves": moves, "busiest": busiest}


@pytest.fixture(scope="module", params=DEVICES)
def found_by_load(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two ranks."""
    device = str(request.param)
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA GPUs")
    corpus = small_corpus(tmp_path_factory.mktemp("by-load"), longest=2000)
    return run_ranks(2, by_load, corpus, device, device=device)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_experts_move_by_the_load_that_was_measured(found_by_load: list[dict[str, Any]], dtype: str) -> None:
    found = [results[dtype] for results in found_by_load]
    for result in found:
        check_run(result["shared"], result["alone"], dtype, WAYS["nsa"])
        first, *later = result["busiest"]
        assert first == pytest.approx([2.0, 2.0]), "one rank has all rows"
        # two of the four experts lie on each rank, and of a token's three there is one at least
        assert max(map(max, later)) <= 4 / 3 + 1e-9
    moved = []
    for moves in zip(*(result["moves"] for result in found), strict=True):
        (before, after), (theirs_before, theirs_after) = moves
        assert not after.keys() & theirs_after.keys(), "of each expert there is one"
        assert after | theirs_after == before | theirs_before, "with the bits that it had"
        moved.append(bool(after.keys() - before.keys() and theirs_after.keys() - theirs_before.keys()))
    assert moved[0], "some came to each rank"
