"""Where a service's experts lie, and what they had to do of late: copies follow the load. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster.expert_copies import place_copies
from shoal.cluster.expert_placement import better_plan, busiest, moved, numbered
from shoal.workers.config import Recipe
from shoal.workers.expert_plan import Homes, Plan
from shoal.workers.placement import Placement

WORTH = 0.05
"""Experts move if the busiest rank is expected to lose so much, in fair shares, the mean of all layers."""
ENOUGH = 1000
"""Choices that an expert must have had on average since the last time that they were counted, before they are: chance
alone then moves its load by 3%."""
KEPT = 0.5
"""What choices that were counted earlier count for beside those that come in."""


class ServedExperts:
    """Plans the experts of all ranks of a service, whose copies are those of ``serve.expert_copies``. It outlives the
    ranks: new ones begin with a plan for the load that was measured.

    plan: what the ranks have. load: ``[MoE layers][experts]``, choices of late; none before any were counted.
    rebalances: plans since the ranks began, beside the first. rank_load: of the busiest rank, as a multiple of a fair
    share, the mean of all layers; 0 before anything can be concluded.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        placement = Placement.of(recipe)
        self._ranks = placement.experts[: placement.set_size]
        self._nodes: list[int] = []
        self._told: Sequence[Sequence[int]] = ()
        self.plan: Plan = ()
        self.load: list[list[float]] = []
        self.rebalances, self.rank_load = 0, 0.0

    def first(self, nodes: Sequence[str], trained: Sequence[Sequence[float]] | None) -> Plan:
        """The plan that ranks begin with. nodes: of each rank. trained: load as training measured it, which is taken
        until users' own is known; None: not known, so that experts have no copies yet."""
        self._nodes, self._told, self.rebalances = numbered([nodes[rank] for rank in self._ranks]), (), 0
        model, experts = self.recipe.model, self.recipe.moe.experts
        nothing = [[0.0] * experts] * (model.layers - model.dense_layers)
        self.plan = tuple(self._homes(row) for row in (self.load or trained or nothing))
        self._measure()
        return self.plan

    def count(self, totals: Sequence[Sequence[int]]) -> None:
        """Takes note of the choices of each layer's experts, ``[MoE layers][experts]`` since the ranks began. Few of
        them wait for others to come, and what is known stays meanwhile."""
        new = chosen_since(self._told, totals, ENOUGH)
        if not new:
            return
        old = self.load or [[0.0] * len(row) for row in totals]
        self.load = [[KEPT * a + b for a, b in zip(*rows, strict=True)] for rows in zip(old, new, strict=True)]
        self._told = totals
        self._measure()

    def better(self) -> Plan | None:
        """A plan that is worth its moves by now, if there is one."""
        if not self.load:
            return None
        plan = better_plan(self.load, self.plan, self._nodes, self._homes)
        return plan if self.rank_load - busiest(self.load, plan, len(self._ranks)) > WORTH else None

    def took(self, plan: Plan) -> str:
        """The ranks have it now. Returns what that changed, in a sentence."""
        text = moved(self.load, self.plan, plan, len(self._ranks))
        self.plan, self.rebalances = plan, self.rebalances + 1
        self._measure()
        return text

    def _homes(self, row: Sequence[float]) -> Homes:
        return place_copies(row, self._nodes, self.recipe.serve.expert_copies, self.recipe.bound_groups)

    def _measure(self) -> None:
        self.rank_load = busiest(self.load, self.plan, len(self._ranks)) if self.load else 0.0


def chosen_since(told: Sequence[Sequence[int]], totals: Sequence[Sequence[int]], enough: int) -> list[list[int]]:
    """How often each layer's experts were chosen, ``[MoE layers][experts]``, since totals were what was told, or since
    they began where nothing was; no layers while an expert has fewer than ``enough`` in the mean."""
    told = told or [[0] * len(row) for row in totals]
    if not totals or sum(totals[0]) - sum(told[0]) < enough * max(1, len(totals[0])):
        return []
    return [[now - was for now, was in zip(*rows, strict=True)] for rows in zip(totals, told, strict=True)]
