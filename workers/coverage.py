"""What of one another's far keys the ranks of a context group chose, layer by layer, and which layers pull for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.workers.model import Transformer
from shoal.workers.model.attention import NativeSparseAttention
from shoal.workers.pull import Fetching, counted
from shoal.workers.volume import Shape, far_volume

COUNTS = 5  # of ``Pages.count``
WORTH = 0.5
"""A pull has to move less than this share of a gather's bytes: nothing hides it, and the host waits for the choice."""


class Coverage:
    """Counts what was chosen in forward passes, while ``on``; decides by it where the recipe leaves that open.

    Decisions are made of sums over all ranks, and are therefore the same on all of them.
    """

    def __init__(self, model: Transformer, device: torch.device) -> None:
        recipe = model.recipe
        m, p = recipe.model, recipe.parallel
        self._shared = p.context > 1 and recipe.attention.kind == "nsa"
        self._auto, self._ranks, self._device = p.context_fetch == "auto", p.attention_ranks, device
        self._place = model.mesh.context.index if model.mesh.context else 0
        self._size, self._layers = p.context, m.layers if self._shared else 0
        self._forwards = [1 + recipe.counts_first + (i < recipe.train.recompute) for i in range(m.layers)]
        item = model.dtype.itemsize
        wide = max(4, item) if p.context_gradients == "float32" else item
        self._shape = Shape(m.kv_heads, (m.head_dim, m.v_dim), item, wide)
        self._fetching: dict[int, Fetching] = {}
        for i, layer in enumerate(model.layers):
            attention = getattr(layer, "attention", None)
            if isinstance(attention, NativeSparseAttention) and self._shared:
                self._fetching[i] = attention.fetching
        self.pulls = [p.context_fetch == "chosen"] * self._layers

    def look(self, on: bool) -> None:
        """Whether the forward passes that follow are counted."""
        for fetching in self._fetching.values():
            fetching.count = on

    def sums(self) -> Tensor:
        """``[layers · ranks of a group · 5]`` float64, counts of the last forward pass at this rank's place, zeros at
        the others'; ``[0]`` where no sequences are shared, zeros where nothing was counted. Forgets them."""
        sums = torch.zeros(self._layers, self._size, COUNTS, dtype=torch.float64, device=self._device)
        layers = list(self._fetching.values())  # of all of them, or of none at a rank without attention
        if any(fetching.read for fetching in layers):
            sums[:, self._place] = counted(layers).double()
        for fetching in layers:
            fetching.read, fetching.pages = [], None
        return sums.flatten()

    def decide(self, totals: Sequence[float]) -> dict[str, Any]:
        """What a step's record says; layers of the following steps fetch by it. totals: :meth:`sums` over all ranks.

        coverage: ``[layers][place in the group]``, the share of the pages at other ranks, of all that a rank's queries
        might read, that they chose. gather_bytes, pull_bytes: what a rank receives of the selected branch in a step, in
        the mean, either way. pulled: which layers did pull.
        """
        counts = torch.tensor(totals, dtype=torch.float64).view(self._layers, self._size, COUNTS)
        shares = counts[..., 0] / counts[..., 2].clamp(min=1)
        record = {"coverage": shares.tolist(), "gather_bytes": [], "pull_bytes": [], "pulled": self.pulls}
        for layer, (_, rows, _, all_rows, told) in enumerate(counts.sum(1).long().tolist()):
            forwards, told = self._forwards[layer], told * (self._size - 1)
            record["gather_bytes"].append(far_volume(all_rows, self._shape, forwards) / self._ranks)
            record["pull_bytes"].append(far_volume(rows, self._shape, forwards, told) / self._ranks)
        if self._auto:
            pairs = zip(record["gather_bytes"], record["pull_bytes"], strict=True)
            self._pull([few < WORTH * many for many, few in pairs])
        return record

    def _pull(self, pulls: list[bool]) -> None:
        self.pulls = pulls
        for layer, fetching in self._fetching.items():
            fetching.pull = pulls[layer]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a run goes on as it would have; nothing where no sequences are shared."""
        return {"pulls": {"context": self._size, "layers": self.pulls}} if self._shared else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state, if it is of as many ranks of a group."""
        pulls = state.get("pulls")
        if self._auto and pulls and pulls["context"] == self._size:
            self._pull(list(pulls["layers"]))
