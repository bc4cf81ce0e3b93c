"""Rotary position embedding (RoFormer, eq. 34), with the half-split pairing of Llama: ``(x[i], x[i + dim/2])``."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: Tensor, dim: int, base: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles ``positions * base ** (-2 i / dim)``, ``i < dim / 2``.

    positions: ``[T]`` int64. dim: the even size of the heads to rotate. Returns two ``[T, dim/2]`` of ``dtype``.
    The angles are computed in float64: in float32, position 64k would be off by up to 0.004 radian.
    """
    rates = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim)
    angles = positions.to(torch.float64)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of ``x`` by its row's angles.

    x: ``[T, heads, dim]``; cos, sin: ``[T, dim/2]`` of :func:`rope_tables`. Computes in the tables' dtype and returns
    x's shape and dtype.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
