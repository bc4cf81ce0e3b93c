"""What :mod:`shoal.kernels.few` computes, in Triton: weights are read once, whatever the number of rows, by so many
programs that all of a GPU's memory is kept busy. Every sum has one order."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.few import MOST

WEIGHTS = 4  # of one launch
PROGRAMS = 256  # that a product should have at least, two of a multiprocessor of the largest GPUs


@dataclass(frozen=True)
class FewTuning:
    """Of a product of few rows. columns, depth: of a tile of weights. stages: how many tiles are on their way."""

    columns: int
    depth: int
    stages: int = 4
    warps: int = 4


LINEAR = FewTuning(columns=32, depth=128)


def triton_products(x: Tensor, weights: Sequence[Tensor], tuning: FewTuning = LINEAR) -> list[Tensor]:
    """What :func:`shoal.kernels.few.few_products` returns."""
    outs = [x.new_empty(len(x), len(weight)) for weight in weights]
    _launch(x, weights, outs, 1, x.shape[1], tuning)
    return outs


def triton_parts(x: Tensor, weight: Tensor, tuning: FewTuning = LINEAR) -> Tensor:
    """What :func:`shoal.kernels.few.few_parts` returns."""
    tiles, steps = triton.cdiv(len(weight), tuning.columns), triton.cdiv(x.shape[1], tuning.depth)
    # At least four tiles for each, so that some are on their way while others are multiplied.
    splits = max(1, min(triton.cdiv(PROGRAMS, tiles), steps // 4))
    each = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, each)
    out = torch.empty(len(x), splits, len(weight), dtype=torch.float32, device=x.device)
    _launch(x, [weight], [out], splits, each * tuning.depth, tuning)
    return out


def triton_add_norm(
    base: Tensor, parts: Tensor, weight: Tensor, eps: float, gates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What :func:`shoal.kernels.few.add_norm` returns."""
    tokens, hidden = base.shape
    total, normed = torch.empty_like(base), torch.empty_like(base)
    if tokens:
        _add_norm_kernel[(tokens,)](
            *(base, parts.contiguous(), base if gates is None else gates.contiguous(), weight, total, normed),
            K=0 if gates is None else gates.shape[1],
            **norm_shape(hidden, parts.shape[1], eps),
        )
    return total, normed


def norm_shape(hidden: int, parts: int, eps: float, each: int = 256) -> dict[str, int | float]:
    """What :func:`sum_and_norm` has to know when it is compiled. each: elements of a row that a warp holds, about."""
    width = triton.next_power_of_2(hidden)
    warps = min(16, max(1, width // each))
    return {"H": hidden, "HP": width, "P": parts, "EPS": eps, "num_warps": warps}


def _launch(
    x: Tensor, weights: Sequence[Tensor], outs: Sequence[Tensor], splits: int, each: int, tuning: FewTuning
) -> None:
    """each: of the depth, for one of the splits."""
    tokens, depth = x.shape
    assert tokens <= MOST, f"{tokens} rows, and a tile has {MOST}"
    assert 0 < len(weights) <= WEIGHTS
    if not tokens:
        return
    spare = [0] * (WEIGHTS - len(weights))  # whose places the first one takes, without columns
    sizes = [*map(len, weights), *spare]
    weights, outs = ([*given, *(given[0] for _ in spare)] for given in (weights, outs))
    _products_kernel[(sum(triton.cdiv(n, tuning.columns) for n in sizes), splits)](
        *(x.contiguous(), *(weight.contiguous() for weight in weights), *outs, tokens),
        **{f"N{i}": n for i, n in enumerate(sizes)},
        D=depth,
        EACH=each,
        SPLITS=splits,
        M=MOST,
        BN=tuning.columns,
        BK=tuning.depth,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )


@triton.jit(do_not_specialize=["tokens"])
def _products_kernel(
    x,
    w0,
    w1,
    w2,
    w3,
    out0,
    out1,
    out2,
    out3,
    tokens,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    D: tl.constexpr,
    EACH: tl.constexpr,
    SPLITS: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All rows by some columns of one of the weights, over one part of the depth."""
    i, split = tl.program_id(0), tl.program_id(1)
    BEGIN1: tl.constexpr = (N0 + BN - 1) // BN
    BEGIN2: tl.constexpr = BEGIN1 + (N1 + BN - 1) // BN
    BEGIN3: tl.constexpr = BEGIN2 + (N2 + BN - 1) // BN
    w, out = w0, out0
    if i >= BEGIN3:
        w, out = w3, out3
    elif i >= BEGIN2:
        w, out = w2, out2
    elif i >= BEGIN1:
        w, out = w1, out1
    width = tl.where(i >= BEGIN3, N3, tl.where(i >= BEGIN2, N2, tl.where(i >= BEGIN1, N1, N0)))
    begin = tl.where(i >= BEGIN3, BEGIN3, tl.where(i >= BEGIN2, BEGIN2, tl.where(i >= BEGIN1, BEGIN1, 0)))
    o_t, n = tl.arange(0, M), (i - begin) * BN + tl.arange(0, BN)
    there, wanted = o_t < tokens, n < width
    acc = tl.zeros([M, BN], tl.float32)
    for start in range(split * EACH, tl.minimum(split * EACH + EACH, D), BK):
        o_k = start + tl.arange(0, BK)
        inside = o_k < D
        b_x = tl.load(x + o_t[:, None] * D + o_k[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        p_w = w + n.to(tl.int64)[None, :] * D + o_k[:, None]
        acc = tl.dot(
            b_x, tl.load(p_w, mask=wanted[None, :] & inside[:, None], other=0.0), acc, input_precision=PRECISION
        )
    p_out = out + (o_t * SPLITS + split)[:, None] * width + n[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=there[:, None] & wanted[None, :])


@triton.jit
def sum_and_norm(
    base,
    parts,
    gates,
    weight,
    total,
    normed,
    t,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
):
    """Adds the parts of row t to base, stores that and its norm, and returns the norm ``[HP]`` as it was stored."""
    o = tl.arange(0, HP)
    inside = o < H
    acc = tl.load(base + t * H + o, mask=inside, other=0.0).to(tl.float32)
    for p in tl.static_range(P):
        at = parts + (t * P + p) * H + o
        if p < K:
            gate = tl.load(gates + t * K + p)
            # Without a gate there may be anything in memory.
            some = (gate != 0.0).to(tl.int32)
            acc += gate * tl.load(at, mask=inside & (some > 0), other=0.0).to(tl.float32)
        else:
            acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    rounded = acc.to(total.dtype.element_ty)
    tl.store(total + t * H + o, rounded, mask=inside)
    x = rounded.to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, 0) / H + EPS)
    y = (x * tl.load(weight + o, mask=inside, other=0.0).to(tl.float32)).to(normed.dtype.element_ty)
    tl.store(normed + t * H + o, y, mask=inside)
    return y


@triton.jit
def _add_norm_kernel(
    base,
    parts,
    gates,
    weight,
    total,
    normed,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
):
    sum_and_norm(base, parts, gates, weight, total, normed, tl.program_id(0).to(tl.int64), H, HP, P, K, EPS)
