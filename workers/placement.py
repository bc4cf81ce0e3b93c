"""Which rank hosts what: pure arithmetic on a recipe, shared by the driver and the ranks. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from shoal.workers.expert_plan import Homes

if TYPE_CHECKING:
    from shoal.workers.config import Recipe


def segments_of(tokens: int, ranks: int, multiple: int) -> list[tuple[int, int]]:
    """Where the 2 · ranks segments of ranks that share tokens begin and end: at multiples of ``multiple``, and as long
    as each other; where tokens do not divide they differ by one such."""
    count = 2 * ranks
    edges = [min(tokens, round(i * tokens / count / multiple) * multiple) for i in range(count)] + [tokens]
    return list(pairwise(edges))


@dataclass(frozen=True)
class Placement:
    """Attention and expert shards over ``ranks`` ranks.

    attention, experts: the ranks that host such a shard. set_size: expert ranks that together hold one whole set of
    experts; colocated ranks may hold several sets, a disaggregated placement holds one. context: attention ranks that
    share the tokens of one packed batch.
    """

    ranks: int
    attention: tuple[int, ...]
    experts: tuple[int, ...]
    set_size: int
    context: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Placement:
        """The placement that a recipe asks for."""
        p = recipe.parallel
        if p.split:
            n, m = p.split
            return cls(n + m, tuple(range(n)), tuple(range(n, n + m)), m, p.context)
        everyone = tuple(range(p.ranks))
        return cls(p.ranks, everyone, everyone if recipe.moe.experts else (), p.expert_ranks, p.context)

    @property
    def apart(self) -> bool:
        """Whether attention and experts have ranks of their own."""
        return bool(self.experts) and set(self.attention) != set(self.experts)

    def dispatch_groups(self) -> list[tuple[int, ...]]:
        """Ranks that exchange tokens with one another; every rank is in one group."""
        if set(self.attention) != set(self.experts):
            return [tuple(range(self.ranks))]
        return [tuple(range(i, i + self.set_size)) for i in range(0, self.ranks, self.set_size)]

    def context_groups(self) -> list[tuple[int, ...]]:
        """Attention ranks that share the tokens of one packed batch; every attention rank is in one group."""
        return [self.attention[i : i + self.context] for i in range(0, len(self.attention), self.context)]

    def replica_groups(self) -> list[tuple[int, ...]]:
        """Expert ranks that hold the same experts, one group for each place in a set."""
        return [self.experts[i :: self.set_size] for i in range(self.set_size)] if self.experts else []

    def owners(self, homes: Homes, shared: int) -> tuple[tuple[int, ...], ...]:
        """The hosts of each routed and then each dispatched shared expert, as places in the dispatch group.

        homes: of the routed experts, as places in a set; shared ones go round.
        """
        group = self.dispatch_groups()[0]
        hosts = [group.index(r) for r in self.experts[: self.set_size]]
        routed = tuple(tuple(hosts[place] for place in places) for places in homes)
        return routed + tuple((hosts[s % self.set_size],) for s in range(shared))

    def rooms(self, each: int, shared: int) -> tuple[int, ...]:
        """How many experts each place in the dispatch group has slots for: ``each`` routed ones where experts are, and
        the dispatched shared ones that go there."""
        group = self.dispatch_groups()[0]
        hosts = [group.index(r) for r in self.experts[: self.set_size]]
        sent = [hosts[s % self.set_size] for s in range(shared)]
        return tuple(each * (place in hosts) + sent.count(place) for place in range(len(group)))

    def role(self, rank: int) -> str:
        """What a rank hosts, in words."""
        names = [w for w, ranks in (("attention", self.attention), ("experts", self.experts)) if rank in ranks]
        return " + ".join(names)
