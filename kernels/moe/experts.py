"""SwiGLU feed-forward networks: one dense, and many of them over rows grouped by expert.

The grouped FFN keeps its input and the output of the first GEMM for the backward pass and recomputes the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.moe import gemms
from shoal.kernels.moe.gemms import Gemms


def swiglu_ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``[…, H] -> […, H]`` with ``gate_up [H, 2F]`` (gate first) and ``down [F, H]``: (silu(x G) * (x U)) D."""
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


def grouped_ffn(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, kind: type[Gemms] = Gemms) -> Tensor:
    """SwiGLU of each expert on its own rows: ``[R, H] -> [R, H]``.

    rows: sorted by expert. counts: ``[E]`` int64, rows of each expert, sum R; zeros are fine.
    gate_up: ``[E, H, 2F]`` (gate first); down: ``[E, F, H]``. kind: who computes the products.
    """
    out: Tensor = _GroupedFFN.apply(rows, counts, gate_up, down, kind)
    return out


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, kind: type[Gemms]) -> Tensor:
        ctx.gemms = kind(counts.cumsum(0, dtype=torch.int32).to(rows.device))
        hidden, out = gemms.forward(ctx.gemms, rows, gate_up, down)
        ctx.save_for_backward(rows, hidden, gate_up, down)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:  # type: ignore[override]
        rows, hidden, gate_up, down = ctx.saved_tensors
        d_rows, d_gate_up, d_down, _ = gemms.backward(ctx.gemms, grad.contiguous(), lambda: rows, hidden, gate_up, down)
        return d_rows, None, d_gate_up, d_down, None
