"""Weights that several ranks hold alike: which of those ranks keeps the optimizer's state of what (ZeRO, stage 1).

Each tensor, and each of stacked experts, belongs to one rank of its group: gradients are summed there, it updates the
weights, and all others get those. So replicas have the same bits, and a rank's masters and moments come to a share of
what one rank alone would keep, up to the size of the largest tensor. Of weights in shards (``shoal.workers.shards``)
each rank keeps the state of its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shoal.workers.mesh import Group, Mesh
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import named_views
from shoal.workers.shards import local

BUCKET = 64 << 20  # bytes that travel at a time


@dataclass(frozen=True, order=True)
class Piece:
    """Rows ``start:stop`` of the parameter of that number: all of them, or some of stacked experts."""

    index: int
    start: int
    stop: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """A view of this piece; tensors: one for each parameter."""
        return tensors[self.index][self.start : self.stop]


class Replicas:
    """Parameters that all ranks of a group hold. shares: the pieces of each, by its place in the group."""

    def __init__(self, group: Group, shares: Sequence[Sequence[Piece]]) -> None:
        self.group, self.shares = group, shares

    @property
    def own(self) -> Sequence[Piece]:
        """What this rank keeps the optimizer's state of."""
        return self.shares[self.group.index]

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Sums gradients over the group, in place; each piece at the rank whose it is, elsewhere it stays as it was."""
        for place, bucket in self._buckets(gradients):
            flat = self.group.reduce(_joined(bucket), place)
            if place == self.group.index:
                _copy_apart(flat, bucket)

    @torch.no_grad()
    def spread(self, weights: Sequence[Tensor]) -> None:
        """Gives each piece of its rank to all others, in place."""
        for place, bucket in self._buckets(weights):
            flat = self.group.broadcast(_joined(bucket), place)
            if place != self.group.index:
                _copy_apart(flat, bucket)

    def _buckets(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Pieces, some at a time, with the place of the rank whose they are. Nothing where this rank is alone."""
        if self.group.size == 1:
            return
        for place, pieces in enumerate(self.shares):
            bucket: list[Tensor] = []
            size = 0
            for piece in pieces:
                bucket.append(piece.of(tensors))
                size += bucket[-1].nbytes
                if size >= BUCKET:
                    yield place, bucket
                    bucket, size = [], 0
            if bucket:
                yield place, bucket


class Shards:
    """Parameters of which each rank holds a part. The backward pass has summed their gradients, and whole weights are
    made of the parts in the next forward pass: nothing is left to do. own: this rank's parts."""

    def __init__(self, own: Sequence[Piece]) -> None:
        self.own = own

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Nothing."""

    def spread(self, weights: Sequence[Tensor]) -> None:
        """Nothing."""


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


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _copy_apart(flat: Tensor, tensors: list[Tensor]) -> None:
    for target, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        target.copy_(part.view_as(target))
