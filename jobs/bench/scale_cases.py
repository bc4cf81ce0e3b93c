"""Cases of ``shoal bench scale``, one thing on so many ranks each, and series of them, whose times lie on one curve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shoal.jobs.bench.dispatch_ranks import Sizes
from shoal.jobs.bench.scale_model import Curve, Plan
from shoal.jobs.bench.sequence_rank import Case as Layer

if TYPE_CHECKING:
    from shoal.workers.config import Recipe

Facts = Mapping[str, Any]
"""Of a measured case: ``ms`` of the slowest rank, ``peak_bytes``, ``peak_flops`` of a device, what its part adds."""


@dataclass(frozen=True)
class Training:
    """A recipe with settings, and how many steps are trained; ``corpus`` is a folder."""

    recipe: str
    sets: tuple[str, ...]
    steps: int
    corpus: str = ""

    def load(self) -> Recipe:
        """The recipe. Raises InvalidInput."""
        return recipe_of(self.recipe, self.sets)


@dataclass(frozen=True)
class Serving:
    """A server of an untrained model; placement: as of ``shoal serve``, empty for colocated ranks."""

    recipe: str
    sets: tuple[str, ...]
    mix: str
    seconds: float
    placement: str = ""

    def load(self) -> Recipe:
        """The recipe. Raises InvalidInput."""
        alone = ("parallel.ranks=1", "parallel.expert=0", "train.batch=1", "train.accumulate=1")
        return recipe_of(self.recipe, (*self.sets, *alone))


@lru_cache(maxsize=64)
def recipe_of(recipe: str, sets: tuple[str, ...]) -> Recipe:
    """A recipe with settings, read once. Raises InvalidInput."""
    from shoal.jobs.recipe import load_recipe

    return load_recipe(recipe, sets)


@dataclass(frozen=True)
class Case:
    """One thing to measure on so many ranks: ``tokens`` of a layer or a step, over all of them."""

    name: str
    ranks: int
    tokens: int
    sizes: Sizes | Layer | Training | Serving

    def __str__(self) -> str:
        what = "requests" if isinstance(self.sizes, Serving) else "tokens"
        return f"{self.name}, {self.tokens} {what}"

    @property
    def settings(self) -> Facts:
        """For results: the recipe of a training or a server, and what is set over it."""
        sizes = self.sizes
        return {"recipe": sizes.recipe, "sets": list(sizes.sets)} if isinstance(sizes, Training | Serving) else {}


@dataclass(frozen=True)
class Line:
    """Cases that differ in ranks. mode: ``weak`` or ``strong``. targets: by ranks, the least efficiency asked for.
    utilisation: the least share of the peak's FLOPs asked for."""

    what: str
    mode: str
    case: Callable[[int], Case]
    targets: Mapping[int, float] = field(default_factory=dict)
    least: int = 1
    ranks: tuple[int, ...] = ()
    utilisation: float | None = None

    def tried(self, ranks: int) -> bool:
        """Whether it is measured on so many."""
        return ranks >= self.least and (not self.ranks or ranks in self.ranks)

    @property
    def late(self) -> bool:
        """Whether its cases come after all others: what may not fit, or takes long."""
        return self.least > 1


class Series(ABC):
    """Lines whose times on one rank lie on one curve, and whose predictions have the same two fitted constants."""

    part: str
    powers: tuple[int, int] = (1, 2)
    flat = False
    """Whether a token costs as much whatever their number, so that a rank's share was itself measured on one rank."""

    @abstractmethod
    def lines(self) -> list[Line]:
        """Weak and strong scaling, what matters most first."""

    def extra(self) -> list[Case]:
        """Further cases on one rank, for the curve."""
        return []

    def on_curve(self, facts: Facts) -> float:
        """Seconds of a case on one rank that are computed anew for each token."""
        return float(facts["ms"]) / 1e3

    @abstractmethod
    def flops(self, case: Case) -> float:
        """Of all ranks together."""

    @abstractmethod
    def plan(self, case: Case, curve: Curve, one: Facts) -> Plan:
        """What a rank does. curve: of one rank. one: what was measured on one rank, of any of its cases."""

    def ideal(self, case: Case, mode: str, curve: Curve, one: Facts) -> float:
        """Seconds of a rank's share of the work, as fast as one rank alone does it."""
        return curve(case.tokens) / case.ranks
