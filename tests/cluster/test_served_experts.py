"""A service's experts follow the load that its users make: when that is worth it, and not by chance. That answers of
real ranks stay the same is tested in test_engine_copies.py."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_recipe

from shoal.cluster.expert_placement import busiest
from shoal.cluster.served_experts import ENOUGH, WORTH, ServedExperts
from shoal.workers.config import Recipe
from shoal.workers.expert_plan import EMPTY, slots_of

BUSY = [[9.0, 2.0, 1.0, 1.0, 0.0, 0.0, 3.0, 2.0], [0.0, 0.0, 1.0, 9.0, 1.0, 1.0, 0.0, 0.0]]
"""Two layers of eight experts, as training measured them."""


def _served(**changes: Any) -> ServedExperts:
    tables = small_recipe(**({"parallel__ranks": 2, "serve__expert_copies": 1} | changes))
    return ServedExperts(Recipe.model_validate(tables))


def _totals(row: list[int]) -> list[list[int]]:
    """Choices so far, in thousands: of a layer, and of one that is its mirror."""
    return [[count * ENOUGH for count in each] for each in (row, row[::-1])]


EARLY = [20, 2, 2, 2, 2, 2, 2, 2]


def test_copies_follow_the_load() -> None:
    served = _served()
    assert all(len(own) == 1 for homes in served.first(["a", "a"], None) for own in homes), "nobody is known to be busy"
    assert served.rank_load == 0.0 and served.better() is None
    served.count(_totals(EARLY))
    before = served.rank_load
    assert before == busiest(_totals(EARLY), served.plan, 2) > 1.5
    plan = served.better()
    assert plan is not None and plan[0][0] == plan[1][7] == (0, 1)
    text = served.took(plan)
    assert f"the busiest rank has {served.rank_load:.2f} of a fair share, not {before:.2f}" in text
    assert served.rank_load < before - WORTH
    assert served.better() is None, "nothing has changed since"

    # now all of one place's own experts are busy
    late = [[20 * ENOUGH if own == (0,) else ENOUGH for own in homes] for homes in plan]
    totals = _totals(EARLY)
    for _ in range(2):
        totals = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(totals, late, strict=True)]
        served.count(totals)
        before = served.rank_load
        if later := served.better():
            assert later != plan
            served.took(later)
            assert served.rank_load < before - WORTH
    assert served.rebalances >= 2
    assert busiest(late, served.plan, 2) < busiest(late, plan, 2) - 5 * WORTH


def test_new_ranks_begin_with_the_load_that_was_measured() -> None:
    served = _served()
    trained = served.first(["a", "a"], BUSY)
    served.count(_totals(EARLY))
    plan = served.better()
    assert plan is not None
    served.took(plan)
    again = served.first(["a", "a"], BUSY)
    assert again != trained
    assert busiest(_totals(EARLY), again, 2) == busiest(_totals(EARLY), plan, 2)
    assert served.rebalances == 0, "of these ranks"
    load = [list(row) for row in served.load]
    served.count([[8 * ENOUGH] + [0] * 7] * 2)  # their totals begin at 0
    assert served.load == [[row[0] / 2 + 8 * ENOUGH, *(x / 2 for x in row[1:])] for row in load]


def test_few_tokens_say_nothing() -> None:
    served = _served()
    trained = served.first(["a", "a"], BUSY)
    served.count([[8 * ENOUGH - 1] + [0] * 7] * 2)
    assert served.better() is None and served.rank_load == 0.0
    assert served.first(["a", "a"], BUSY) == trained


def test_few_tokens_wait_for_others_and_nothing_is_forgotten_meanwhile() -> None:
    """As at night, or where somebody looks every second."""
    served = _served()
    served.first(["a", "a"], None)
    totals = [[0] * 8, [0] * 8]
    for _ in range(8 * ENOUGH // 100):
        assert not served.load
        totals = [[row[0] + 93, *(x + 1 for x in row[1:])] for row in totals]
        served.count(totals)
    assert served.load == totals and served.rank_load > 1.5 and served.better() is not None
    before = served.rank_load
    for more in (0, 5):
        for _ in range(10):
            totals = [[row[0], row[1] + more, *row[2:]] for row in totals]
            served.count(totals)
        assert served.load[0][0] == 93 * 8 * ENOUGH // 100 and served.rank_load == before


def test_chance_moves_nothing() -> None:
    """Tokens that choose evenly, or as those did which a plan is for: each time some experts have more by chance."""
    rng = random.Random(7)
    for weights in ([1.0] * 64, [rng.lognormvariate(0, 1) for _ in range(64)]):
        served = _served(moe__experts=64, balance__device_groups=1, parallel__ranks=4, train__batch=4)
        totals = [[0] * 64, [0] * 64]
        served.first(["a"] * 4, [weights] * 2)
        for _ in range(20):
            for row in totals:
                for expert in rng.choices(range(64), weights, k=64 * ENOUGH):
                    row[expert] += 1
            served.count([list(row) for row in totals])
            assert served.better() is None
            assert served.rank_load < 1.05


@settings(max_examples=100, deadline=None)
@given(data=st.data(), places=st.integers(1, 4), experts=st.integers(1, 8), extra=st.integers(0, 3))
def test_experts_that_stay_keep_their_slots(data: st.DataObject, places: int, experts: int, extra: int) -> None:
    own = st.sets(st.integers(0, places - 1), min_size=1).map(lambda homes: tuple(sorted(homes)))
    first, second = (data.draw(st.lists(own, min_size=experts, max_size=experts)) for _ in range(2))
    hosted = [[[e for e, homes in enumerate(plan) if p in homes] for p in range(places)] for plan in (first, second)]
    rooms = [max(len(a), len(b)) + extra for a, b in zip(*hosted, strict=True)]
    before = slots_of(first, places, rooms)
    after = slots_of(second, places, rooms, before)
    assert slots_of(first, places) == tuple(map(tuple, hosted[0]))
    for slots, experts_of in ((before, hosted[0]), (after, hosted[1])):
        assert [len(row) for row in slots] == rooms
        assert [sorted(e for e in row if e != EMPTY) for row in slots] == experts_of
    for old, new, staying in zip(before, after, hosted[1], strict=True):
        assert all(new[i] == e for i, e in enumerate(old) if e in staying)
    rooms[0] = len(hosted[1][0]) - 1
    if rooms[0] >= 0:
        with pytest.raises(ValueError, match=f"place 0 has {rooms[0]} slots, too few"):
            slots_of(second, places, rooms)
