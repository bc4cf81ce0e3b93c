"""Which expert rank hosts which routed expert, layer by layer: a table that may change while a run goes on.

A *place* is an expert rank's number within its set, from 0; every set of a run hosts its experts alike. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

Homes = tuple[tuple[int, ...], ...]
"""Of one layer: the places of each expert, one of them in training, several where a service keeps copies."""

Plan = tuple[Homes, ...]
"""Of all MoE layers, in order."""


EMPTY = -1
"""What a slot without an expert has in its place."""


def even_homes(experts: int, places: int) -> Homes:
    """Equal runs of experts, in order: where they lie unless something else was planned."""
    return tuple((expert * places // experts,) for expert in range(experts))


def plan_of(values: Sequence[Sequence[Sequence[int]]]) -> Plan:
    """A plan out of the lists that JSON makes of it."""
    return tuple(tuple(tuple(homes) for homes in layer) for layer in values)


def places_of(plan: Plan) -> int:
    """How many places a plan gives experts to."""
    return 1 + max((place for layer in plan for homes in layer for place in homes), default=0)


def slots_of(
    owners: Sequence[Sequence[int]], places: int, rooms: Sequence[int] = (), before: Sequence[Sequence[int]] = ()
) -> tuple[tuple[int, ...], ...]:
    """Of each place the experts in its slots, in order. owners: the places of each expert.

    rooms: how many slots each place has, whatever is in them, ``EMPTY`` in those that are left; none: as many as it has
    experts. before: what was in them; an expert that stays keeps its slot, and others come to those that are free.
    Raises ValueError where a place has more experts than slots.
    """
    hosted = [[expert for expert, own in enumerate(owners) if place in own] for place in range(places)]
    if not rooms:
        return tuple(map(tuple, hosted))
    found = []
    for place, (own, room) in enumerate(zip(hosted, rooms, strict=True)):
        if len(own) > room:
            raise ValueError(f"place {place} has {room} slots, too few for experts {own}")
        old = before[place] if before else (EMPTY,) * room
        new = iter([expert for expert in own if expert not in old])
        found.append(tuple(expert if expert in own else next(new, EMPTY) for expert in old))
    return tuple(found)


def place_loads(load: Sequence[float], homes: Homes, places: int) -> list[float]:
    """Of each place the load of its experts, as a multiple of a fair share; copies of an expert share its load."""
    sums, total = [0.0] * places, sum(load)
    for tokens, own in zip(load, homes, strict=True):
        for place in own:
            sums[place] += tokens / len(own)
    return [each * places / total if total else 0.0 for each in sums]
