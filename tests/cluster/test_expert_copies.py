"""Copies of busy experts: close to the best there is, within the greedy bound, and within a token's limit of ranks."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_recipe

from shoal.cluster.expert_copies import copies_of, place_copies
from shoal.cluster.expert_placement import GAIN, busiest, place
from shoal.kernels.moe import route
from shoal.workers.config import Recipe
from shoal.workers.dispatch import Dispatcher
from shoal.workers.expert_plan import Homes, even_homes, place_loads
from shoal.workers.mesh import Group

LOADS = st.floats(0, 8, allow_nan=False) | st.just(0.0)


def _sums(load: list[float], homes: Homes, places: int) -> list[float]:
    return [sum(x / len(own) for x, own in zip(load, homes, strict=True) if p in own) for p in range(places)]


def _best(load: list[float], places: int, room: int) -> float:
    """The least possible load of the fullest place, of all ways to give every expert some places."""
    some = [own for n in range(1, places + 1) for own in itertools.combinations(range(places), n)]
    order = sorted(load, reverse=True)

    def least(first: int, sums: list[float], rooms: list[int], best: float) -> float:
        if max(sums) >= best:
            return best
        if first == len(order):
            return max(sums)
        for own in some:
            if all(rooms[p] for p in own):
                more = [x + order[first] / len(own) * (p in own) for p, x in enumerate(sums)]
                best = least(first + 1, more, [r - (p in own) for p, r in enumerate(rooms)], best)
        return best

    return least(0, [0.0] * places, [room] * places, float("inf"))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]), extra=st.integers(1, 3))
def test_copies_are_close_to_the_best_there_is(data: st.DataObject, shape: tuple[int, int], extra: int) -> None:
    places, each = shape
    load = data.draw(st.lists(LOADS, min_size=places * each, max_size=places * each))
    ours = max(_sums(load, place_copies(load, [0] * places, extra), places))
    best = _best(load, places, each + extra)
    assert best <= ours * (1 + 1e-9) + 1e-9
    assert ours <= best * 4 / 3 + 1e-9


@settings(max_examples=60, deadline=None)
@given(data=st.data(), nodes=st.lists(st.integers(0, 2), min_size=1, max_size=8), each=st.integers(1, 5))
def test_copies_are_within_the_greedy_bound(data: st.DataObject, nodes: list[int], each: int) -> None:
    """Graham's, with what a copy has to do for an item; and so are nodes of as many places. Nor do copies harm."""
    places, extra = len(nodes), data.draw(st.integers(0, 3))
    load = data.draw(st.lists(LOADS, min_size=places * each, max_size=places * each))
    homes = place_copies(load, nodes, extra)
    assert all(own and len(set(own)) == len(own) for own in homes)
    assert all(len(own) == 1 for own, tokens in zip(homes, load, strict=True) if not tokens)
    assert max(sum(p in own for own in homes) for p in range(places)) <= each + extra
    sums, even = _sums(load, homes, places), sum(load) / places
    heaviest = max(tokens / len(own) for tokens, own in zip(load, homes, strict=True))
    bound = max(even + heaviest * (1 - 1 / places), even * (1 + GAIN))
    assert max(sums) <= bound * (1 + 1e-9)
    for node in set(nodes):
        on = [sums[p] for p in range(places) if nodes[p] == node]
        assert sum(on) <= bound * len(on) * (1 + 1e-9)
    without = max(_sums(load, place(load, nodes), places))
    assert max(sums) <= max(without, even * (1 + GAIN)) * (1 + 1e-9)


def test_two_places_that_are_fullest_and_alike_are_emptied_too() -> None:
    """Whatever leaves one of them stays on the other, which keeps its load."""
    rng = random.Random(3)
    for _ in range(40):
        places, each = rng.randint(6, 12), rng.randint(3, 6)
        load = [float(rng.randint(0, 3)) for _ in range(places * each)]
        homes = place_copies(load, [rng.randint(0, 3) for _ in range(places)], rng.randint(each, 6 * each))
        heaviest = max(tokens / len(own) for tokens, own in zip(load, homes, strict=True))
        even = sum(load) / places
        bound = max(even + heaviest * (1 - 1 / places), even * (1 + GAIN))
        assert max(_sums(load, homes, places)) <= bound * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), places=st.integers(1, 6), each=st.integers(1, 4), extra=st.integers(0, 3))
def test_no_copy_would_do_more_good_at_another_expert(data: st.DataObject, places: int, each: int, extra: int) -> None:
    count = places * each
    load = data.draw(st.lists(LOADS, min_size=count, max_size=count))
    copies = copies_of(load, count + places * extra, places)
    assert sum(copies) <= count + places * extra
    for a, b in itertools.permutations(range(count), 2):
        if copies[a] > 1 and copies[b] < places:
            assert load[a] / (copies[a] - 1) >= load[b] / copies[b]


def test_an_expert_that_all_tokens_choose_is_copied_to_every_place() -> None:
    load = [4.0, 0.0, 0.0, 0.0]
    assert busiest([load], (even_homes(4, 2),), 2) == 2.0
    homes = place_copies(load, [0, 0], 1)
    assert homes[0] == (0, 1)
    assert busiest([load], (homes,), 2) == 1.0
    assert [len(own) for own in place_copies(load, [0, 0], 9)] == [2, 1, 1, 1]


def test_nobody_measured_anything_yet() -> None:
    assert sorted(place_copies([0.0] * 6, [0, 0, 1], 2)) == sorted(even_homes(6, 3))


def test_copies_are_taken_where_single_experts_are_even_already() -> None:
    """[4] and [2, 1, 1] are as even as can be on the whole, but not in each step."""
    homes = place_copies([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0, 0], 1)
    assert homes[:2] == ((0, 1), (0, 1))
    assert place_loads([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], homes, 2) == [1.0, 1.0]


LIMITED = [
    # experts, groups, places, most, extra, nodes
    pytest.param(16, 4, 4, 2, 4, [0, 0, 0, 0], id="a rank has a group"),
    pytest.param(16, 8, 4, 1, 3, [0, 0, 1, 1], id="a rank has two"),
    pytest.param(16, 8, 4, 3, 4, [0, 1, 0, 1], id="and room for two more"),
    pytest.param(16, 2, 4, 1, 1, [0, 0, 1, 1], id="a node has a group"),
    pytest.param(16, 2, 4, 1, 2, [0, 1, 0, 1], id="ranks of a node are apart"),
    pytest.param(24, 4, 8, 2, 2, [0, 0, 0, 0, 1, 1, 1, 1], id="a node has two"),
    pytest.param(24, 2, 6, 1, 9, [0, 0, 0, 0, 1, 1], id="room for all of a group, nodes that are not alike"),
]


def _reached(homes: Homes, places: int, groups: int, most: int, seed: int) -> int:
    """The ranks that any of many tokens goes to, at most, as the dispatch of rank 0 sends them."""
    drawn = torch.Generator().manual_seed(seed)
    x, centroids = torch.randn(500, 8, generator=drawn), torch.randn(len(homes), 8, generator=drawn)
    chosen = route(x, centroids, min(most * len(homes) // groups, 6), groups=groups, most=most).experts
    ways = Dispatcher(Group(tuple(range(places)), 0), homes, torch.device("cpu")).ways
    return max(len(set(row)) for row in ways.hosts[ways.slots_of(chosen).long()].tolist())


@pytest.mark.parametrize(("experts", "groups", "places", "most", "extra", "nodes"), LIMITED)
def test_a_token_reaches_no_more_ranks_than_without_copies(
    experts: int, groups: int, places: int, most: int, extra: int, nodes: list[int]
) -> None:
    """Limited to groups, of which a rank has some, or which some ranks share: those of one node, where that goes."""
    bound = most * max(1, places // groups)
    freely = 0
    for seed in range(20):
        rng = random.Random(seed)
        load = [rng.lognormvariate(0, 1) for _ in range(experts)]
        assert _reached(even_homes(experts, places), places, groups, most, seed) <= bound
        homes = place_copies(load, nodes, extra, groups)
        assert _reached(homes, places, groups, most, seed) <= bound
        assert any(len(own) > 1 for own in homes)
        assert max(sum(p in own for own in homes) for p in range(places)) <= experts // places + extra
        freely = max(freely, _reached(place_copies(load, nodes, extra), places, groups, most, seed))
        if places > groups and all(nodes.count(n) % (places // groups) == 0 for n in nodes):
            size = experts // groups
            on = [{nodes[p] for own in homes[g * size : (g + 1) * size] for p in own} for g in range(groups)]
            assert all(len(of_group) == 1 for of_group in on)
    assert freely > bound, "copies anywhere would have kept to it as well"


@settings(max_examples=40, deadline=None)
@given(data=st.data(), width=st.integers(1, 3), teams=st.integers(1, 3), extra=st.integers(0, 3))
def test_ranks_that_share_a_group_are_even(data: st.DataObject, width: int, teams: int, extra: int) -> None:
    """As even as a group's own load can be among its ranks: within the greedy bound of it."""
    each = data.draw(st.integers(1, 3))
    places, size = width * teams, width * each
    load = data.draw(st.lists(LOADS, min_size=size * teams, max_size=size * teams))
    nodes = [p // (width * data.draw(st.integers(1, 2))) for p in range(places)]
    homes = place_copies(load, nodes, extra, teams) if width > 1 else place_copies(load, nodes, extra * size, teams)
    sums = _sums(load, homes, places)
    for group in range(teams if width > 1 else 0):
        own, where = load[group * size : (group + 1) * size], homes[group * size : (group + 1) * size]
        assert len({p for h in where for p in h}) <= width
        heaviest = max(tokens / len(h) for tokens, h in zip(own, where, strict=True))
        bound = max(sum(own) / width + heaviest * (1 - 1 / width), sum(own) / width * (1 + GAIN))
        assert max(sums[p] for h in where for p in h) <= bound * (1 + 1e-9)


def _limited(groups: int, ranks: int, most: int, **more: object) -> Recipe:
    changes = {"moe__experts": 24, "balance__device_groups": groups, "route__max_devices": most, "train__batch": ranks}
    return Recipe.model_validate(small_recipe(**changes, parallel__ranks=ranks, **more))


@pytest.mark.parametrize(
    ("groups", "ranks", "most", "bound"),
    [
        (4, 4, 2, 4),
        (4, 4, 4, 0),
        (8, 4, 2, 8),
        (8, 4, 4, 0),
        (2, 6, 1, 2),
        (4, 1, 1, 0),
        (3, 2, 1, 3),
        (3, 2, 3, 0),
        (4, 6, 1, 4),
    ],
)
def test_copies_are_bound_where_a_token_is(groups: int, ranks: int, most: int, bound: int) -> None:
    """Where the limit of groups leaves ranks out, and not where a token may go to all of them."""
    assert _limited(groups, ranks, most).bound_groups == bound
    assert _limited(groups, ranks, 0).bound_groups == 0
