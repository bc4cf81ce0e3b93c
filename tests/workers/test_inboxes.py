"""Which way the rows of a training travel, and whether they have room."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from small import small_recipe

from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput
from shoal.workers.inboxes import open_inbox
from shoal.workers.mesh import make_mesh
from shoal.workers.model import Transformer
from shoal.workers.placement import Placement
from shoal.workers.sequence import zigzag
from shoal.workers.slots import capacity, needed


@given(
    length=st.integers(100, 400),
    micro=st.integers(1, 3),
    context=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["nsa", "full"]),
    data=st.data(),
)
def test_a_rank_has_room_for_its_part_of_any_batch(
    length: int, micro: int, context: int, kind: str, data: st.DataObject
) -> None:
    """Of training, and of validation, whose last batch is shorter."""
    ranks = 4
    sizes = {"train__sequence": length, "model__context": length, "train__batch": micro * ranks // context}
    recipe = Recipe.model_validate(
        small_recipe(parallel__ranks=ranks, parallel__context=context, attention__kind=kind, **sizes)
    )
    for tokens in (micro * length, data.draw(st.integers(1, micro * length))):  # that a context group reads
        parts = zigzag(tokens, context, 8 if kind == "nsa" else 1) if context > 1 else ()
        assert max((part.count for part in parts), default=tokens) <= capacity(recipe)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_are_put_by_how_many_tokens_need_a_rank(ranks: int, top_k: int) -> None:
    recipe = Recipe.model_validate(small_recipe(moe__top_k=top_k, parallel__ranks=ranks))
    choices = list(combinations(range(8), top_k))
    there = sum(any(expert < 8 // ranks for expert in choice) for choice in choices)
    assert needed(recipe, ranks) == pytest.approx(there / len(choices))
    bound = Recipe.model_validate(small_recipe(parallel__ranks=4, route__max_devices=2))
    assert needed(bound, 4) == 0.0


def _refused(rank: int, world: int, changes: dict[str, Any]) -> str:
    recipe = Recipe.model_validate(small_recipe(**changes))
    model = Transformer(recipe, make_mesh(Placement.of(recipe), rank))
    try:
        open_inbox(model)
    except InvalidInput as error:
        return str(error)
    return "" if all(layer.dispatcher.inbox is None for layer in model.moe_layers) else "put"


def test_rows_that_cannot_be_put_are_exchanged_or_refused() -> None:
    assert run_ranks(2, _refused, {"parallel__ranks": 2}) == ["", ""]
    for said in run_ranks(2, _refused, {"parallel__placement": "1A:1F", "parallel__dispatch": "put"}):
        assert said.startswith("parallel.dispatch='put' needs") and "set parallel.dispatch='auto'" in said
