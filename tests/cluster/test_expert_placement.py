"""Plans of experts over ranks: never worse than the greedy bound, close to the best there is, and possible."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.expert_placement import GAIN, better_plan, pack, place, renamed
from shoal.workers.expert_plan import even_homes, place_loads

LOADS = st.floats(0, 8, allow_nan=False)


def _most(loads: list[float], where: list[int], bins: int) -> float:
    return max(sum(x for x, b in zip(loads, where, strict=True) if b == each) for each in range(bins))


def _best(loads: list[float], bins: int) -> float:
    """The least possible load of the fullest bin, of all ways to fill them equally."""
    each = len(loads) // bins
    ways = itertools.permutations([b for b in range(bins) for _ in range(each)])
    return min(_most(loads, list(way), bins) for way in set(ways))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bins=st.integers(1, 16), each=st.integers(1, 8))
def test_packing_is_within_the_greedy_bound(data: st.DataObject, bins: int, each: int) -> None:
    """Graham's: the mean, and all but 1/m of the heaviest item."""
    loads = data.draw(st.lists(LOADS, min_size=bins * each, max_size=bins * each))
    where = pack(loads, [each] * bins)
    assert sorted(where) == [b for b in range(bins) for _ in range(each)]
    bound = sum(loads) / bins + max(loads) * (1 - 1 / bins)
    assert _most(loads, where, bins) <= bound * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(2, 2), (2, 3), (3, 2), (2, 4)]))
def test_packing_is_close_to_the_best_there_is(data: st.DataObject, shape: tuple[int, int]) -> None:
    bins, each = shape
    loads = data.draw(st.lists(LOADS, min_size=bins * each, max_size=bins * each))
    ours, best = _most(loads, pack(loads, [each] * bins), bins), _best(loads, bins)
    assert best <= ours * (1 + 1e-9)
    assert ours <= best * 4 / 3 * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), nodes=st.sampled_from([[0, 0], [0, 0, 1, 1], [0, 1, 1, 1], [2, 0, 2, 0, 1, 1]]))
def test_nodes_are_even_before_their_places(data: st.DataObject, nodes: list[int]) -> None:
    together = data.draw(st.sampled_from([1, 2]))
    each = data.draw(st.integers(1, 3))
    count = len(nodes) * each * together
    load = data.draw(st.lists(LOADS, min_size=count, max_size=count))
    homes = place(load, nodes, together)
    counts = [sum(own == (p,) for own in homes) for p in range(len(nodes))]
    assert counts == [each * together] * len(nodes)
    assert all(homes[e] == homes[e - e % together] for e in range(count))
    runs = [sum(load[i : i + together]) for i in range(0, count, together)]
    sums = [sum(x for x, own in zip(load, homes, strict=True) if nodes[own[0]] == n) for n in set(nodes)]
    sizes = [nodes.count(n) for n in set(nodes)]
    if len(set(sizes)) == 1:
        bound = sum(load) / len(sizes) + max(runs) * (1 - 1 / len(sizes))
        assert max(sums) <= bound * (1 + 1e-9)
    now = place(load[::-1], nodes, together)
    same = renamed(homes, now, nodes)
    kept = lambda plan: sum(a == b for a, b in zip(plan, now, strict=True))  # noqa: E731
    assert sorted(place_loads(load, same, len(nodes))) == pytest.approx(sorted(place_loads(load, homes, len(nodes))))
    assert all(nodes[a[0]] == nodes[b[0]] for a, b in zip(same, homes, strict=True))
    if len(nodes) == 2:
        assert kept(same) >= kept(homes)


def test_experts_move_only_where_it_pays() -> None:
    now = (even_homes(4, 2),) * 3
    load = [[2.0, 1.5, 0.3, 0.2], [1.0, 1.0 + GAIN / 2, 1.0 - GAIN / 2, 1.0], [1.5, 0.5, 1.5, 0.5]]
    plan = better_plan(load, now, [0, 0], lambda row: place(row, [0, 0]))
    assert plan[1:] == now[1:]
    assert plan[0] != now[0]
    assert max(place_loads(load[0], plan[0], 2)) == pytest.approx(2.2 / 2)
    assert sum(a != b for a, b in zip(plan[0], now[0], strict=True)) == 2
