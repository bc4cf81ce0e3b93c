"""Weights that several ranks hold alike: which of those ranks keeps the optimizer's state of what (ZeRO, stage 1).

Each tensor, and each of stacked experts, belongs to one rank of its group: gradients are summed there, it updates the
weights, and all others get those. So replicas have the same bits, and a rank's masters and moments come to a share of
what one rank alone would keep, up to the size of the largest tensor. Of weights in shards (``shoal.workers.shards``)
each rank keeps the state of its own part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shoal.workers.mesh import Group, Mesh
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import named_views
from shoal.workers.shards import local

BUCKET = 64 << 20  # bytes that travel at a time
Tensors = Sequence[Tensor] | Mapping[int, Tensor]
"""One for each parameter, by its number."""


@dataclass(frozen=True, order=True)
class Piece:
    """Rows ``start:stop`` of the parameter of that number: all of them, or some of stacked experts."""

    index: int
    start: int
    stop: int

    def of(self, tensors: Tensors) -> Tensor:
        """A view of this piece; tensors: one for each parameter."""
        return tensors[self.index][self.start : self.stop]


@dataclass(frozen=True)
class Bucket:
    """Pieces that travel together. place: of the rank, in the group, whose they are."""

    group: Group
    place: int
    pieces: tuple[Piece, ...]

    @property
    def here(self) -> bool:
        """Whether they are this rank's own."""
        return self.place == self.group.index

    def reduce(self, tensors: Tensors) -> Travelling:
        """Begins to sum the pieces over the group at their rank; elsewhere they are of no use afterwards."""
        parts = [piece.of(tensors) for piece in self.pieces]
        flat = parts[0] if _as_it_is(parts) else torch.cat([x.reshape(-1) for x in parts])
        return self._travelling(self.group.reduce(flat, self.place), flat, parts, self.here)

    def spread(self, tensors: Tensors) -> Travelling:
        """Begins to give the pieces of their rank to all others, in place."""
        parts = [piece.of(tensors) for piece in self.pieces]
        flat = parts[0] if _as_it_is(parts) else parts[0].new_empty(sum(x.numel() for x in parts))
        if self.here and flat is not parts[0]:
            torch.cat([x.reshape(-1) for x in parts], out=flat)
        return self._travelling(self.group.broadcast(flat, self.place), flat, parts, not self.here)

    @staticmethod
    def _travelling(work: dist.Work, flat: Tensor, parts: Sequence[Tensor], wanted: bool) -> Travelling:
        return Travelling(work, flat, parts if wanted and flat is not parts[0] else ())


@dataclass(frozen=True)
class Travelling:
    """A bucket on its way. flat: what travels; parts: what gets it, where that is not what travels."""

    work: dist.Work
    flat: Tensor
    parts: Sequence[Tensor]

    def land(self) -> None:
        """What is launched from now on comes after it."""
        self.work.wait()
        if self.parts:
            for target, part in zip(self.parts, self.flat.split([x.numel() for x in self.parts]), strict=True):
                target.copy_(part.view_as(target))


class Replicas:
    """Parameters that all ranks of a group hold. shares: the pieces of each, by its place in the group."""

    def __init__(self, group: Group, shares: Sequence[Sequence[Piece]]) -> None:
        self.group, self.shares = group, shares

    @property
    def own(self) -> Sequence[Piece]:
        """What this rank keeps the optimizer's state of."""
        return self.shares[self.group.index]

    def buckets(self, tensors: Sequence[Tensor]) -> list[Bucket]:
        """All pieces, a rank's from the last parameter to the first, some at a time; the same ones on every rank.

        tensors: as large as those that are to travel. Nothing where this rank is alone.
        """
        if self.group.size == 1:
            return []
        out = []
        for place, pieces in enumerate(self.shares):
            held: list[Piece] = []
            size = 0
            for piece in sorted(pieces, reverse=True):
                own = piece.of(tensors).nbytes
                if held and max(size, own) >= BUCKET:  # a large one travels alone, without a copy
                    out.append(Bucket(self.group, place, tuple(held)))
                    held, size = [], 0
                held.append(piece)
                size += own
            if held:
                out.append(Bucket(self.group, place, tuple(held)))
        return out


class Shards:
    """Parameters of which each rank holds a part. The backward pass has summed their gradients, and whole weights are
    made of the parts in the next forward pass: nothing is left to do. own: this rank's parts."""

    def __init__(self, own: Sequence[Piece]) -> None:
        self.own = own

    def buckets(self, tensors: Sequence[Tensor]) -> list[Bucket]:
        """None."""
        return []


def replicas_of(model: Transformer, mesh: Mesh) -> list[Replicas | Shards]:
    """Of a model's parameters: those of attention shards, which all attention ranks hold, and experts of one place."""
    stacked = {id(parameter) for _, parameter, part in named_views(model) if part is not None}
    kinds: dict[bool, list[tuple[int, Tensor, bool]]] = {False: [], True: []}
    parts: list[Piece] = []
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if isinstance(parameter, DTensor):
            parts.append(Piece(i, 0, len(local(parameter))))
        else:
            kinds[".moe.experts." in name].append((i, parameter, id(parameter) in stacked))
    groups = ((mesh.attention, kinds[False]), (mesh.replicas, kinds[True]))
    return [Shards(parts), *(Replicas(group, share_out(held, group.size)) for group, held in groups if group)]


def share_out(held: Sequence[tuple[int, Tensor, bool]], ranks: int) -> list[list[Piece]]:
    """Pieces for each of ``ranks`` ranks: the largest first, each to the one that has least by then.

    held: number, weights, and whether they are stacked, so that they may be cut along their first dimension.
    """
    sized: list[tuple[int, Piece]] = []
    for index, weights, stacked in held:
        cuts = min(ranks, len(weights)) if stacked else 1
        edges = [len(weights) * i // cuts for i in range(cuts + 1)]
        row = weights.numel() // len(weights)
        sized += [(row * (b - a), Piece(index, a, b)) for a, b in pairwise(edges)]
    shares: list[list[Piece]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for size, piece in sorted(sized, key=lambda pair: -pair[0]):
        least = load.index(min(load))
        shares[least].append(piece)
        load[least] += size
    return [sorted(share) for share in shares]


def in_order(replicas: Sequence[Replicas | Shards], tensors: Sequence[Tensor]) -> list[Bucket]:
    """Buckets of all groups in the order in which a backward pass completes them, much the same as that of ranks."""
    buckets = [bucket for each in replicas for bucket in each.buckets(tensors)]
    return sorted(buckets, key=lambda bucket: -bucket.pieces[-1].index)


def _as_it_is(parts: Sequence[Tensor]) -> bool:
    """Whether what travels is one tensor, without a copy."""
    return len(parts) == 1 and parts[0].is_contiguous()
