"""Which way the rows of a training travel, and whether they have room."""

from __future__ import annotations

import os
import pickle
import signal
from datetime import timedelta
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks, start_ranks
from shared_inbox import SharedInbox
from small import small_corpus, small_recipe

from shoal.jobs.activations import sizes_of
from shoal.workers import slots, symmetric
from shoal.workers.actor import RankActor
from shoal.workers.config import Recipe
from shoal.workers.dispatch import Dispatcher
from shoal.workers.errors import InvalidInput, last_line
from shoal.workers.expert_plan import even_homes
from shoal.workers.flight import PackedFlight
from shoal.workers.inboxes import open_inbox
from shoal.workers.mesh import Group, make_mesh
from shoal.workers.model import Transformer
from shoal.workers.placement import Placement
from shoal.workers.sequence import zigzag
from shoal.workers.slots import capacity, needed
from shoal.workers.trainer import Trainer


@given(
    length=st.integers(128, 400),  # segments of four ranks hold a window
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


def _arrived(rank: int, world: int, recipes: list[Recipe]) -> list[int]:
    """Rows that come from the rank before, by each recipe, where its tokens choose in every way there is."""
    found = []
    for recipe in recipes:
        moe, placement = recipe.moe, Placement.of(recipe)
        sent = moe.shared_experts if moe.shared == "dispatched" else 0
        homes = even_homes(moe.experts, placement.set_size)
        dispatcher = Dispatcher(make_mesh(placement, rank).dispatch, placement.owners(homes, sent), torch.device("cpu"))
        always = tuple(range(moe.experts, moe.experts + sent))
        experts = torch.tensor([(*choice, *always) for choice in combinations(range(moe.experts), moe.top_k)])
        flight = dispatcher.start(torch.zeros(len(experts), 4), torch.ones(experts.shape), experts)
        assert isinstance(flight, PackedFlight)
        flight.send()
        found.append(flight.back[rank - 1])
        flight.arrive(torch.zeros(len(experts), 4), torch.ones(experts.shape))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_that_a_rank_needs_are_those_that_come(ranks: int) -> None:
    """With a shared expert that is dispatched, which some of the ranks host: those need all tokens."""
    kinds = [(1, 0), (3, 0), (1, 1), (3, 2)]  # experts of a token, and shared ones
    recipes = [
        Recipe.model_validate(
            small_recipe(
                moe__top_k=k, moe__shared="dispatched" if n else "local", moe__shared_experts=n, parallel__ranks=ranks
            )
        )
        for k, n in kinds
    ]
    found = run_ranks(ranks, _arrived, recipes)
    for i, recipe in enumerate(recipes):
        tokens = comb(8, recipe.moe.top_k)
        assert [rows[i] / tokens for rows in found] == pytest.approx(needed(recipe))
        arrived = sizes_of(recipe, True, True).arrived / (8 * 64 * (ranks - 1) / ranks)
        assert arrived == pytest.approx(max(rows[i] for rows in found) / tokens, rel=1e-2)


def _opened(rank: int, world: int, cases: list[dict[str, Any]]) -> list[str]:
    """What is said of each, as it is recorded or refused."""
    found = []
    for changes in cases:
        recipe = Recipe.model_validate(small_recipe(parallel__ranks=2, **changes))
        model = Transformer(recipe, make_mesh(Placement.of(recipe), rank))
        try:
            found.append(open_inbox(model))
        except InvalidInput as error:
            found.append(str(error))
        assert all(layer.dispatcher.inbox is None for layer in model.moe_layers)
    return found


SENT: dict[str, Any] = {"train__dtype": "float32", "moe__top_k": 1, "moe__shared": "dispatched"}
EXCHANGED: list[tuple[dict[str, Any], str]] = [
    ({"train__dtype": "float32"}, "ranks are on CPUs"),
    ({"train__dtype": "float32", "moe__top_k": 1}, "a rank is needed by 0.50 of the tokens, less than 0.8"),
    (SENT, "ranks are on CPUs"),  # a shared expert on each: all tokens need both
    (SENT | {"moe__shared_experts": 1}, "a rank is needed by 0.75 of the tokens, less than 0.8"),
    ({"train__dtype": "float32", "route__max_devices": 3}, "route.max_devices keeps tokens away from ranks"),
    ({"train__dtype": "float32", "model__hidden": 30}, "a row of 120 bytes is no multiple of 16"),
    ({"train__dtype": "float64"}, "gates of float64 are not put"),
    ({"parallel__placement": "1A:1F"}, "ranks with experts have no tokens of their own"),
    ({"parallel__dispatch": "exchanged"}, "parallel.dispatch is 'exchanged'"),
]


def test_a_run_says_why_rows_are_exchanged() -> None:
    nothing: list[dict[str, Any]] = [{"parallel__expert": 1}, {"model__dense_layers": 3}]  # rows go to no other rank
    for said in run_ranks(2, _opened, [changes for changes, _ in EXCHANGED] + nothing):
        assert said == [f"rows for other ranks' experts are exchanged: {why}" for _, why in EXCHANGED] + ["", ""]


def test_rows_that_cannot_be_put_are_refused() -> None:
    """Where they shall be put at any rate. That few are needed is no reason then."""
    cases = [EXCHANGED[i] for i in (0, 1, 4, 5, 6, 7)]
    wanted = ["ranks are on CPUs" if i in (1, 2) else why for i, (_, why) in enumerate(cases)]
    for said in run_ranks(2, _opened, [changes | {"parallel__dispatch": "put"} for changes, _ in cases]):
        told = "parallel.dispatch='put', and rows cannot be put: {}; set parallel.dispatch='auto'"
        assert said == [told.format(why) for why in wanted]


def _untold(rank: int, world: int, folder: str) -> str:
    def fails(*_: Any) -> int:
        raise OSError("none is left")

    def opened(*sizes: Any) -> SharedInbox:
        box = SharedInbox(folder, *sizes)
        box.share_counts(sizes[-2], sizes[-1])
        return box

    os.memfd_create = fails  # type: ignore[assignment]
    symmetric.inbox = opened  # type: ignore[assignment]
    recipe = Recipe.model_validate(small_recipe(parallel__ranks=2, parallel__device="auto", train__dtype="float32"))
    return open_inbox(Transformer(recipe, make_mesh(Placement.of(recipe), rank)))


def test_a_run_says_why_counts_go_the_slower_way(tmp_path: Path) -> None:
    why = "memory to share cannot be made (none is left)"
    wanted = "put into their memory, and so are counts that hosts read, which takes longer: "
    assert run_ranks(2, _untold, str(tmp_path)) == [f"rows for other ranks' experts are {wanted}{why}"] * 2


class _Astray(SharedInbox):
    """Whose ranks take their own memory for that of the others."""

    def _share(self, words: int, device: torch.device) -> list[torch.Tensor]:
        return [super()._share(words, device)[self.group.index]] * self.group.size


def _arrives(rank: int, world: int, folder: str) -> tuple[bool, bool]:
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    sizes = group, 5, 8, torch.float32, 2, 4, torch.device("cpu")
    return SharedInbox(folder, *sizes).arrives(), _Astray(folder, *sizes).arrives()


def test_rows_that_go_astray_are_found_out_before_there_are_any(tmp_path: Path) -> None:
    assert run_ranks(3, _arrives, str(tmp_path)) == [(True, False)] * 3


def _sampled(rank: int, world: int, corpus: str, folder: str, dispatch: str) -> list[int]:
    """What a rank says after a prompt that slots have no room for; then it trains, with them."""
    symmetric.inbox = lambda *sizes: SharedInbox(folder, *sizes)  # type: ignore[assignment]
    changes = {"parallel__ranks": 2, "parallel__device": "auto", "parallel__dispatch": dispatch}
    changes |= {"train__batch": 2, "train__sequence": 32}
    recipe = Recipe.model_validate(small_recipe(train__dtype="float32", **changes))
    room = capacity(recipe)
    assert room + 3 <= recipe.model.context
    actor = RankActor(rank, world)
    actor.trainer = Trainer(recipe, Path(corpus), None, make_mesh(Placement.of(recipe), rank), torch.device("cpu"))
    said = actor.sample(list(range(room + 1)), 2, {"temperature": 0.0})
    assert (actor.trainer.model.moe_layers[0].dispatcher.inbox is None) == (dispatch == "exchanged")
    actor.run(1)
    return said


def test_a_sample_may_be_longer_than_slots(tmp_path: Path) -> None:
    (tmp_path / "slots").mkdir()
    arguments = str(small_corpus(tmp_path)), str(tmp_path / "slots")
    put, exchanged = (run_ranks(2, _sampled, *arguments, dispatch) for dispatch in ("put", "exchanged"))
    assert put == exchanged and len(put[0]) == 2 and not put[1]


def _abandoned(rank: int, world: int, corpus: str, folder: str, tallied: bool) -> str:
    """What the first rank ends with, whose other one stops in the midst of a step."""
    slots.ROOM, SharedInbox.tallied = (0, True) if tallied else (slots.ROOM, False)
    symmetric.inbox = lambda *sizes: SharedInbox(folder, *sizes)  # type: ignore[assignment]
    recipe = Recipe.model_validate(small_recipe(parallel__ranks=2, parallel__device="auto", train__dtype="float32"))
    actor = RankActor(rank, world)
    actor.trainer = Trainer(recipe, Path(corpus), None, make_mesh(Placement.of(recipe), rank), torch.device("cpu"))
    actor.run(1)
    symmetric.PATIENCE = timedelta(seconds=5)  # in which ranks of a busy machine come to their rows
    if rank == 1:
        dispatcher = actor.trainer.model.moe_layers[-1].dispatcher
        dispatcher.start = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[method-assign,assignment]
    with pytest.raises(symmetric.RowsMissing) as raised:
        actor.run(2)
    assert actor.run(3) == [], "a call that was in flight begins another step"
    return last_line(raised.value)


@pytest.mark.parametrize("tallied", [False, True])
def test_a_rank_gives_up_waiting_for_rows(tallied: bool, tmp_path: Path) -> None:
    """Long before a collective does; also where its host waits for counts."""
    (tmp_path / "slots").mkdir()
    arguments = str(small_corpus(tmp_path)), str(tmp_path / "slots"), tallied
    with start_ranks(2, _abandoned, *arguments) as (context, results):
        context.processes[0].join()
        said = pickle.loads((results / "0").read_bytes())
    assert said.startswith("rank 0 waited 5 s for rank 1, which puts rows for experts into its memory, in vain: ")
