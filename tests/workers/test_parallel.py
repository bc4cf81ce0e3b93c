"""Any number of ranks and any placement compute what one rank computes: losses, balance, gradients, curves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from shared_inbox import SharedInbox
from small import small_corpus, small_recipe

from shoal.workers import symmetric
from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer

OneRank = Callable[[int], dict[str, Any]]
PLACEMENTS: dict[str, dict[str, Any]] = {
    "2 colocated": {"parallel__ranks": 2},
    "4 colocated": {"parallel__ranks": 4},
    "4 colocated, 2 sets of experts": {"parallel__ranks": 4, "parallel__expert": 2},
    "2 colocated, each with all experts": {"parallel__ranks": 2, "parallel__expert": 1},
    "1A:1F": {"parallel__placement": "1A:1F"},
    "2A:2F": {"parallel__placement": "2A:2F"},
    "2A:1F": {"parallel__placement": "2A:1F"},
    "1A:2F": {"parallel__placement": "1A:2F"},
}
# Rows of 96 tokens, six of them: segments end within rows, and documents reach over two or three ranks.
SHARED: dict[str, Any] = {"model__context": 128, "train__sequence": 128, "train__batch": 6}
CONTEXTS: dict[str, dict[str, Any]] = {
    "2 ranks share all": {"parallel__ranks": 2, "parallel__context": 2},
    "4 ranks share all": {"parallel__ranks": 4, "parallel__context": 4},
    "2 ranks share all, chosen blocks, head by head": {
        "parallel__ranks": 2,
        "parallel__context": 2,
        "parallel__context_fetch": "chosen",
        "parallel__context_heads": 1,
        "parallel__context_gradients": "float32",
    },
    "2 groups of 2, experts over 4": {"parallel__ranks": 4, "parallel__context": 2},
    "2 groups of 2, 2 sets of experts": {"parallel__ranks": 4, "parallel__context": 2, "parallel__expert": 2},
    "2A:2F, 2 share all": {"parallel__placement": "2A:2F", "parallel__context": 2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def _train(rank: int, world: int, tables: dict[str, Any], corpus: str, steps: int) -> dict[str, Any]:
    """Trains, and keeps the records, the gradients of the first step, a validation, and what the rank hosts."""
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(tables)
    trainer = Trainer(recipe, Path(corpus), None, make_mesh(Placement.of(recipe), rank), torch.device("cpu"))
    gradients: dict[str, torch.Tensor] = {}
    update = trainer.optimizer.step

    def watched(rate: float) -> None:
        if not gradients:
            gradients.update(_named_gradients(trainer))
        update(rate)

    trainer.optimizer.step = watched  # type: ignore[method-assign]
    records = [trainer.train_step() for _ in range(steps)]
    return {"records": records, "gradients": gradients, "eval": trainer.evaluate()}


def _train_putting(
    rank: int, world: int, tables: dict[str, Any], corpus: str, steps: int, folder: str
) -> dict[str, Any]:
    """The same with rows put into memory that the ranks share."""
    boxes: list[SharedInbox] = []

    def inbox(*sizes: Any) -> SharedInbox:
        boxes.append(SharedInbox(folder, *sizes))
        return boxes[0]

    symmetric.inbox = inbox  # type: ignore[assignment]
    result = _train(rank, world, tables, corpus, steps)
    assert len(boxes) == 1 and boxes[0].said
    for message in boxes[0].said:  # one that is let go of before it was heard is lost
        message.wait()
    return result


def _named_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Those that are summed on this rank."""
    from shoal.workers.model.feedforward import named_views

    out = {}
    index_of = {id(p): i for i, p in enumerate(trainer.parameters.values())}
    for name, parameter, part in named_views(trainer.model):
        assert parameter.grad is not None
        if list(trainer.optimizer.state_of(index_of[id(parameter)], part)):
            out[name] = (parameter.grad if part is None else parameter.grad[part]).clone()
    return out


def _one_rank(tables: dict[str, Any], corpus: Path, steps: int) -> dict[str, Any]:
    return _train(0, 1, tables, str(corpus), steps)


@pytest.fixture(scope="module")
def small_on_one(corpus: Path) -> OneRank:
    """The small recipe on one rank for so many steps, which much is compared with: trained once for each number."""
    return cache(lambda steps: _one_rank(small_recipe(), corpus, steps))


def _ranks(tables: dict[str, Any], corpus: Path, steps: int) -> list[dict[str, Any]]:
    return run_ranks(Recipe.model_validate(tables).parallel.ranks, _train, tables, str(corpus), steps)


def _check(one: dict[str, Any], many: list[dict[str, Any]], rtol: float) -> None:
    for result in many:
        for a, b in zip(one["records"], result["records"], strict=True):
            for key in ("loss", "balance_loss", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=rtol), (key, a["step"])
            assert a["load"] == b["load"] or rtol > 1e-9
            assert torch.allclose(torch.tensor(b["gates"]), torch.tensor(a["gates"]), rtol=max(rtol, 1e-5))
        assert result["eval"]["bits_per_byte"] == pytest.approx(one["eval"]["bits_per_byte"], rel=rtol)
    seen = {name for result in many for name in result["gradients"]}
    assert seen == set(one["gradients"])
    for result in many:
        for name, gradient in result["gradients"].items():
            want = one["gradients"][name]
            error = (gradient - want).norm() / want.norm().clamp(min=1e-30)
            assert error < rtol or want.norm() == 0, (name, float(error))


LONG = ("4 colocated, 2 sets of experts", "2A:2F")
"""Placements that train to the end of the schedule; the others warm up and take two steps more."""
ELSEWHERE = ("2 colocated", "4 colocated", "1A:1F", "1A:2F")
"""Those that other tests compare with one rank, or parts of larger ones."""


@pytest.mark.parametrize(
    "placement",
    [pytest.param(name, marks=pytest.mark.slow if name in ELSEWHERE else ()) for name in PLACEMENTS],
)
def test_a_step_and_a_run_equal_one_rank(corpus: Path, small_on_one: OneRank, placement: str) -> None:
    steps = 20 if placement in LONG else 5
    one = small_on_one(steps)
    many = _ranks(small_recipe(**PLACEMENTS[placement]), corpus, steps)
    _check(one, many, 1e-9)


@pytest.fixture(scope="module")
def shared_on_one(corpus: Path) -> dict[str, Any]:
    """What the ranks of a context group are compared with."""
    return _one_rank(small_recipe(**SHARED), corpus, 5)


@pytest.mark.parametrize("context", CONTEXTS)
def test_ranks_that_share_sequences_equal_one_rank(corpus: Path, shared_on_one: dict[str, Any], context: str) -> None:
    _check(shared_on_one, _ranks(small_recipe(**SHARED, **CONTEXTS[context]), corpus, 5), 1e-9)


def test_sharing_sequences_in_float32_and_in_parts_of_a_batch(corpus: Path) -> None:
    wanted = {**SHARED, **CONTEXTS["2 ranks share all"]}
    one = _one_rank(small_recipe(train__dtype="float32", **SHARED), corpus, 1)
    _check(one, _ranks(small_recipe(train__dtype="float32", **wanted), corpus, 1), 2e-5)
    one = _one_rank(small_recipe(**SHARED), corpus, 2)
    _check(one, _ranks(small_recipe(train__accumulate=3, **wanted), corpus, 2), 1e-9)


@pytest.mark.parametrize("where", ["2 groups of 2, 2 sets of experts", "2A:2F, 2 share all"])
def test_layers_computed_again_have_the_same_gradients(corpus: Path, shared_on_one: dict[str, Any], where: str) -> None:
    """Some layers or all, in one batch and in parts of it; their load is counted once."""
    one = {**shared_on_one, **_one_rank(small_recipe(train__recompute=3, **SHARED), corpus, 2)}
    _check(_one_rank(small_recipe(**SHARED), corpus, 2), [one], 1e-12)
    changes = {**SHARED, "train__recompute": 2, "train__accumulate": 3 if where.startswith("2A") else 1}
    _check(one, _ranks(small_recipe(**changes, **CONTEXTS[where]), corpus, 2), 1e-9)


@pytest.mark.parametrize("batch", [1, 6])
def test_full_attention_over_ranks_that_share_sequences(corpus: Path, batch: int) -> None:
    """Of a batch of one row some hold a single document, whose keys go around a ring; others are gathered."""
    wanted = {**SHARED, "attention__kind": "full", "train__batch": batch}
    one = _one_rank(small_recipe(**wanted), corpus, 4)
    _check(one, _ranks(small_recipe(**wanted, **CONTEXTS["2 ranks share all"]), corpus, 4), 1e-9)


PUT: dict[str, dict[str, Any]] = {
    "in parts of a batch, layers computed again": {"train__accumulate": 3, "train__recompute": 2},
    "shared experts dispatched, biases": {"moe__shared": "dispatched", "balance__bias_rate": 0.05},
    "two ranks share each sequence": {"parallel__context": 2},
}


@pytest.mark.parametrize("case", PUT)
def test_rows_put_into_the_memory_of_others_equal_one_rank(corpus: Path, tmp_path: Path, case: str) -> None:
    """Training and validation; in float32, as gates are."""
    changes = {**SHARED, "train__dtype": "float32", **PUT[case]}
    one = _one_rank(small_recipe(**{**changes, "parallel__context": 1}), corpus, 1)
    tables = small_recipe(**changes, parallel__ranks=2, parallel__dispatch="put")
    _check(one, run_ranks(2, _train_putting, tables, str(corpus), 1, str(tmp_path)), 2e-5)


@pytest.mark.parametrize("placement", ["4 colocated", "2A:2F"])
def test_shared_experts_may_be_dispatched(corpus: Path, small_on_one: OneRank, placement: str) -> None:
    one = small_on_one(3)
    many = _ranks(small_recipe(moe__shared="dispatched", **PLACEMENTS[placement]), corpus, 3)
    _check(one, many, 1e-9)
    _check(one, [_one_rank(small_recipe(moe__shared="dispatched"), corpus, 3)], 1e-9)


def test_float32_agrees_to_rounding(corpus: Path) -> None:
    one = _one_rank(small_recipe(train__dtype="float32"), corpus, 1)
    many = _ranks(small_recipe(train__dtype="float32", **PLACEMENTS["2A:2F"]), corpus, 1)
    _check(one, many, 2e-5)


def test_accumulation_is_the_same_batch(corpus: Path, small_on_one: OneRank) -> None:
    """f and P of the balance losses are over the global batch, however it is cut into micro-batches and ranks."""
    one = small_on_one(3)
    _check(one, [_one_rank(small_recipe(train__accumulate=4), corpus, 3)], 1e-9)
    _check(one, _ranks(small_recipe(train__accumulate=2, **PLACEMENTS["2A:2F"]), corpus, 3), 1e-9)
    each = _one_rank(small_recipe(train__accumulate=4, balance__over="micro_batch"), corpus, 1)
    assert each["records"][0]["balance_loss"] != pytest.approx(one["records"][0]["balance_loss"], rel=1e-6)


BALANCED: dict[str, Any] = {
    "balance__sequence": 0.05,
    "balance__z_loss": 0.02,
    "balance__bias_rate": 0.05,
    "route__max_devices": 2,
}


@pytest.fixture(scope="module")
def balanced_on_one(corpus: Path) -> dict[str, Any]:
    """With everything that keeps the load even."""
    return _one_rank(small_recipe(**BALANCED, **SHARED), corpus, 3)


@pytest.mark.parametrize(
    ("context", "accumulate"),
    [
        ("2 groups of 2, 2 sets of experts", 1),
        ("2A:2F, 2 share all", 3),
        pytest.param("4 ranks share all", 6, marks=pytest.mark.slow),
    ],
)
def test_all_that_balances_equals_one_rank(
    corpus: Path, balanced_on_one: dict[str, Any], context: str, accumulate: int
) -> None:
    """Sequences that ranks share, f of each from all its tokens; biases nudged by the load of the global batch."""
    tables = small_recipe(**BALANCED, **SHARED, **CONTEXTS[context], train__accumulate=accumulate)
    _check(balanced_on_one, _ranks(tables, corpus, 3), 1e-9)


@pytest.mark.slow
def test_sigmoid_scores_equal_one_rank(corpus: Path) -> None:
    """Shares of scores that do not add up to 1, in all losses; gates by their sum."""
    changes = {**BALANCED, **SHARED, "balance__z_loss": 0.0, "moe__router": "sigmoid", "moe__normalize_gates": True}
    one = _one_rank(small_recipe(**changes), corpus, 2)
    _check(one, _ranks(small_recipe(**changes, **CONTEXTS["2A:2F, 2 share all"], train__accumulate=3), corpus, 2), 1e-9)


@pytest.mark.parametrize("key", BALANCED)
def test_each_way_to_balance_changes_what_is_computed(corpus: Path, balanced_on_one: dict[str, Any], key: str) -> None:
    without = _one_rank(small_recipe(**{**BALANCED, key: 0}, **SHARED), corpus, 2)["records"][1]
    record = balanced_on_one["records"][1]
    assert record["loss"] != pytest.approx(without["loss"], rel=1e-6)


@pytest.mark.parametrize("attention", ["nsa", "full"])
@pytest.mark.parametrize("router", ["softmax", "hash"])
def test_every_kind_of_layer_runs_disaggregated(corpus: Path, attention: str, router: str) -> None:
    changes: dict[str, Any] = {"attention__kind": attention, "moe__router": router}
    changes |= {"moe__top_k": 1} if router == "hash" else {"moe__normalize_gates": True}
    one = _one_rank(small_recipe(**changes), corpus, 2)
    _check(one, _ranks(small_recipe(**changes, **PLACEMENTS["1A:2F"]), corpus, 2), 1e-9)


def test_two_runs_have_the_same_bits(corpus: Path) -> None:
    tables = small_recipe(train__dtype="float32", **PLACEMENTS["2 colocated"])
    first, second = (_ranks(tables, corpus, 6) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a["records"], b["records"], strict=True):
            assert (x["loss"], x["grad_norm"], x["load"]) == (y["loss"], y["grad_norm"], y["load"])
        assert all(torch.equal(g, b["gradients"][name]) for name, g in a["gradients"].items())
        assert a["eval"] == b["eval"]


def test_training_learns(small_on_one: OneRank) -> None:
    records = small_on_one(20)["records"]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
