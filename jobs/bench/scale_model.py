"""What a step takes on N ranks, predicted: what one rank computes, and what travels without being hidden.

    t(N) = compute(N) + Σ max(0, bytes / bandwidth - hidden) + per_byte · Σ bytes + per_travel · travels

- *compute*: one rank's measured time, for a rank's part of the work. Where work grows faster than tokens (NSA's
  compressed branch) it is a·T + b·T², through what one rank took for several T (:class:`Curve`).
- *bytes*: by formula, for each thing that travels: rows of the dispatch (:func:`dispatch_travels`), keys of a shared
  sequence (``workers/volume.py``), gradients and weights of replicas (:func:`replica_travels`). Experts are taken to be
  chosen evenly.
- *hidden*: what is computed meanwhile, as ARCHITECTURE.md and ``workers/routed.py`` have it: FLOPs by formula, at the
  pace at which one rank did its FLOPs.
- *bandwidth*: bytes a second that a rank receives while it sends as many. Measured in the same run by the exchange of
  rows alone, or given.
- *per_byte* and *per_travel* alone are fitted, to the measurements on the fewest ranks above one: packing, unpacking
  and adding up what travels, and what each exchange costs whatever its size. Neither is below zero.

Without anything that travels, t(N) is compute(N), and the efficiency 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.kernels.nsa import BlockSizes
from shoal.workers.sequence import zigzag
from shoal.workers.volume import Shape, nsa_volume

NVLINK = 294e9
"""Bytes a second: 265 MB of rows in 0.9 ms by NCCL between two H200s (benchmarks/results/dispatch-2xh200.json,
exchange with one row per rank, 65,536 tokens). Holds where a run measured no exchange of its own."""
ALIGN = 32  # bytes: letters, rows with words behind them, begin there (workers/transfer.py)


@dataclass(frozen=True)
class Travel:
    """Something that a rank receives: bytes, seconds of computing that hide it, and how often that happens."""

    bytes: float
    hidden: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes a second. per_byte, per_travel: seconds, the constants that are fitted."""

    bandwidth: float
    per_byte: float = 0.0
    per_travel: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a rank does in a step: seconds of computing, and what it receives."""

    compute: float
    travels: tuple[Travel, ...] = ()

    @property
    def bytes(self) -> float:
        """All that a rank receives."""
        return sum(t.count * t.bytes for t in self.travels)

    @property
    def exchanges(self) -> int:
        """How many."""
        return sum(t.count for t in self.travels)

    def on_wire(self, bandwidth: float) -> float:
        """Computing, and what travels beyond what hides it, in seconds."""
        return self.compute + sum(t.count * max(0.0, t.bytes / bandwidth - t.hidden) for t in self.travels)

    def seconds(self, link: Link) -> float:
        """The whole prediction."""
        return self.on_wire(link.bandwidth) + link.per_byte * self.bytes + link.per_travel * self.exchanges


def fit(plans: Sequence[Plan], seconds: Sequence[float], bandwidth: float) -> Link:
    """The link whose predictions are closest to what was measured: least squares of relative errors."""
    rows = [
        (plan.bytes / t, plan.exchanges / t, (t - plan.on_wire(bandwidth)) / t)
        for plan, t in zip(plans, seconds, strict=True)
        if plan.exchanges
    ]
    return Link(bandwidth, *_least(rows))


@dataclass(frozen=True)
class Curve:
    """Seconds of one rank for x tokens, a·x^p + b·x^q; ``measured`` ones are told as they were."""

    constants: tuple[float, float]
    powers: tuple[int, int]
    measured: dict[int, float]

    @classmethod
    def through(cls, measured: dict[int, float], powers: tuple[int, int] = (1, 2)) -> Curve:
        """Least squares of relative errors, neither constant negative. Of one point alone, seconds are taken to be
        proportional to x, which has to be one of the powers. Raises ValueError without any."""
        if not measured:
            raise ValueError("no time on one rank was measured")
        rows = [(x ** powers[0] / t, x ** powers[1] / t, 1.0) for x, t in measured.items()]
        if len(rows) == 1:
            (x, t), linear = *measured.items(), powers.index(1)
            return cls((t / x, 0.0) if linear == 0 else (0.0, t / x), powers, measured)
        return cls(_least(rows), powers, measured)

    def __call__(self, x: int) -> float:
        """Seconds."""
        if x in self.measured:
            return self.measured[x]
        (a, b), (p, q) = self.constants, self.powers
        return float(a * x**p + b * x**q)


def _least(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """``(a, b)``, neither negative, for which a·r0 + b·r1 is closest to r2 over all rows."""
    uu, uv, vv, uy, vy = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2)))
    choices = [(0.0, 0.0)]
    if uu > 0:
        choices.append((uy / uu, 0.0))
    if vv > 0:
        choices.append((0.0, vy / vv))
    determinant = uu * vv - uv * uv
    if determinant > 1e-9 * uu * vv:  # else the two cannot be told apart
        choices.append(((uy * vv - vy * uv) / determinant, (vy * uu - uy * uv) / determinant))

    def error(c: tuple[float, float]) -> float:
        return sum((u * c[0] + v * c[1] - y) ** 2 for u, v, y in rows)

    return min((c for c in choices if min(c) >= 0), key=error)


# -- experts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """Sizes of a MoE layer. itemsize: bytes of an element."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    shared: int
    itemsize: int

    def flops(self, tokens: float, experts: float) -> float:
        """Of the forward pass of ``experts`` experts a token; the backward pass has twice as many."""
        return 6.0 * tokens * experts * self.hidden * self.inner


def rows_to_others(tokens: float, ranks: int, experts: int, top_k: int) -> float:
    """Rows that leave a rank, and that reach one: of each token one to every other rank that hosts a chosen expert.

    Of N ranks with E/N experts each, a token that chooses k of E evenly needs a given one with probability
    1 - C(E - E/N, k) / C(E, k).
    """
    if ranks == 1:
        return 0.0
    away = math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k)
    return tokens * (ranks - 1) * (1 - away)


def letter_bytes(layer: Experts, words: int) -> int:
    """Bytes of a row with so many int32 behind it."""
    return -(-(layer.hidden * layer.itemsize + 4 * words) // ALIGN) * ALIGN


def dispatch_travels(
    layer: Experts, tokens: float, ranks: int, per_flop: float, put: bool = False, again: int = 0
) -> list[Travel]:
    """Of a layer's forward and backward pass, ``tokens`` a rank, the experts over ``ranks``.

    per_flop: seconds of computing. put: all rows go to all ranks, into their memory. again: forward passes
    beyond the first. Out go rows with choices and gates (2k words), back come sums; backward the same way, with
    gradients of gates (k words) on the way home. The shared experts' first product, their second one, and their
    gradients hide the first three, the routed experts' weight gradients the last.
    """
    if ranks == 1:
        return []
    rows = tokens * (ranks - 1) if put else rows_to_others(tokens, ranks, layer.experts, layer.top_k)
    plain = layer.hidden * layer.itemsize
    out = plain + 8 * layer.top_k if put else letter_bytes(layer, 2 * layer.top_k)
    home = plain + 4 * layer.top_k if put else letter_bytes(layer, layer.top_k)
    shared = layer.flops(tokens, layer.shared) * per_flop
    routed = layer.flops(tokens, layer.top_k) * per_flop
    return [
        Travel(rows * out, shared * 2 / 3, 1 + again),
        Travel(rows * plain, shared / 3, 1 + again),
        Travel(rows * plain, 2 * shared),
        Travel(rows * home, routed),
    ]


# -- sequences ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """An NSA layer over a shared sequence. forward: FLOPs a token of all branches and φ; selected, phi: of the selected
    branch and of φ."""

    shape: Shape
    sizes: BlockSizes
    forward: float
    selected: float
    phi: float


def sequence_travels(
    layer: Attention, tokens: int, ranks: int, per_flop: float, again: int = 0, sequences: int = 1
) -> list[Travel]:
    """Of a layer's forward and backward pass over ``tokens`` in some sequences of one length, one behind another, for
    the rank that receives most.

    The selected branch's keys travel behind compression and window, forward and backward; their gradients behind those
    of φ. Nothing hides halos and compressed keys.
    """
    if ranks == 1:
        return []
    owned = zigzag(tokens, ranks, layer.sizes.slc_block)
    ends = range(0, tokens + 1, tokens // sequences)
    volumes = [nsa_volume(ends, owned, rank, layer.shape, layer.sizes) for rank in range(ranks)]
    most = max(volumes, key=lambda volume: sum(sum(phase.values()) for phase in volume.values()))
    forward, backward = most["forward"], most["backward"]
    share = tokens / ranks * per_flop
    beside = (layer.forward - layer.selected - layer.phi) * share
    travels = [Travel(forward[plan], 0.0, 1 + again) for plan in ("raw", "cmp", "near")]
    travels += [Travel(backward[plan]) for plan in ("raw", "cmp", "near")]
    travels += [Travel(forward["far"], beside, 1 + again), Travel(forward["far"], 2 * beside)]
    return [*travels, Travel(backward["far"] - forward["far"], 2 * layer.phi * share)]


# -- replicas ----------------------------------------------------------------------------------------------------------


def replica_travels(
    parameters: float, ranks: int, gradient: int, weight: int, bucket: int, backward: float = 0.0, forward: float = 0.0
) -> list[Travel]:
    """Of a step's update of so many parameters that all of ``ranks`` hold; gradient, weight: bytes of an element,
    bucket: of weights that travel at a time.

    backward, forward: seconds of computing that hide the gradients, in the last micro-batch, and the weights, in the
    first one. Buckets are summed at, and sent from, one rank after another, each through all of them as through a pipe:
    so all bytes pass one after another, whatever the number of ranks, though a rank receives only (N - 1) / N of them.
    """
    if ranks == 1 or not parameters:
        return []
    count = max(1, math.ceil(parameters * weight / bucket))
    each = ((gradient, backward), (weight, forward))
    return [Travel(parameters * size / count, hidden / count, count) for size, hidden in each]
