"""Plans copies of busy experts, for inference: which of them there are, and where. Pure arithmetic.

A layer's slots are filled greedily, the busiest copies first, and then improved step by step: a copy on the fullest
place goes elsewhere, changes places with another one, is dropped, or gets company on another place. Where no step
helps, the fullest place has at most one copy's load more than any other one, which is the greedy bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.cluster.expert_placement import GAIN, pack, place
from shoal.workers.expert_plan import Homes

Where = list[frozenset[int]]
"""The places of each expert."""

Step = tuple[tuple[int, frozenset[int]], ...]
"""Experts and their new places."""


def place_copies(load: Sequence[float], nodes: Sequence[int], extra: int, groups: int = 0) -> Homes:
    """The places of each expert where each place hosts up to ``extra`` more than its share: copies of busy ones.

    nodes: the node of each place. An expert that nobody chose has no copies, and the fullest place is not fuller than
    it would be without any, but for GAIN. groups: tokens are limited to some of so many equal runs of experts, and
    copies stand with their group, so that a token reaches no more places than it would without them. Several places
    that share a group share its copies; where a place has whole groups, all of a group is copied to it, and its tokens
    take turns among the places alike. Groups divide by the places then, or places by the groups.
    """
    places = len(nodes)
    size = len(load) // groups if groups else 1
    if not groups or groups % places == 0:
        runs = [sum(load[i : i + size]) for i in range(0, len(load), size)]
        homes = _spread(runs, nodes, len(runs) // places + extra // size)
        return tuple(homes[expert // size] for expert in range(len(load)))
    found: list[tuple[int, ...]] = []
    room = len(load) // places + extra
    for group, team in enumerate(_teams(load, nodes, groups)):
        own = load[group * size : (group + 1) * size]
        homes = _spread(own, [nodes[p] for p in team], room)
        found += (tuple(sorted(team[p] for p in each)) for each in homes)
    return tuple(found)


def _teams(load: Sequence[float], nodes: Sequence[int], groups: int) -> list[list[int]]:
    """The places of each group: neighbours, on one node where it can be, so that nodes are even."""
    size, width = len(load) // groups, len(nodes) // groups
    numbers = list(dict.fromkeys(nodes))
    order = sorted(range(len(nodes)), key=lambda p: (numbers.index(nodes[p]), p))
    teams = [order[i : i + width] for i in range(0, len(order), width)]
    on = [[team for team in teams if nodes[team[0]] == number] for number in numbers]
    runs = [sum(load[i : i + size]) for i in range(0, len(load), size)]
    return [on[node].pop(0) for node in pack(runs, [len(each) for each in on])]


def copies_of(load: Sequence[float], slots: int, most: int) -> list[int]:
    """How many copies of each expert fill ``slots``, ``most`` of one: the next one goes where copies are busiest."""
    copies = [1] * len(load)
    for _ in range(slots - len(load)):
        able = [e for e in range(len(load)) if copies[e] < most and load[e]]
        if not able:
            break
        copies[max(able, key=lambda e: (load[e] / copies[e], -e))] += 1
    return copies


def _spread(load: Sequence[float], nodes: Sequence[int], room: int) -> Homes:
    """The places of each expert, up to ``room`` experts on each; no place hosts one twice."""
    even = sum(load) / len(nodes) * (1 + GAIN)
    best = _improved(load, _greedy(load, nodes, room), nodes, room, even)
    if max(_levels(load, best, nodes)) > even:
        packed = _improved(load, [frozenset(own) for own in place(load, nodes)], nodes, room, even)
        best = min(best, packed, key=lambda where: max(even, *_levels(load, where, nodes)))
    # copies in slots that were left are lighter, and may be evened further
    best = _improved(load, _filled(load, best, nodes, room, even), nodes, room, even)
    return tuple(tuple(sorted(own)) for own in best)


def _greedy(load: Sequence[float], nodes: Sequence[int], room: int) -> Where:
    """Copies lie on nodes that have least of the expert, then where least is to do, the busiest first."""
    places = range(len(nodes))
    copies = copies_of(load, room * len(nodes), len(nodes))
    share = [tokens / count for tokens, count in zip(load, copies, strict=True)]
    sums, hosted, where = [0.0] * len(nodes), [0] * len(nodes), [list[int]() for _ in load]
    items = sorted((e for e, count in enumerate(copies) for _ in range(count)), key=lambda e: (-share[e], e))
    # first copies find room for certain; a further one that finds none on another place is left out
    for expert in items:
        there = [nodes[p] for p in where[expert]]
        if free := [p for p in places if hosted[p] < room and p not in where[expert]]:
            best = min(free, key=lambda p: (there.count(nodes[p]), sums[p], hosted[p], p))
            where[expert].append(best)
            sums[best] += share[expert]
            hosted[best] += 1
    return [frozenset(own) for own in where]


def _levels(load: Sequence[float], where: Where, places: Sequence[int]) -> list[float]:
    """The load of each place."""
    sums = [0.0] * len(places)
    for tokens, own in zip(load, where, strict=True):
        for each in own:
            sums[each] += tokens / len(own)
    return sums


def _improved(load: Sequence[float], where: Where, nodes: Sequence[int], room: int, even: float) -> Where:
    """Takes the step that helps most, again and again, until no place has more than ``even``: the one after which the
    fullest places are least full."""
    where = list(where)
    while True:
        levels = _levels(load, where, nodes)
        full = max(range(len(nodes)), key=lambda p: levels[p])
        if levels[full] <= even:
            return where
        best, found, little = sorted(levels, reverse=True), None, levels[full] * 1e-9
        for step in _steps(load, where, full, nodes, room):
            after = _after(load, where, levels, step)
            if max(after.values()) <= levels[full] + little:  # some of them are as they were
                new = sorted((after.get(p, level) for p, level in enumerate(levels)), reverse=True)
                if _lower(new, best, little):
                    best, found = new, step
        if found is None:
            return where
        for expert, homes in found:
            where[expert] = homes


def _lower(new: list[float], old: list[float], little: float) -> bool:
    """Whether the first of the levels that differ is lower."""
    return next((a < b for a, b in zip(new, old, strict=True) if abs(a - b) > little), False)


def _steps(load: Sequence[float], where: Where, full: int, nodes: Sequence[int], room: int) -> Iterator[Step]:
    """What may take load from the fullest place."""
    places = set(range(len(nodes)))
    hosted = [[e for e, own in enumerate(where) if p in own] for p in range(len(nodes))]
    for expert in hosted[full]:
        rest = where[expert] - {full}
        if not load[expert]:
            continue
        if rest:
            yield ((expert, rest),)
        for other in sorted(places - where[expert]):
            if len(hosted[other]) < room:
                yield ((expert, rest | {other}),)
                yield ((expert, where[expert] | {other}),)
            for back in hosted[other]:
                if full not in where[back] and load[back] / len(where[back]) < load[expert] / len(where[expert]):
                    yield (expert, rest | {other}), (back, where[back] - {other} | {full})


def _after(load: Sequence[float], where: Where, levels: list[float], step: Step) -> dict[int, float]:
    """The loads of places that a step changes."""
    after: dict[int, float] = {}
    for expert, homes in step:
        for sign, own in ((-1.0, where[expert]), (1.0, homes)):
            for each in own:
                after[each] = after.get(each, levels[each]) + sign * load[expert] / len(own)
    return after


def _filled(load: Sequence[float], where: Where, nodes: Sequence[int], room: int, even: float) -> Where:
    """With further copies of the busiest experts in slots that are left, where no place gets fuller than the fullest:
    loads of single steps vary, and copies even them."""
    where, places = list(where), range(len(nodes))
    while True:
        levels = _levels(load, where, nodes)
        free = {p for p in places if sum(p in own for own in where) < room}
        able = [
            (-load[expert] / len(own), levels[each], expert, each)
            for expert, own in enumerate(where)
            for each in (free - own if load[expert] else ())
            if levels[each] + load[expert] / (1 + len(own)) <= max(even, *levels)
        ]
        if not able:
            return where
        *_, expert, each = min(able)
        where[expert] |= {each}
