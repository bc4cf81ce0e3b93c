"""The matrix products of SwiGLU networks over rows grouped by expert, and what stands between them.

:class:`Gemms` computes them by PyTorch: ``grouped_mm`` on a GPU (bf16), a loop over experts on a CPU. A subclass may
fuse the activation into the products around it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


class Gemms:
    """Products of rows sorted by expert, for one division into groups. ends: ``[E]`` int32, where each group ends.

    Without ends there is one expert for all rows, and weights have no first dimension. triton: whether routing and
    copying go with it in Triton, as :func:`shoal.kernels.moe.layer.moe_layer` does them. host_counts: whether the host
    has to know how many rows each expert has.
    """

    triton = False
    host_counts = False

    def __init__(self, ends: Tensor | None) -> None:
        self.ends = ends
        if ends is not None and not ends.is_cuda:
            bounds = ends.tolist()
            self.spans = list(zip([0, *bounds], bounds, strict=False))

    def rows_by_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        """``[R, A], [E, A, B] -> [R, B]``: every row by its expert's weight."""
        if self.ends is None:
            return rows @ weight
        if not len(rows):
            return rows.new_empty(0, weight.shape[-1])
        if rows.is_cuda:
            return _grouped_mm(rows, weight, offs=self.ends)
        out = rows.new_empty(len(rows), weight.shape[-1])
        for expert, (start, end) in enumerate(self.spans):
            if end > start:
                torch.mm(rows[start:end], weight[expert], out=out[start:end])
        return out

    def rows_by_rows(self, left: Tensor, right: Tensor) -> Tensor:
        """``[R, A], [R, B] -> [E, A, B]``: the outer products of each expert's rows, summed."""
        if self.ends is None:
            return left.T @ right
        if not len(left):
            return left.new_zeros(len(self.ends), left.shape[-1], right.shape[-1])
        if left.is_cuda:
            return _grouped_mm(left.T, right, offs=self.ends)
        out = left.new_zeros(len(self.spans), left.shape[-1], right.shape[-1])
        for expert, (start, end) in enumerate(self.spans):
            if end > start:
                torch.mm(left[start:end].T, right[start:end], out=out[expert])
        return out

    def up(self, rows: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """``[R, H], [E, H, 2F]`` -> hidden ``[R, 2F]`` and its SwiGLU ``[R, F]``. Without groups also ``[S, H, 2F]``:
        experts that all rows use are one, side by side (:func:`side_by_side`)."""
        hidden = self.rows_by_weight(rows, self.joined(gate_up))
        return hidden, swiglu(hidden)

    def up_backward(self, grad: Tensor, gate_up: Tensor) -> Tensor:
        """The gradient of the rows that :meth:`up` had, of the one of hidden."""
        return self.rows_by_weight(grad, self.joined(gate_up).transpose(-1, -2))

    def joined(self, gate_up: Tensor) -> Tensor:
        """gate_up as products take it."""
        return side_by_side(gate_up) if self.ends is None and gate_up.dim() == 3 else gate_up

    def act_backward(
        self, grad: Tensor, down: Tensor, hidden: Tensor, gates: Tensor | None, order: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From the gradient ``[R, H]`` of the unweighted results: what :func:`swiglu_backward` gives."""
        return swiglu_backward(hidden, self.rows_by_weight(grad, down.transpose(-1, -2)), gates, order)


def forward(gemms: Gemms, rows: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU of each expert on its rows: hidden ``[R, 2F]``, to be kept for the backward pass, and ``[R, H]``."""
    hidden, act = gemms.up(rows, gate_up)
    return hidden, gemms.rows_by_weight(act, down)


def backward(
    gemms: Gemms,
    grad: Tensor,
    rows: Callable[[], Tensor],
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gates: Tensor | None = None,
    order: Tensor | None = None,
    on_rows: Callable[[Tensor, Tensor | None], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of rows ``[R, H]``, gate_up, down and the rows' weights ``[R]`` float32.

    grad: ``[R, H]``, of the weighted results, without the weights. rows: called once, for the input rows, as late as
    they are needed. gates, order: the weight of row r is ``gates.flatten()[order[r]]``; none: 1, and no gradient.
    on_rows: called with the gradients of rows and of their weights, before that of gate_up is computed.
    """
    d_hidden, act, d_gates = gemms.act_backward(grad, down, hidden, gates, order)
    d_down = gemms.rows_by_rows(act, grad)
    del act, grad
    d_rows = gemms.up_backward(d_hidden, gate_up)
    if on_rows is not None:
        on_rows(d_rows, d_gates)
    return d_rows, gemms.rows_by_rows(rows(), d_hidden), d_down, d_gates


def swiglu(hidden: Tensor) -> Tensor:
    """``[R, 2F] -> [R, F]``: silu of the first half times the second."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(
    hidden: Tensor, d_act: Tensor, gates: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of hidden ``[R, 2F]``, the weighted activation ``[R, F]``, the gradient of the weights ``[R]`` float32.

    d_act: ``[R, F]``, the gradient as if the weights were 1. gates, order: the weight of row r is
    ``gates.flatten()[order[r]]``; none: 1, and no gradient. (float64 inputs give float64 gradients of the weights.)
    """
    gate, up = hidden.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    act, d_gates = silu * up, None
    if gates is not None and order is not None:
        weights = gates.flatten()[order.long()]
        d_gates = (act * d_act).sum(-1, dtype=weights.dtype)
        act, d_act = (act * weights[:, None]).to(act.dtype), (d_act * weights[:, None]).to(act.dtype)
    return torch.cat([d_act * up * (sigmoid + silu * (1 - sigmoid)), d_act * silu], dim=-1), act, d_gates


def side_by_side(gate_up: Tensor) -> Tensor:
    """``[S, H, 2F] -> [H, 2·S·F]``: S experts that every token uses are one, all gates first. A copy unless S is 1."""
    count, hidden, double = gate_up.shape
    return gate_up.view(count, hidden, 2, double // 2).permute(1, 2, 0, 3).reshape(hidden, count * double)


def apart(gate_up: Tensor, count: int) -> Tensor:
    """The inverse of :func:`side_by_side`."""
    hidden, wide = gate_up.shape
    half = wide // count // 2
    return gate_up.view(hidden, 2, count, half).permute(2, 0, 1, 3).reshape(count, hidden, 2 * half)
