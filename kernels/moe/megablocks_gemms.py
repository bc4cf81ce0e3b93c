"""The experts' products by grouped_gemm, which MegaBlocks is built on. Counts are read by the host."""

from __future__ import annotations

import torch
from grouped_gemm import backend
from torch import Tensor

from shoal.kernels.moe.gemms import Gemms


class MegaBlocksGemms(Gemms):
    """``gmm(rows, weight, counts)``, bf16 on a GPU; the activation is PyTorch's."""

    host_counts = True

    def __init__(self, ends: Tensor | None) -> None:
        super().__init__(ends)
        if ends is not None:
            self.counts = torch.diff(ends, prepend=ends.new_zeros(1)).to("cpu", torch.int64)

    def rows_by_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        """``[R, A], [E, A, B] -> [R, B]``: every row by its expert's weight."""
        if self.ends is None or not len(rows):
            return super().rows_by_weight(rows, weight)
        turned = weight.stride(-1) != 1
        weight = weight.transpose(1, 2) if turned else weight
        return backend.gmm(rows, weight.contiguous(), self.counts, trans_b=turned)

    def rows_by_rows(self, left: Tensor, right: Tensor) -> Tensor:
        """``[R, A], [R, B] -> [E, A, B]``: the outer products of each expert's rows, summed."""
        if self.ends is None or not len(left):
            return super().rows_by_rows(left, right)
        return backend.gmm(left, right, self.counts, trans_a=True)
