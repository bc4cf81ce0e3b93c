"""The experts' products by PyTorch, with the activation between them in Triton."""

from __future__ import annotations

from torch import Tensor

from shoal.kernels.moe import triton_rows
from shoal.kernels.moe.gemms import Gemms


class TritonGemms(Gemms):
    """PyTorch's products, and between them kernels that read and write each element once."""

    triton = True

    def up(self, rows: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Gemms.up`."""
        hidden = self.rows_by_weight(rows, self.joined(gate_up))
        return hidden, triton_rows.swiglu(hidden)

    def act_backward(
        self, grad: Tensor, down: Tensor, hidden: Tensor, gates: Tensor | None, order: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From the gradient ``[R, H]`` of the unweighted results, as :func:`triton_rows.swiglu_backward`."""
        d_act = self.rows_by_weight(grad, down.transpose(-1, -2))
        return triton_rows.swiglu_backward(hidden, d_act, gates, order)
