"""What the MoE layers of a pass count, and the balance losses made of it, of all layers together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.moe import balance_loss, load_fractions
from shoal.workers.config import BalanceTable
from shoal.workers.gathered import Live
from shoal.workers.mesh import Group


class Counted(NamedTuple):
    """Of one MoE layer. counts: ``[experts]`` int, this dispatch group's tokens that chose each. What its balance
    losses are made of, with gradients, None for what there is not: sums ``[experts]`` and squares as
    :class:`shoal.workers.routed.Found` has them, and the loss of sequences, a scalar."""

    counts: Tensor
    sums: Tensor | None = None
    squares: Tensor | None = None
    sequences: Tensor | None = None


class MoELoad:
    """What the MoE layers of a step count and need to know: filled during a forward pass, layer by layer.

    tokens: T of the balance losses, over all ranks and micro-batches. fractions: f ``[MoE layers, experts]`` where it
    is known beforehand (accumulation), else it is taken from this micro-batch of all ranks. balance: False for no
    losses, and counts of this dispatch group only, which cost no exchange. live: which tokens count, in a step where
    all ranks that have tokens have as many; None where all count. sequences: of each token ``[T]``
    int64 the number of its sequence, and how many there are in the micro-batch, all ranks of the context group
    together; None for no loss of theirs.

    Losses are computed for all layers together: a layer's alone are twenty operations on some numbers, which take the
    host as long as a layer's kernels.
    """

    def __init__(
        self,
        tokens: int,
        fractions: Tensor | None = None,
        balance: bool = True,
        live: Live | None = None,
        sequences: tuple[Tensor, int] | None = None,
    ) -> None:
        self.tokens, self.fractions, self.balance, self.live = tokens, fractions, balance, live
        self.sequences = sequences
        self.layers: list[Counted] = []
        # ``[MoE layers, experts]`` int64, tokens of all ranks that chose each expert, once the pass has ended
        self.counts: Tensor | None = None
        # ``[T, K]`` a layer instead of counts, where not all tokens count; -1 for those of several ranks together, on
        # ranks with experts alone, and of few rows
        self.chosen: list[Tensor] = []

    def apart(self) -> MoELoad:
        """The same for a layer alone, which may be computed twice and is counted once."""
        return MoELoad(self.tokens, balance=self.balance, sequences=self.sequences)

    def finish(self, world: Group, dispatch: Group) -> None:
        """Ends a forward pass: adds up what all ranks have counted, where there are losses of it. All ranks call it."""
        if not self.balance or not self.layers:
            return
        self.counts = torch.stack([layer.counts for layer in self.layers]).long()
        if dispatch.size < world.size:
            world.all_reduce(self.counts)

    def loss(self, balance: BalanceTable) -> Tensor | None:
        """This rank's part of the balance losses of all layers, a scalar, of a pass that has ended; None for none."""
        if self.counts is None:
            return None
        parts = []
        if sums := _present(layer.sums for layer in self.layers):
            fractions = load_fractions(self.counts) if self.fractions is None else self.fractions
            factors = balance.expert, balance.device, balance.device_groups
            parts.append(balance_loss(torch.stack(sums), fractions, self.tokens, *factors))
        if squares := _present(layer.squares for layer in self.layers):
            parts.append(torch.stack(squares) * (balance.z_loss / self.tokens))
        if sequences := _present(layer.sequences for layer in self.layers):
            parts.append(torch.stack(sequences))
        return sum(parts[1:], parts[0]).sum() if parts else None

    def add_to(self, total: Tensor | None) -> None:
        """Adds the tokens that chose each routed expert to ``[MoE layers, experts]`` int64; None without MoE layers."""
        if total is None:
            return
        if self.live is None:
            total += torch.stack([layer.counts for layer in self.layers])
            return
        chosen = torch.stack(self.chosen).long()
        count = chosen >= 0
        if chosen.shape[1] == len(self.live.mask):  # those of other ranks are marked already
            count = count & (self.live.mask != 0)[:, None]
        total.scatter_add_(1, chosen.clamp(min=0).flatten(1), count.flatten(1).long())


def _present(found: Iterable[Tensor | None]) -> list[Tensor]:
    return [each for each in found if each is not None]
