"""Rotary position embedding (RoFormer, eq. 34), with the half-split pairing of Llama: ``(x[i], x[i + dim/2])``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """Positions beyond those trained on (YaRN, arXiv 2309.00071, section 3).

    factor: s, the new context over the old one. original: L, the old context, in tokens. fast, slow: pairs that turn
    more often than ``fast`` times within L keep their rate, those that turn less than ``slow`` times are slowed by s,
    and between them it is a ramp.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0

    @property
    def temperature(self) -> float:
        """``0.1 ln s + 1``, on queries and keys alike: the square root of 1/t (YaRN eq. 22)."""
        return 0.1 * math.log(self.factor) + 1

    def rates(self, rates: Tensor, base: float) -> Tensor:
        """Angles a token ``[dim/2]`` (YaRN eq. 20), of the unscaled ones. The ramp is the authors' code's, which other
        models have: it rises with the number of the pair, between whole pairs that are rounded outwards. The paper's
        (eq. 18) rises with the turns within L, from the same ends."""
        pairs = len(rates)

        def pair(turns: float) -> float:
            return pairs * math.log(self.original / (2 * math.pi * turns)) / math.log(base)

        low, high = max(math.floor(pair(self.fast)), 0), min(math.ceil(pair(self.slow)), 2 * pairs - 1)
        width = max(high - low, 1e-3)
        slowed = ((torch.arange(pairs, device=rates.device, dtype=rates.dtype) - low) / width).clamp(0, 1)
        return rates * (1 - slowed) + rates / self.factor * slowed


def rope_rates(dim: int, base: float, device: torch.device, yarn: Yarn | None = None) -> tuple[Tensor, float]:
    """Angles a token, ``[dim/2]`` float64, and the factor on cosines and sines; arguments as :func:`rope_tables` has
    them."""
    rates = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    return (rates, 1.0) if yarn is None else (yarn.rates(rates, base), yarn.temperature)


def rope_tables(
    positions: Tensor, dim: int, base: float, dtype: torch.dtype = torch.float32, yarn: Yarn | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles ``positions * base ** (-2 i / dim)``, ``i < dim / 2``.

    positions: ``[T]`` int64. dim: the even size of the heads to rotate. yarn: for contexts longer than trained on.
    Returns two ``[T, dim/2]`` of ``dtype``. The angles are computed in float64: in float32, position 64k would be off
    by up to 0.004 radian.
    """
    rates, size = rope_rates(dim, base, positions.device, yarn)
    angles = positions.to(torch.float64)[:, None] * rates
    return (size * angles.cos()).to(dtype), (size * angles.sin()).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of ``x`` by its row's angles.

    x: ``[T, heads, dim]``; cos, sin: ``[T, dim/2]`` of :func:`rope_tables`. Computes in the tables' dtype and returns
    x's shape and dtype. In 16 bits on a GPU by Triton, with the same bits; the tables get no gradient then.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        from shoal.kernels.triton_rope import triton_rotate

        return triton_rotate(x, cos, sin)
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
