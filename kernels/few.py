"""Products and sums of few rows, as a decode step has them, in PyTorch and in Triton.

With few rows a product takes as long as its weights take to be read, and a step as long as it has launches that wait
for one another. So several products are one launch, and what adds up a product's parts adds the residual and norms it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 16
"""Rows at most: as many as one tile of a matrix product has."""


def few_products(x: Tensor, weights: Sequence[Tensor], triton: bool) -> list[Tensor]:
    """``x Wᵀ`` of each of up to four weights: ``[T, H], [N_i, H] -> [T, N_i]``, in x's dtype. T: up to ``MOST``."""
    if triton:
        from shoal.kernels.triton_few import triton_products

        return triton_products(x, weights)
    return [F.linear(x, weight) for weight in weights]


def few_parts(x: Tensor, weight: Tensor, triton: bool) -> Tensor:
    """``[T, H], [N, H] -> [T, P, N]``, at least float32: parts that add up to ``x Wᵀ``, as many as keep a GPU busy. T:
    up to ``MOST``."""
    if triton:
        from shoal.kernels.triton_few import triton_parts

        return triton_parts(x, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))[:, None]


def add_norm(
    base: Tensor, parts: Tensor, weight: Tensor, eps: float, triton: bool, gates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A residual stream with parts added, and its RMS norm (arXiv 1910.07467, eq. 4): two ``[T, H]`` in base's dtype.

    base: ``[T, H]``. parts: ``[T, P, H]``, of any dtype, added up in float32 at least. weight: ``[H]``. gates: ``[T,
    K]``, K ≤ P, the weights of the first K parts; parts whose gate is 0 are not read.
    """
    if triton:
        from shoal.kernels.triton_few import triton_add_norm

        return triton_add_norm(base, parts, weight, eps, gates)
    wide = torch.promote_types(base.dtype, torch.float32)
    parts = parts.to(wide)
    if gates is not None:
        weighted = gates.to(wide)[..., None] * parts[:, : gates.shape[1]]
        parts = torch.cat((weighted.masked_fill(gates[..., None] == 0, 0), parts[:, gates.shape[1] :]), 1)
    total = (base.to(wide) + parts.sum(1)).to(base.dtype)
    return total, F.rms_norm(total, weight.shape, weight, eps)
