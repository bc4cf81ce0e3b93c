"""Decode steps of fixed shapes over several ranks: whatever each of them has to do, the tokens of one rank alone.

Without a GPU the operations of a CUDA graph run one by one, and gloo carries the rows."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, start_ranks
from small import small_recipe
from test_engine_decode import ATTENTIONS
from torch import Tensor

from shoal.workers.config import Recipe
from shoal.workers.dispatch import Dispatcher
from shoal.workers.engine.engine import Engine
from shoal.workers.engine.request import UNSHAPED, Limits, Load, Request, Sampling, Shape, Turn
from shoal.workers.expert_plan import Plan, even_homes
from shoal.workers.flight import Flight
from shoal.workers.gathered import GatheredFlight, Live
from shoal.workers.mesh import make_mesh
from shoal.workers.model import Transformer
from shoal.workers.placement import Placement
from shoal.workers.weights import weights_of

News = dict[str, list[tuple[int, float]]]
"""Of each request its tokens, with their logarithms of probability."""


def requests_of(shares: list[int], seed: int) -> list[list[tuple[int, Request]]]:
    """Of each rank so many requests, each with the step before which it comes."""
    rng, found = random.Random(seed), []
    for rank, count in enumerate(shares):
        mine = []
        for i in range(count):
            prompt = tuple(rng.randrange(4) for _ in range(rng.choice([1, 5, 30])))
            how: dict[str, Any] = {"temperature": [0.0, 1.0][i % 2], "top_p": [1.0, 0.9][i % 2], "logprobs": 1}
            mine.append(
                (rng.randrange(12), Request(f"{rank}.{i}", prompt, Sampling(rng.randint(1, 25), seed=i, **how)))
            )
        found.append(mine)
    return found


def tokens_of(
    engine: Engine, mine: list[tuple[int, Request]], cancel: str = "", plans: dict[int, Plan] | None = None
) -> News:
    """Steps until no rank has anything to do. cancel: a request that is ended when it has had four tokens. plans: of
    experts, by the step before which this rank is told."""
    found: News = {}
    step, late = 0, sorted(mine, key=lambda each: each[0])
    while True:
        while late and late[0][0] <= step:
            engine.add(late.pop(0)[1])
        if plans and step in plans:
            engine.place(plans[step])
        turn = engine.turn()
        if turn.moves:
            engine.move()
        if not turn.requests and all(ended for (ended,) in engine.model.mesh.tell([not late])):
            return found
        for output in engine.step(turn) if turn.requests else ():
            found.setdefault(output.request, []).extend((token.id, token.logprob) for token in output.tokens)
            if output.request == cancel and len(found[cancel]) >= 4:
                engine.cancel(cancel)
        step += 1


def engine_of(rank: int, tables: dict[str, Any], limits: Limits, fixed: bool, plan: Plan | None = None) -> Engine:
    recipe = Recipe.model_validate(tables)
    mesh = make_mesh(Placement.of(recipe), rank)
    return Engine(Transformer(recipe, mesh, plan=plan).eval(), limits, fixed=fixed)


class Watched(Dispatcher):
    """Notes what kind of flights there were."""

    kinds: set[type[Flight]]

    def start(self, *arguments: Any, **named: Any) -> Flight:
        flight = super().start(*arguments, **named)
        self.kinds.add(type(flight))
        return flight


def _serve(
    rank: int, world: int, tables: dict[str, Any], shares: list[int], limits: Limits, cancel: str, plan: Plan | None
) -> tuple[News, Load, set[str]]:
    engine = engine_of(rank, tables, limits, True, plan)
    kinds: set[type[Flight]] = set()
    for layer in engine.model.moe_layers:
        layer.dispatcher.__class__, layer.dispatcher.kinds = Watched, kinds  # type: ignore[assignment, attr-defined]
    news = tokens_of(engine, requests_of(shares, 5)[rank], cancel)
    assert not engine.busy
    return news, engine.load(), {kind.__name__ for kind in kinds}


COPIES = (
    ((0, 1), (1,), (0,), (1,), (0,), (1,), (0,), (0, 1)),
    ((1,), (0,), (0, 1), (1,), (0,), (1,), (0,), (0, 1)),
)
"""Slots of two busy experts on both ranks, and others not in order; of two layers."""
EVEN = even_homes(8, 2)
NINE = {"moe__experts": 9, "balance__device_groups": 3, "train__batch": 9}
# fmt: off
CASES: dict[str, tuple[dict[str, Any], list[int], dict[str, Any], str, Plan | None]] = {
    "uneven load": ({}, [7, 2], {}, "", None),
    "a rank without requests, guesses": ({}, [0, 5], {"speculate": 3}, "", None),
    "one request that ends early": (NINE, [1, 0, 0], {}, "0.0", None),
    "three ranks, one cancelled": (NINE, [3, 0, 4], {}, "2.1", None),
    "dispatched shared experts": (
        {"moe__shared": "dispatched", "moe__router": "sigmoid", "moe__normalize_gates": True},
        [2, 3],
        {},
        "",
        None,
    ),
    "a hash of tokens": ({"moe__router": "hash", "moe__top_k": 1}, [1, 3], {}, "", None),
    "experts on every rank": ({"parallel__expert": 1}, [3, 1], {}, "", None),
    "sets of experts": ({"parallel__expert": 2}, [3, 0, 1, 2], {}, "", None),
    "full attention": ({}, [4, 3], {}, "", None),
    "one and one, guesses": ({"parallel__placement": "1A:1F"}, [6, 0], {"speculate": 3}, "", None),
    "two and one, one without requests": (
        {"parallel__placement": "2A:1F", "moe__router": "hash", "moe__top_k": 1}, [0, 5, 0], {}, "1.1", None
    ),
    "one and two, few pages": (
        {"parallel__placement": "1A:2F", "moe__shared": "dispatched"}, [7, 0, 0], {"pages": 8}, "", None
    ),
    "two and two, copies, few pages": (
        {"parallel__placement": "2A:2F"}, [6, 6, 0, 0], {"pages": 8, "speculate": 2}, "", COPIES
    ),
    "copies": ({}, [5, 3], {}, "", COPIES),
    # a token goes to one of three groups, each on one rank or two; a rank without experts
    "copies of groups": (
        NINE | {"route__max_devices": 1},
        [2, 1, 1],
        {},
        "",
        (((0, 1),) * 3 + ((2,),) * 3 + ((0, 1, 2),) * 3, ((0,),) * 3 + ((0, 2),) * 3 + ((2,),) * 3),
    ),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_ranks_draw_the_tokens_of_one(name: str) -> None:
    """In float64, to the probability of each token, while requests come and end; and all experts are counted."""
    changes, shares, limits, cancel, plan = CASES[name]
    attention = ATTENTIONS[3 if name == "full attention" else 0]
    ranks = len(shares)
    tables = {**small_recipe(**({"parallel__ranks": ranks} | changes)), "attention": attention}
    flights = {"PackedFlight", "ApartFlight" if "parallel__placement" in changes else "GatheredFlight"}
    if changes.get("parallel__expert") == 1:
        flights = {"Flight"}
    bounds = Limits(sequences=4, step=24, prefix_cache=False, **limits)
    found = run_ranks(ranks, _serve, tables, shares, bounds, cancel, plan)
    changes = {key: value for key, value in changes.items() if not key.startswith("parallel")}
    alone = {**small_recipe(**changes), "attention": attention}
    whole = Limits(sequences=99, step=99, prefix_cache=False)
    want = tokens_of(engine_of(0, alone, whole, False), [*itertools.chain(*requests_of(shares, 5))])
    for news, _, kinds in found:
        for request, tokens in news.items():
            expected = want.pop(request)[: len(tokens)]
            assert [i for i, _ in tokens] == [i for i, _ in expected], request
            assert [p for _, p in tokens] == pytest.approx([p for _, p in expected], rel=1e-9)
            assert request == cancel or len(tokens) >= len(expected)
        assert kinds == flights
    assert not want
    assert "pages" not in limits or any(load.preemptions_total for _, load, _ in found)
    _experts_are_counted(found, Recipe.model_validate(tables))


def _experts_are_counted(found: list[Any], recipe: Recipe) -> None:
    """Alike on the ranks of a dispatch group that host experts; each layer has as many choices as another."""
    placement = Placement.of(recipe)
    for group in placement.dispatch_groups():
        counts = {found[rank][1].expert_tokens for rank in group if rank in placement.experts}
        assert len(counts) == 1
        assert len({sum(layer) for layer in counts.pop()}) == 1


MOVING: dict[str, tuple[dict[str, Any], list[int], list[Plan]]] = {
    "both have all": ({"serve__expert_copies": 1}, [4, 3], [COPIES, COPIES[::-1]]),
    "two and two, dispatched shared experts": (
        {"parallel__placement": "2A:2F", "moe__shared": "dispatched", "serve__expert_copies": 2},
        [4, 4, 0, 0],
        [(EVEN, COPIES[0]), COPIES],
    ),
    "sets of experts": ({"parallel__expert": 2, "serve__expert_copies": 1}, [3, 0, 1, 2], [(EVEN,) * 2, COPIES]),
    "groups": (
        NINE | {"route__max_devices": 1, "serve__expert_copies": 3},
        [4, 4, 3],
        [CASES["copies of groups"][4], (((0,),) * 3 + ((1,),) * 3 + ((1, 2),) * 3,) * 2],  # type: ignore[list-item]
    ),
}
"""Tables, requests of each rank, plans that take turns."""


def _held(engine: Engine) -> list[Any]:
    """What a CUDA graph of a decode step holds: addresses of weights and tables, and numbers that hosts read."""
    found: list[Any] = []
    for layer in engine.model.moe_layers:
        d, weights = layer.dispatcher, list(layer.parameters())
        tables = [value for value in vars(d.ways).values() if isinstance(value, Tensor)]
        kept = [*weights, *tables, d.of_slot, d._of_any_slot, *(d.everywhere(rows) for rows in (1, 2, 4))]
        found += [[(tensor.data_ptr(), tensor.shape) for tensor in kept], d.ways.own, d.ways.in_order]
        found += [d.first, len(d.local), d.hosts, d.others, d.experts, d.counts_in_order]
    return found


def _move(
    rank: int, world: int, tables: dict[str, Any], shares: list[int], plans: list[Plan], fixed: bool
) -> tuple[News, Load, bool, bool, list[bool]]:
    engine = engine_of(rank, tables, Limits(sequences=4, step=24, prefix_cache=False), fixed, plans[0])
    busy: list[bool] = []
    move = engine.move

    def seen() -> Any:
        busy.append(engine.busy)
        return move()

    engine.move = seen  # type: ignore[method-assign]
    held = _held(engine)
    # not all ranks are told at the same time, and what is told last is the first plan again
    told = {first + rank % 3: plan for first, plan in ((1, plans[1]), (6, plans[0]), (11, plans[1]), (16, plans[0]))}
    news = tokens_of(engine, requests_of(shares, 5)[rank], plans=told)
    assert not engine.moves and tuple(layer.homes for layer in engine.model.moe_layers) == plans[0]
    fresh = weights_of(engine_of(rank, tables, Limits(), fixed, plans[0]).model)
    own = weights_of(engine.model)
    right = own.keys() == fresh.keys() and all(torch.equal(own[name], fresh[name]) for name in own)
    return news, engine.load(), _held(engine) == held, right, busy


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("name", MOVING)
def test_experts_move_while_requests_are_answered(name: str, fixed: bool) -> None:
    """A layer a step: the tokens of one rank alone, in float64, before, meanwhile and after; what CUDA graphs hold
    stays where it is."""
    changes, shares, plans = MOVING[name]
    tables = {**small_recipe(**({"parallel__ranks": len(shares)} | changes)), "attention": ATTENTIONS[0]}
    found = run_ranks(len(shares), _move, tables, shares, plans, fixed)
    changes = {key: value for key, value in changes.items() if not key.startswith(("parallel", "serve"))}
    alone = {**small_recipe(**changes), "attention": ATTENTIONS[0]}
    want = tokens_of(
        engine_of(0, alone, Limits(sequences=99, step=99, prefix_cache=False), False),
        [*itertools.chain(*requests_of(shares, 5))],
    )
    assert all(map(any, zip(*(busy for *_, busy in found), strict=True))), "answers are under way whenever they move"
    for news, _, stays, right, _ in found:
        for request, tokens in news.items():
            expected = want.pop(request)
            assert [i for i, _ in tokens] == [i for i, _ in expected], request
            assert [p for _, p in tokens] == pytest.approx([p for _, p in expected], rel=1e-9)
        assert stays and right
    assert not want
    _experts_are_counted(found, Recipe.model_validate(tables))


def _counts(rank: int, world: int, tables: dict[str, Any], shares: list[int]) -> list[tuple[tuple[int, ...], ...]]:
    counted = []
    for fixed in (True, False):
        engine = engine_of(rank, tables, Limits(sequences=4, step=24, prefix_cache=False), fixed)
        tokens_of(engine, requests_of(shares, 9)[rank])
        counted.append(engine.load().expert_tokens)
    return counted


@pytest.mark.parametrize(("placement", "shares"), [("colocated", [5, 2]), ("1A:1F", [5, 0])])
def test_experts_are_counted_as_without_fixed_shapes(placement: str, shares: list[int]) -> None:
    """Where experts are, since their ranks know what all tokens chose."""
    tables = small_recipe(parallel__ranks=2, parallel__placement=placement)
    (first, plain), (second, other) = run_ranks(2, _counts, tables, shares)
    assert first == plain and second == other
    assert sum(map(sum, second)) > 0
    assert first == (second if placement == "colocated" else ())


def _exchange(rank: int, world: int) -> bool:
    """A step of fixed shape exchanges the same whatever it computes: the flight of rows that nobody needs."""
    recipe = Recipe.model_validate(small_recipe(parallel__ranks=world))
    model = Transformer(recipe, make_mesh(Placement.of(recipe), rank)).eval()
    d = model.moe_layers[0].dispatcher
    x, gates = torch.ones(3, 32, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    experts = torch.tensor([[0, 7], [3, 4], [1, 2]])
    flight = d.start(x, gates, experts, live=Live(torch.zeros(3, dtype=torch.int64), 3))
    arrived = flight.arrive(x, gates)
    flight.give_back(arrived, arrived.parts[0].new_full((len(arrived.fan.order), 32), torch.nan))
    assert isinstance(flight, GatheredFlight)
    assert not arrived.ends.any() and (flight.chosen() == -1).all()
    return bool((flight.returned(x) == 1).all())


def test_rows_that_nobody_needs_reach_no_expert() -> None:
    assert run_ranks(2, _exchange) == [True, True]


def _generate(rank: int, world: int, folder: Path, placement: str) -> None:
    tables = small_recipe(parallel__ranks=world, parallel__placement=placement)
    engine = engine_of(rank, tables, Limits(sequences=4, step=24), True)
    for i in itertools.count():
        if not engine.busy and engine.model.hosts_attention:
            engine.add(Request(str(i), (7, 8, 9), Sampling(50, seed=i)))
        engine.step()
        if i == 20:
            (folder / f"generates-{rank}").touch()


@pytest.mark.parametrize(("placement", "victim"), [("colocated", 1), ("1A:1F", 1), ("1A:1F", 0)])
def test_a_rank_that_dies_ends_the_steps_of_others(placement: str, victim: int, tmp_path: Path) -> None:
    with start_ranks(2, _generate, tmp_path, placement) as (context, folder):
        processes = context.processes
        while len(list(tmp_path.iterdir())) < 2:
            assert all(process.is_alive() for process in processes), (folder / "error").read_text()
            processes[0].join(0.05)
        processes[victim].kill()
        other = 1 - victim
        processes[other].join(60)
        assert processes[other].exitcode == 1
        assert f"rank {other}" in (folder / "error").read_text()


def test_what_ranks_need_together() -> None:
    turns = [Turn(3, False, Shape(5, 2, False), True), Turn(0, False, Shape()), Turn(1, True, Shape(1, 9, True), True)]
    assert Turn.together([turn.numbers() for turn in turns]) == Turn(4, True, Shape(5, 9, True))
    assert Turn.together([turn.numbers() for turn in turns[::2]]) == Turn(4, True, Shape(5, 9, True), True)
    long = Turn.together([Turn(1, False, UNSHAPED).numbers(), turns[0].numbers()])
    assert long.shape.rows == UNSHAPED.rows
