"""SwiGLU feed-forward networks: one dense, and many of them over rows grouped by expert.

The grouped FFN keeps its input and the output of the first GEMM for the backward pass and recomputes the activation.
On a GPU the GEMMs are PyTorch's ``grouped_mm``; on a CPU a loop over experts, which also takes float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def swiglu_ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``[…, H] -> […, H]`` with ``gate_up [H, 2F]`` (gate first) and ``down [F, H]``: (silu(x G) * (x U)) D."""
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


def grouped_ffn(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of each expert on its own rows: ``[R, H] -> [R, H]``.

    rows: sorted by expert. counts: ``[E]`` int64, rows of each expert, sum R; zeros are fine.
    gate_up: ``[E, H, 2F]`` (gate first); down: ``[E, F, H]``.
    """
    out: Tensor = _GroupedFFN.apply(rows, counts, gate_up, down)
    return out


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        groups = _Groups(counts, rows.device)
        hidden = groups.rows_by_weight(rows, gate_up)
        ctx.save_for_backward(rows, hidden, gate_up, down)
        ctx.groups = groups
        gate, up = hidden.chunk(2, dim=-1)
        return groups.rows_by_weight(F.silu(gate).mul_(up), down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:  # type: ignore[override]
        rows, hidden, gate_up, down = ctx.saved_tensors
        groups: _Groups = ctx.groups
        grad = grad.contiguous()
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_act = groups.rows_by_weight(grad, down.transpose(1, 2))
        d_down = groups.rows_by_rows(silu * up, grad)
        d_hidden = torch.cat([d_act * up * (sigmoid + silu * (1 - sigmoid)), d_act * silu], dim=-1)
        d_rows = groups.rows_by_weight(d_hidden, gate_up.transpose(1, 2))
        return d_rows, None, groups.rows_by_rows(rows, d_hidden), d_down


class _Groups:
    """The two grouped GEMMs that an expert layer needs, for one division of rows into groups."""

    def __init__(self, counts: Tensor, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        ends = counts.cumsum(0)
        if self.cuda:
            self.ends = ends.to(device, torch.int32)
        else:
            self.spans = list(zip([0, *ends.tolist()], ends.tolist(), strict=False))

    def rows_by_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        """``[R, A], [E, A, B] -> [R, B]``: every row by its expert's weight."""
        if self.cuda:
            return _grouped_mm(rows, weight, offs=self.ends)
        out = rows.new_empty(len(rows), weight.shape[-1])
        for expert, (start, end) in enumerate(self.spans):
            if end > start:
                torch.mm(rows[start:end], weight[expert], out=out[start:end])
        return out

    def rows_by_rows(self, left: Tensor, right: Tensor) -> Tensor:
        """``[R, A], [R, B] -> [E, A, B]``: the outer products of each expert's rows, summed."""
        if self.cuda:
            return _grouped_mm(left.T, right, offs=self.ends)
        out = left.new_zeros(len(self.spans), left.shape[-1], right.shape[-1])
        for expert, (start, end) in enumerate(self.spans):
            if end > start:
                torch.mm(left[start:end].T, right[start:end], out=out[expert])
        return out
