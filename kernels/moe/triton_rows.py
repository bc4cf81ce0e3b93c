"""What moves rows to their experts and back, and the activation between the GEMMs, in Triton.

Rows are copied and added up token by token: a token is read once and written K times, and a sum over its choices has
one order. No atomics.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2, tiles


def expand(x: Tensor, rows: Tensor, out: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """``[T, H] -> [T·K, H]``: row ``rows[t, k]`` is ``x[t]``. rows: ``[T, K]`` int32, every place once.

    out: where the rows go, of any number; places below 0 are then left out. more: ``[·, H]``, rows of the tokens
    behind those of x. The rows of x, more and out are contiguous, but may lie apart.
    """
    tokens, top_k = rows.shape
    hidden, first = x.shape[1], len(x)
    some = out is not None
    if out is None:
        out = x.new_empty(tokens * top_k, hidden)
    if tokens and top_k:
        grid, shape = _tiles(tokens, hidden, 4)
        apart = {"X": x.stride(0), "Y": out.stride(0), "Z": 0 if more is None else more.stride(0)}
        second = x if more is None else more
        launch(
            _expand_kernel,
            grid,
            x,
            second,
            rows,
            out,
            tokens,
            first,
            H=hidden,
            K=top_k,
            SOME=some,
            num_warps=4,
            **apart,
            **shape,
        )
    return out


def combine(
    results: Tensor,
    rows: Tensor,
    gates: Tensor | None = None,
    base: Tensor | None = None,
    logits: Tensor | None = None,
    centroids: Tensor | None = None,
    *,
    some: bool = False,
    out: Tensor | None = None,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``[T, H]``: for each token, base plus the sum of its K results in the order of its choices, in float32.

    results: ``[T·K, H]``; rows: ``[T, K]`` int32, where a token's results stand. gates: ``[T, K]`` float32 weights (1
    without). base: ``[T, H]``. logits, centroids: ``[T, N]`` and ``[N, H]`` of one dtype, whose product is added (the
    router's part of a gradient). some: places below 0 have no result. out: where the sums go, base itself if you like.
    more: rows ``[·, H]`` and places ``[T, D]`` int32, -1 for none, of what is added behind the results, unweighted.
    The rows of results, out and more are contiguous, but may lie apart.
    """
    tokens, top_k = rows.shape
    hidden = results.shape[1]
    out = results.new_empty(tokens, hidden) if out is None else out
    if not tokens:
        return out
    experts = 0 if centroids is None else len(centroids)
    others, places = more or (results, rows)
    grid, shape = _tiles(tokens, hidden, 4) if not experts else _tiles(tokens, hidden, 16, 128)
    launch(
        _combine_kernel,
        grid,
        *(results, rows, results if gates is None else gates, results if base is None else base),
        *(results if logits is None else logits, results if centroids is None else centroids),
        *(others, places, out, tokens),
        H=hidden,
        K=top_k,
        D=places.shape[1] if more else 0,
        N=experts,
        BN=min(max(16, power_of_2(experts)), 256),
        R=results.stride(0),
        M=others.stride(0) if more else 0,
        Y=out.stride(0),
        SOME=some,
        GATES=gates is not None,
        BASE=base is not None,
        PRECISION="ieee" if results.dtype == torch.float32 else "tf32",
        num_warps=4,
        **shape,
    )
    return out


def swiglu(hidden: Tensor) -> Tensor:
    """``[R, 2F] -> [R, F]``: silu of the first half times the second, computed in float32."""
    rows, double = hidden.shape
    out = hidden.new_empty(rows, double // 2)
    if rows:
        tile, width = 32, 128
        grid = (tiles(rows, tile), tiles(double // 2, width))
        launch(_swiglu_kernel, grid, hidden, out, rows, F=double // 2, TILE=tile, BF=width, num_warps=4)
    return out


def swiglu_backward(
    hidden: Tensor, d_act: Tensor, gates: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Backward of :func:`swiglu` of rows that are weighted afterwards, with the activation computed again.

    hidden: ``[R, 2F]``. d_act: ``[R, F]``, the gradient as if the weight were 1. gates: float32; the weight of row r is
    ``gates.flatten()[order[r]]`` (order: ``[R]`` int32), 1 without. Returns the gradient of hidden ``[R, 2F]``, the
    weighted activation ``[R, F]``, and with gates the gradient of each row's weight ``[R]`` float32.
    """
    rows, double = hidden.shape
    d_hidden, act = torch.empty_like(hidden), torch.empty_like(d_act)
    d_gates = None if gates is None else torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows:
        tile, width = 16, 128
        launch(
            _swiglu_backward_kernel,
            (tiles(rows, tile),),
            hidden,
            d_act,
            hidden if gates is None else gates,
            hidden if order is None else order,
            d_hidden,
            act,
            hidden if d_gates is None else d_gates,
            rows,
            F=double // 2,
            TILE=tile,
            BF=width,
            GATES=gates is not None,
            num_warps=4,
        )
    return d_hidden, act, d_gates


def _tiles(tokens: int, hidden: int, tile: int, width: int = 1024) -> tuple[tuple[int, int], dict[str, int]]:
    width = min(width, power_of_2(hidden))
    return (tiles(tokens, tile), tiles(hidden, width)), {"TILE": tile, "BH": width}


@triton.jit(do_not_specialize=["tokens", "first"], do_not_specialize_on_alignment=["rows"])
def _expand_kernel(
    x,
    more,
    rows,
    out,
    tokens,
    first,
    H: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    Z: tl.constexpr,
    SOME: tl.constexpr,
    TILE: tl.constexpr,
    BH: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    there = t < tokens
    inside = there[:, None] & (h[None, :] < H)
    if Z:  # of two parts
        own, other = inside & (t < first)[:, None], inside & (t >= first)[:, None]
        b_x = tl.load(x + t[:, None] * X + h[None, :], mask=own, other=0.0)
        b_x = tl.where(own, b_x, tl.load(more + (t - first)[:, None] * Z + h[None, :], mask=other, other=0.0))
    else:
        b_x = tl.load(x + t[:, None] * X + h[None, :], mask=inside, other=0.0)
    for k in tl.static_range(K):
        row = tl.load(rows + t * K + k, mask=there, other=0).to(tl.int64)
        wanted = inside & (row >= 0)[:, None] if SOME else inside
        tl.store(out + row[:, None] * Y + h[None, :], b_x, mask=wanted)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["rows", "gates", "places"])
def _combine_kernel(
    results,
    rows,
    gates,
    base,
    logits,
    centroids,
    others,
    places,
    out,
    tokens,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    Y: tl.constexpr,
    SOME: tl.constexpr,
    GATES: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BH: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    there = t < tokens
    inside = there[:, None] & (h[None, :] < H)
    acc = tl.zeros([TILE, BH], tl.float32)
    if BASE:
        acc += tl.load(base + t[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows + t * K + k, mask=there, other=0).to(tl.int64)
        wanted = inside & (row >= 0)[:, None] if SOME else inside
        b_row = tl.load(results + row[:, None] * R + h[None, :], mask=wanted, other=0.0).to(tl.float32)
        if GATES:
            b_row *= tl.load(gates + t * K + k, mask=there, other=0.0)[:, None]
        acc += b_row
    for d in tl.static_range(D):
        row = tl.load(places + t * D + d, mask=there, other=-1).to(tl.int64)
        wanted = inside & (row >= 0)[:, None]
        acc += tl.load(others + row[:, None] * M + h[None, :], mask=wanted, other=0.0).to(tl.float32)
    for start in tl.static_range(0, N, BN):  # of many experts, all centroids would not fit into shared memory
        e = start + tl.arange(0, BN)
        b_l = tl.load(logits + t[:, None] * N + e[None, :], mask=there[:, None] & (e[None, :] < N), other=0.0)
        b_c = tl.load(centroids + e[:, None] * H + h[None, :], mask=(e[:, None] < N) & (h[None, :] < H), other=0.0)
        acc = tl.dot(b_l, b_c, acc, input_precision=PRECISION)
    tl.store(out + t[:, None] * Y + h[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(hidden, out, rows, F: tl.constexpr, TILE: tl.constexpr, BF: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (r[:, None] < rows) & (f[None, :] < F)
    at = hidden + r[:, None] * (2 * F) + f[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    act = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + r[:, None] * F + f[None, :], act.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward_kernel(
    hidden,
    d_act,
    gates,
    order,
    d_hidden,
    act,
    d_gates,
    rows,
    F: tl.constexpr,
    TILE: tl.constexpr,
    BF: tl.constexpr,
    GATES: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = r < rows
    dtype = act.dtype.element_ty
    weight = tl.zeros([TILE], tl.float32) + 1.0
    if GATES:
        weight = tl.load(gates + tl.load(order + r, mask=there, other=0), mask=there, other=0.0)
    d_weight = tl.zeros([TILE], tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        inside = there[:, None] & (f[None, :] < F)
        at = r[:, None] * (2 * F) + f[None, :]
        half = r[:, None] * F + f[None, :]
        gate = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(hidden + at + F, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_act + half, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        b_act = silu * up
        if GATES:
            d_weight += tl.sum(b_act * d, 1)
        d *= weight[:, None]
        tl.store(act + half, (b_act * weight[:, None]).to(dtype), mask=inside)
        tl.store(d_hidden + at, (d * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=inside)
        tl.store(d_hidden + at + F, (d * silu).to(dtype), mask=inside)
    if GATES:
        tl.store(d_gates + r, d_weight, mask=there)
