"""The experts' products by the Gluon kernels, on Hopper; by PyTorch where those cannot be used."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.launches import tiles
from shoal.kernels.moe.gluon_common import supported
from shoal.kernels.moe.gluon_outer import outer_products
from shoal.kernels.moe.gluon_product import ACT, COLUMNS, DEPTH, PLAIN, ROWS, UP, product
from shoal.kernels.moe.triton_gemms import TritonGemms
from shoal.kernels.moe.triton_tiles import Tiles, tiles_of


class GluonGemms(TritonGemms):
    """Products with SwiGLU and its gradient in their epilogues. plain, outer: whether the others are ours too."""

    plain, outer = True, True

    def __init__(self, ends: Tensor | None) -> None:
        super().__init__(ends)
        self._tiles: Tiles | None = None

    def tiles(self, rows: Tensor) -> Tiles:
        """Of this division into groups; without groups all rows are one."""
        if self._tiles is None:
            self._tiles = tiles_of(self.ends, rows.shape[0], ROWS, rows.device)
        return self._tiles

    def rows_by_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        """``[R, A], [E, A, B] -> [R, B]``: every row by its expert's weight; weights may be transposed views."""
        count = rows.shape[0]
        if not self.plain or not count or not supported(rows, *weight.shape[-2:]):
            return super().rows_by_weight(rows, weight)
        out = rows.new_empty(count, weight.shape[-1])
        product(PLAIN, rows, weight, self.tiles(rows), out)
        return out

    def up(self, rows: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Gemms.up`; weights of experts side by side are read where they are."""
        side = self._side(gate_up, COLUMNS[UP])
        gate_up = gate_up if side > 1 else self.joined(gate_up)
        double = side * gate_up.shape[-1]
        count = rows.shape[0]
        if not count or not supported(rows, rows.shape[1], double // 2):
            return super().up(rows, gate_up)
        hidden, act = rows.new_empty(count, double), rows.new_empty(count, double // 2)
        product(UP, rows, gate_up, self.tiles(rows), hidden, act, side=side)
        return hidden, act

    def up_backward(self, grad: Tensor, gate_up: Tensor) -> Tensor:
        """As :meth:`Gemms.up_backward`."""
        side = self._side(gate_up, DEPTH)  # gates and ups are what is summed over
        if side == 1 or not self.plain or not grad.shape[0] or not supported(grad, gate_up.shape[1]):
            return super().up_backward(grad, gate_up)
        out = grad.new_empty(grad.shape[0], gate_up.shape[1])
        product(PLAIN, grad, gate_up.transpose(-1, -2), self.tiles(grad), out, side=side)
        return out

    def _side(self, gate_up: Tensor, tile: int) -> int:
        """How many experts stand side by side for the kernels: no tile of so many gates or ups may reach from one into
        another."""
        fits = self.ends is None and gate_up.dim() == 3 and gate_up.shape[-1] // 2 % tile == 0
        return gate_up.shape[0] if fits else 1

    def act_backward(
        self, grad: Tensor, down: Tensor, hidden: Tensor, gates: Tensor | None, order: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From the gradient ``[R, H]`` of the unweighted results, as :func:`triton_rows.swiglu_backward`."""
        if not grad.shape[0] or not supported(grad, *down.shape[-2:]):
            return super().act_backward(grad, down, hidden, gates, order)
        rows, inner = grad.shape[0], down.shape[-2]
        d_hidden, act = torch.empty_like(hidden), hidden.new_empty(rows, inner)
        parts = None
        if gates is not None:
            parts = torch.empty(tiles(inner, COLUMNS[ACT]), rows, dtype=torch.float32, device=grad.device)
        weight = down.transpose(-1, -2)
        product(ACT, grad, weight, self.tiles(grad), d_hidden, act, hidden, gates, order, parts)
        return d_hidden, act, None if parts is None else parts.sum(0)

    def rows_by_rows(self, left: Tensor, right: Tensor) -> Tensor:
        """``[R, A], [R, B] -> [E, A, B]``: the outer products of each expert's rows, summed."""
        if (
            not self.outer
            or self.ends is None
            or not left.shape[0]
            or not supported(left, left.shape[1], right.shape[1])
        ):
            return super().rows_by_rows(left, right)
        return outer_products(left, right, self.ends)
