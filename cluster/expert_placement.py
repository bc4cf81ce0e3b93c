"""Plans which expert rank hosts which expert from measured load. Pure arithmetic; ``workers`` carries plans out.

A plan is made layer by layer. Experts are packed into places greedily, the busiest first, then improved by swaps until
none helps. With several nodes they are packed into nodes first and within each node then, so that nodes are even too.
Why the outcome is never worse than the greedy bound: where no swap helps, the fullest place has at most the heaviest
item more than any other one (two places of as many items differ in some pair, which would be swapped).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from shoal.workers.expert_plan import Homes, Plan, place_loads

GAIN = 0.02
"""A layer's experts move if that takes so much, in fair shares, from its busiest place."""


def pack(loads: Sequence[float], rooms: Sequence[int]) -> list[int]:
    """The bin of each item, as many in each as it has room for: even loads, as multiples of the bins' rooms.

    rooms: their sum is the number of items, as long as these are.
    """
    bins: list[list[int]] = [[] for _ in rooms]
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        free = [b for b, room in enumerate(rooms) if len(bins[b]) < room]
        bins[min(free, key=lambda b: (sum(loads[i] for i in bins[b]) / rooms[b], b))].append(item)
    while _swap(loads, rooms, bins):
        pass
    where = {item: b for b, items in enumerate(bins) for item in items}
    return [where[item] for item in range(len(loads))]


def _swap(loads: Sequence[float], rooms: Sequence[int], bins: list[list[int]]) -> bool:
    """Swaps the two items that take most from the fullest bin without making another as full; False if none do."""
    levels = [sum(loads[i] for i in items) / room if room else 0.0 for items, room in zip(bins, rooms, strict=True)]
    full = max(range(len(bins)), key=lambda b: levels[b])
    best, found = levels[full] * (1 - 1e-9), None
    for other in range(len(bins)):
        for i, mine in enumerate(bins[full]):
            for j, theirs in enumerate(bins[other]):
                less = loads[mine] - loads[theirs]
                if less > 0:
                    level = max(levels[full] - less / rooms[full], levels[other] + less / rooms[other])
                    if level < best:
                        best, found = level, (other, i, j)
    if found is None:
        return False
    other, i, j = found
    bins[full][i], bins[other][j] = bins[other][j], bins[full][i]
    return True


def place(load: Sequence[float], nodes: Sequence[int], together: int = 1) -> Homes:
    """The place of each expert, as many to each place.

    nodes: the node of each place. together: experts in runs of this length stay together (a token's limit of groups
    would be worth nothing otherwise); the places divide the runs.
    """
    runs = [sum(load[i : i + together]) for i in range(0, len(load), together)]
    each = len(runs) // len(nodes)
    on = {node: [p for p, n in enumerate(nodes) if n == node] for node in dict.fromkeys(nodes)}
    by_node = pack(runs, [each * len(places) for places in on.values()])
    home = [0] * len(runs)
    for number, places in enumerate(on.values()):
        mine = [run for run, node in enumerate(by_node) if node == number]
        for run, place_ in zip(mine, pack([runs[r] for r in mine], [each] * len(places)), strict=True):
            home[run] = places[place_]
    return tuple((home[expert // together],) for expert in range(len(load)))


def numbered(nodes: Sequence[str]) -> list[int]:
    """Of each place the number of its node, which is that of the node's first place."""
    return [nodes.index(node) for node in nodes]


def renamed(homes: Homes, now: Homes, nodes: Sequence[int]) -> Homes:
    """The same plan with places of a node exchanged, so that few experts have to move."""
    pairs: dict[tuple[int, int], int] = {}
    for own, before in zip(homes, now, strict=True):
        for new, old in itertools.product(own, before):
            if nodes[new] == nodes[old]:
                pairs[new, old] = pairs.get((new, old), 0) + 1
    names: dict[int, int] = {}
    for new_place, old_place in sorted(pairs, key=lambda pair: (-pairs[pair], pair)):
        if new_place not in names and old_place not in names.values():
            names[new_place] = old_place
    for place_ in range(len(nodes)):
        if place_ not in names:
            left = (p for p in range(len(nodes)) if nodes[p] == nodes[place_] and p not in names.values())
            names[place_] = next(left)
    return tuple(tuple(sorted(names[place_] for place_ in own)) for own in homes)


def busiest(load: Sequence[Sequence[float]], plan: Plan, places: int) -> float:
    """Load of the busiest place as a multiple of a fair share, the mean of all layers."""
    return sum(max(place_loads(row, homes, places)) for row, homes in zip(load, plan, strict=True)) / len(plan)


def moved(load: Sequence[Sequence[float]], now: Plan, plan: Plan, places: int) -> str:
    """What a plan changes, in a sentence; "" where that is nothing."""
    count = sum(a != b for layers in zip(now, plan, strict=True) for a, b in zip(*layers, strict=True))
    before, after = (busiest(load, each, places) for each in (now, plan))
    return f"{count} experts moved: the busiest rank has {after:.2f} of a fair share, not {before:.2f}" if count else ""


def better_plan(
    load: Sequence[Sequence[float]], now: Plan, nodes: Sequence[int], planned: Callable[[Sequence[float]], Homes]
) -> Plan:
    """A plan in which the experts of those layers move where it pays. planned: places of a layer's experts by load."""
    plan = []
    for row, homes in zip(load, now, strict=True):
        new = renamed(planned(row), homes, nodes)
        gain = max(place_loads(row, homes, len(nodes))) - max(place_loads(row, new, len(nodes)))
        plan.append(new if gain > GAIN else homes)
    return tuple(plan)
