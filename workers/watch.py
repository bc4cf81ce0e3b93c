"""Watches a rank's steps: where their time goes, how NSA's branches are mixed, what is chosen of other ranks' keys.

It costs no wait for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.workers.clock import Clock
from shoal.workers.coverage import Coverage
from shoal.workers.mesh import Mesh
from shoal.workers.model import Transformer
from shoal.workers.model.attention import BRANCHES, NativeSparseAttention
from shoal.workers.model.feedforward import MoE
from shoal.workers.records import PARTS


class StepWatch:
    """The clock of a trainer's steps; the gates of its NSA layers and their coverage, of steps that are looked at."""

    def __init__(self, model: Transformer, mesh: Mesh, device: torch.device) -> None:
        self.clock, self.coverage, self._on = Clock(device), Coverage(model, device), False
        m = model.recipe.model
        self._heads, self._mesh, self._device = m.heads, mesh, device
        self._layers = m.layers if model.recipe.attention.kind == "nsa" else 0
        self._sums: dict[int, Tensor] = {}
        for i, layer in enumerate(model.layers):
            attention, moe = getattr(layer, "attention", None), layer.moe
            if isinstance(attention, NativeSparseAttention):
                attention.gate.register_forward_hook(self._listen(i))
            if isinstance(moe, MoE):
                moe.dispatcher.clock = self.clock

    def _listen(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, out: Tensor) -> None:
            if self._on:
                self._sums[layer] = out.detach().sum(0, dtype=torch.promote_types(out.dtype, torch.float32))

        return hook

    def look(self, on: bool) -> None:
        """Whether the forward passes that follow are looked at."""
        self._on = on
        self.coverage.look(on)

    def sums(self) -> Tensor:
        """``[layers · 3 + …]`` float64 of the last forward pass: gates added up over this rank's tokens and heads, then
        :meth:`Coverage.sums`.

        Zeros where this rank has no attention; ``[0]`` without NSA, or while nothing is looked at. The look ends.
        """
        if not self._on:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        self.look(False)
        sums = torch.zeros(self._layers * BRANCHES, dtype=torch.float64, device=self._device)
        if self._sums:
            by_head = torch.stack([self._sums[layer] for layer in range(self._layers)]).double()
            sums = by_head.view(self._layers, self._heads, BRANCHES).sum(1).flatten()
        self._sums.clear()
        return torch.cat([sums, self.coverage.sums()])

    def totals(self, sums: Tensor, tokens: int) -> tuple[list[list[float]], dict[str, Any]]:
        """Mean gates ``[layers][3]`` of ``tokens``, the global batch, and what :meth:`Coverage.decide` says of it;
        nothing where it was not looked at. sums: :meth:`sums` over this rank's part. A collective of all ranks."""
        if not len(sums):
            return [], {}
        found, gates = self._mesh.world.all_reduce(sums).tolist(), self._layers * BRANCHES
        means = [value / (tokens * self._heads) for value in found[:gates]]
        rows = [means[i : i + BRANCHES] for i in range(0, gates, BRANCHES)]
        return rows, self.coverage.decide(found[gates:]) if len(found) > gates else {}

    def parts(self, seconds: float) -> dict[str, float]:
        """``data_seconds`` and so on of a step that took ``seconds``; what is left is the update of the weights.

        ``dispatch_seconds`` lies within forward and backward: the time for which rows of other ranks were waited for.
        So does ``exchange_seconds``, of keys of a shared sequence, while that is ``exchange.watched`` on this clock.
        """
        spent = self.clock.read()
        found = {name: spent.get(name, 0.0) for name in PARTS}
        found["update"] = max(0.0, seconds - sum(found.values()))
        found["dispatch"] = spent.get("dispatch", 0.0)
        found |= {name: spent[name] for name in ("exchange",) if name in spent}
        return {f"{name}_seconds": value for name, value in found.items()}
