"""What travels between replicas while ranks compute: gradients in the backward pass, weights in the next forward pass.
A rank launches it in one order, the same as all others, whatever order things come or are asked for in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoal.workers.model import Transformer
from shoal.workers.replicas import Bucket, Travelling

UNDER_WAY = 8  # buckets of gradients at a time: those of several tensors are copies, in memory until they have landed


class GradientSums:
    """Gradients, a bucket of them summed as soon as it is complete. buckets: as a backward pass completes them."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._gradients: dict[int, Tensor] = {}
        self._waiting = list(buckets)
        self._travelling: list[Travelling] = []

    def came(self, index: int, gradient: Tensor) -> None:
        """The gradient of the parameter of that number is complete, of all micro-batches."""
        self._gradients[index] = gradient
        while self._waiting and all(piece.index in self._gradients for piece in self._waiting[0].pieces):
            if len(self._travelling) == UNDER_WAY:
                self._travelling.pop(0).land()
            self._travelling.append(self._waiting.pop(0).reduce(self._gradients))

    def finish(self, gradients: Sequence[Tensor]) -> None:
        """All are complete, those too that never came. What is launched from now on comes after the sums: each piece is
        right at the rank whose it is, elsewhere it is of no use."""
        self._travelling += [bucket.reduce(gradients) for bucket in self._waiting]
        for travelling in self._travelling:
            travelling.land()
        self._waiting, self._gradients, self._travelling = list(self._buckets), {}, []


class WeightSpread:
    """Updated weights of a model, on their way from the ranks that updated them. A forward pass of the model waits for
    those of the embedding and of each layer where it comes to them, and at the last norm for the head's, whose only use
    is behind it; whoever reads weights otherwise has to wait for all."""

    def __init__(self, buckets: Sequence[Bucket], model: Transformer) -> None:
        self._buckets = buckets[::-1]
        self._travelling: list[Travelling | None] = [None] * len(buckets)
        numbers = {id(p): i for i, p in enumerate(model.parameters())}
        self._weights = list(model.parameters())
        stages: list[tuple[nn.Module, list[nn.Module]]] = [(layer, [layer]) for layer in model.layers]
        if model.hosts_attention:
            head = [] if model.recipe.model.tied_embeddings else [model.head]
            stages += [(model.embedding, [model.embedding]), (model.norm, [model.norm, *head])]
        for module, used in stages:
            module.register_forward_pre_hook(self._before({numbers[id(p)] for m in used for p in m.parameters()}))

    def _before(self, indices: Collection[int]) -> Any:
        own = [i for i, bucket in enumerate(self._buckets) if any(p.index in indices for p in bucket.pieces)]
        return lambda _module, _inputs: self._land(own)

    @torch.no_grad()
    def begin(self) -> None:
        """Gives each piece to all replicas, in place."""
        self._travelling = [bucket.spread(self._weights) for bucket in self._buckets]

    def finish(self) -> None:
        """What is launched from now on reads weights that have come."""
        self._land(range(len(self._buckets)))

    @torch.no_grad()
    def _land(self, numbers: Collection[int]) -> None:
        for i in numbers:
            if (travelling := self._travelling[i]) is not None:
                travelling.land()
                self._travelling[i] = None
