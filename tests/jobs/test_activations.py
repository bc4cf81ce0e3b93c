"""What layers keep by formula, beside the tensors that the model's own code keeps, and peaks measured on GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton_on_cpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import small_recipe

triton_on_cpu.prepare()

from counted_memory import count, count_on_cpu  # noqa: E402

from shoal.jobs import activations  # noqa: E402
from shoal.jobs.activations import UNEVEN, layers, of_a_pass, sizes_of  # noqa: E402
from shoal.jobs.bench.context import waves  # noqa: E402
from shoal.jobs.bench.scale_cases import Training  # noqa: E402
from shoal.jobs.bench.scale_series import all_series  # noqa: E402
from shoal.jobs.estimate import count_parameters, estimate  # noqa: E402
from shoal.jobs.recipe import load_recipe  # noqa: E402
from shoal.workers import slots  # noqa: E402
from shoal.workers.config import Recipe  # noqa: E402


@st.composite
def recipes(draw: st.DrawFn, /, **changes: Any) -> Recipe:
    """Of random sizes, in bfloat16 for a GPU."""
    group, kv = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    sizes: dict[str, Any] = {
        "model__hidden": 16 * draw(st.integers(1, 8)),
        "model__heads": group * kv,
        "model__kv_heads": kv,
        "model__head_dim": 16 * draw(st.integers(1, 4)),
        "model__dense_hidden": 16 * draw(st.integers(1, 12)),
        "moe__experts": 4 * draw(st.integers(2, 8)),
        "moe__top_k": draw(st.integers(1, 8)),
        "moe__shared_experts": draw(st.integers(0, 2)),
        "moe__expert_hidden": 16 * draw(st.integers(1, 8)),
        "train__sequence": 128 * draw(st.integers(2, 4)),
        "train__batch": 4,
        "train__dtype": "bfloat16",
        "balance__device_groups": 1,
        "parallel__device": "cuda",
    }
    sizes["model__context"] = sizes["train__sequence"]
    sizes["model__value_dim"] = sizes["model__head_dim"]
    return Recipe.model_validate(small_recipe(**(sizes | changes)))


def of_layers(recipe: Recipe, layers: int, dense: int) -> Recipe:
    model = recipe.model.model_copy(update={"layers": layers, "dense_layers": dense})
    return recipe.model_copy(update={"model": model})


KINDS: dict[str, dict[str, Any]] = {
    "full attention": {"attention__kind": "full"},
    "NSA": {},
    "all losses of balance": {"balance__z_loss": 0.1, "balance__sequence": 0.1},
    "a hash for a router": {"moe__router": "hash", "moe__top_k": 1, "balance__expert": 0.0, "balance__device": 0.0},
    "scores one by one": {"moe__router": "sigmoid", "balance__sequence": 0.1, "balance__z_loss": 0.0},
    "experts over ranks": {"parallel__ranks": 4},
    "shared experts dispatched": {"parallel__ranks": 2, "moe__shared": "dispatched", "moe__shared_experts": 3},
    "NSA, a sequence over ranks": {
        "parallel__ranks": 2,
        "parallel__context": 2,
        "parallel__expert": 1,
        "train__batch": 1,
    },
}


@pytest.fixture
def even(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted has even load over ranks."""
    monkeypatch.setattr(activations, "UNEVEN", 1.0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=settings().max_examples // 10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_layer_keeps_what_the_formula_says(kind: str, data: st.DataObject, even: None) -> None:
    """A dense layer and one with experts: one more of each. To a fiftieth, and the counts of experts' tokens: for the
    formula, documents have no ends, at which blocks are missing, and shares of tokens need not be whole numbers."""
    recipe = data.draw(recipes(**KINDS[kind]))
    formula = [layer.kept for layer in layers(of_layers(recipe, 2, 1), sizes_of(recipe, True, True))]
    less, dense, experts = (count(of_layers(recipe, *shape)).kept for shape in ((2, 1), (3, 2), (3, 1)))
    for counted, kept in ((dense - less, formula[0]), (experts - less, formula[1])):
        assert abs(counted - kept) <= counted / 50 + 32 * recipe.moe.experts


ALONE = ("parallel.ranks=1", "parallel.context=1")
APART = ("moe.experts=64", "train.batch=16", "train.accumulate=1")
EXCHANGED = (*APART, "parallel.dispatch=exchanged")
NARROW = ("moe.expert_hidden=64", "model.dense_hidden=512")
MANY = ("parallel.ranks=8", "parallel.context=8", "parallel.expert=1", "train.batch=1", "train.accumulate=1")
SHARED = (*NARROW, *MANY, "model.layers=2", "model.vocab=256", "model.kv_heads=8", "train.recompute=2")
FEW = (*NARROW, "model.layers=2", "model.vocab=256", "train.batch=1", "train.accumulate=1", "train.sequence=3072")
STEPS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "deepseekmoe-2b": ("deepseekmoe-2b", ("parallel.ranks=1", "train.batch=40", "train.accumulate=1"), 0),
    "its experts over 4 ranks": ("deepseekmoe-2b", ("parallel.expert=0", "parallel.ranks=4", *EXCHANGED), 0),
    "attention apart": ("deepseekmoe-2b", ("parallel.placement=2A:2F", "parallel.ranks=4", *APART), 0),
    "experts apart": ("deepseekmoe-2b", ("parallel.placement=2A:2F", "parallel.ranks=4", *APART), 2),
    "dense-0.2b": ("dense-0.2b", (), 0),
    "gshard-2b": ("gshard-2b", (), 0),
    "hash-2b": ("hash-2b", (), 0),
    "deepseekmoe-16b": ("deepseekmoe-16b", (), 0),
    "nsa-27b": ("nsa-27b", (), 0),
    "nsa-8k-small": ("nsa-8k-small", ALONE, 0),
    "nsa-64k-small on two": ("nsa-64k-small", (), 0),
    "layers computed again": ("nsa-64k-small", (*ALONE, "train.recompute=8"), 0),
    "hardly any feed-forward": ("nsa-8k-small", (*ALONE, "train.recompute=12", *NARROW), 0),
    "hardly more than parts of gradients": ("nsa-8k-small", (*ALONE, *FEW, "model.context=3072"), 0),
    "the same on two": ("nsa-64k-small", (*FEW, "train.sequence=6144", "model.context=6144"), 0),
    "far keys of eight ranks": ("nsa-64k-small", SHARED, 0),
    "their gradients in float32": ("nsa-64k-small", (*SHARED, "parallel.context_gradients=float32"), 0),
    "two heads of keys at a time": ("nsa-64k-small", (*SHARED, "parallel.context_heads=2"), 0),
    "all layers computed again": ("nsa-8k-small", ("parallel.ranks=1", "train.recompute=12"), 0),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_pass_takes_what_the_formula_says(name: str, even: None) -> None:
    """What is kept to a two-hundredth; the most at a time is not too little, and at most a fifteenth too much."""
    base, sets, rank = STEPS[name]
    recipe = load_recipe(base, [*sets, "parallel.device=cuda", "train.dtype=bfloat16"])
    p, parameters = recipe.parallel, count_parameters(recipe)
    attends, hosts = not p.split or rank < p.split[0], not p.split or rank >= p.split[0]
    table = 2 * recipe.model.vocab * recipe.model.hidden if attends else 0
    short = 2 * (parameters.routed_experts // p.expert_ranks) if hosts else 0
    short += 2 * (parameters.total - parameters.routed_experts) if attends else 0
    kept, most = of_a_pass(recipe, sizes_of(recipe, attends, hosts), (short - table) // recipe.model.layers, table)
    counted = count(recipe, rank)
    assert abs(kept - counted.kept) <= counted.kept / 200
    assert -0.005 <= most / counted.most - 1 <= 1 / 15


@pytest.mark.parametrize("name", ["tiny", "tiny-full", "tiny-dense", "tiny-hash"])
def test_on_a_cpu_too(name: str) -> None:
    """Where PyTorch's operators compute, and their tensors are real."""
    recipe = load_recipe(name, ["parallel.ranks=1", "train.batch=2"])
    kept, counted = estimate(recipe).memory["colocated"].activations, count_on_cpu(recipe).kept
    assert -0.01 <= kept / counted - 1 <= 0.1


def measured() -> Iterator[tuple[str, Recipe, int, float, int]]:
    """Peaks of training on GPUs under benchmarks/results: of what, its recipe, bytes on the rank that had most, how
    many times its share of rows the busiest one had, where that is known, and the room for rows that nobody counts."""
    lines = [line for series in all_series(False, None) for line in series.lines()]
    planned = [(line.what, line.case(n)) for n in (1, 2, 4) for line in lines if line.tried(n)]
    trainings = {(what, case.ranks, case.tokens): case.sizes for what, case in planned}
    scaling = (*results("scale-unbalanced"), *results("scale"))
    rows = {(row["what"], row["ranks"], row["tokens"]): row for row in scaling if row["part"] == "train"}
    for key, row in rows.items():
        training = trainings[key]
        assert isinstance(training, Training)
        what = f"{key[0]}, {key[1]} ranks, {key[2]} tokens"
        yield what, training.load(), row["peak_bytes"], row.get("device_load", UNEVEN), room_of(row["date"])
    cases = [case for wave in waves(2, None, False) for case in wave]
    for row in results("context-2xh200"):
        about = row["what"].removeprefix("a step at ")
        (case,) = [c for c in cases if about.startswith(f"{c.what}: {c.kind},") and c.ranks == row["ranks"]]
        yield row["what"], load_recipe("nsa-64k-small", case.settings), row["peak_bytes"], UNEVEN, room_of(row["date"])


def room_of(date: str) -> int:
    """Before that day's runs rows were counted by the host that took more than a quarter of what they may take now."""
    return slots.ROOM if date > "2026-11-27T09" else 256 << 20


def results(name: str) -> list[dict[str, Any]]:
    file = Path(__file__).parents[2] / "benchmarks/results" / f"{name}.json"
    found = json.loads(file.read_text())
    return [{"date": found["date"]} | row for row in found["rows"] if row.get("peak_bytes")]


def test_the_estimate_is_within_15_percent_of_measured_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the load that was measured: recipes are estimated for an uneven one."""
    found = list(measured())
    assert len(found) > 15
    for what, recipe, peak, uneven, room in found:
        monkeypatch.setattr(activations, "UNEVEN", uneven)
        monkeypatch.setattr(slots, "ROOM", room)
        (memory,) = estimate(recipe).memory.values()
        assert abs(memory.total / peak - 1) < 0.15, f"{what}: {memory.total / 1e9:.1f} GB, measured {peak / 1e9:.1f}"
