"""φ of few compressed rows, as a decode step has them, in two launches that read its weights once, at the memory's
speed: every program has one tile of weights and asks for it before it waits for what the launch before leaves.

Numbers are rounded where PyTorch's operations round them; sums have one order, another one than theirs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from shoal.kernels.hopper import begins_ahead
from shoal.kernels.nsa.paged import PagedCache
from shoal.kernels.nsa.paged_store import Compressed, Phi
from shoal.kernels.nsa.triton_select import padded, precision
from shoal.kernels.triton_rope import turned

SUMMED = 4096  # elements of parts that a program adds to at one time


@dataclass(frozen=True)
class PhiTuning:
    """columns, depth: of a program's tile of w1. pairs: columns of each half of w2 that a program has. warps: of the
    two launches. ahead: whether they may begin before the one before has ended, where the GPU can do that."""

    columns: int = 128
    depth: int = 128
    pairs: int = 64
    warps: tuple[int, int] = (4, 8)
    ahead: bool = True


TUNING = PhiTuning()


def triton_compress_few(
    new: Compressed, cache: PagedCache, phi: tuple[Phi, Phi], most: int, tuning: PhiTuning | None = None
) -> None:
    """What :func:`shoal.kernels.nsa.paged_store.store_compressed` does, to rounding, for up to ``most`` rows, which a
    tile of a product has. Weights in 16 bits: of float32, tiles take more registers than there are.

    Weights and ``new`` are read ahead of what the launch before writes: they must be older than that.
    """
    tuning = tuning or TUNING
    rows, block = new.raw_page.shape
    assert rows <= most, f"{rows} rows, and a tile has {most}"
    if not rows:
        return
    kv, page = cache.v_raw.shape[1:3]
    weights = [x for pair in zip(*((p.position, p.w1, p.w2) for p in phi), strict=True) for x in pair]
    # A copy of weights would be the launch before.
    launch: dict[str, Any] = begins_ahead(cache.k_raw, tuning.ahead and all(x.is_contiguous() for x in weights))
    k_position, v_position, k_w1, v_w1, k_w2, v_w2 = (x.contiguous() for x in weights)
    both = [_Shape.of(p, block, tuning) for p in phi]
    named: dict[str, Any] = {"KV": kv}
    for name in ("D", "W", "BD", "S"):
        named |= {f"K_{name}": getattr(both[0], name), f"V_{name}": getattr(both[1], name)}
    parts = [torch.empty(kv, rows, each.S, each.W, dtype=torch.float32, device=cache.k_raw.device) for each in both]
    columns = min(tuning.columns, padded(max(each.W for each in both)))
    _parts_kernel[(sum(each.S * triton.cdiv(each.W, columns) for each in both), kv)](
        *(cache.k_raw, cache.v_raw, k_position, v_position, k_w1, v_w1, new.raw_page, new.raw_row, *parts, rows),
        PAGE=page,
        L=block,
        M=padded(most),
        BN=columns,
        DEPTH=tuning.depth,
        PRECISION=precision(k_w1.dtype),
        num_warps=tuning.warps[0],
        **named,
        **launch,
    )
    widest = max(padded(each.W) for each in both)
    _sum_parts_kernel[(sum(triton.cdiv(each.half, tuning.pairs) for each in both), kv, rows)](
        *(*parts, k_w2, v_w2, *new.rotation, new.index, cache.k_cmp, cache.v_cmp, rows),
        PAIRS=tuning.pairs,
        WP=widest,
        CHUNK=max(1, SUMMED // widest),
        num_warps=tuning.warps[1],
        **{name: value for name, value in named.items() if "BD" not in name},
        **launch,
    )


@dataclass(frozen=True)
class _Shape:
    """Of φ for keys or values. D, W: of a head and of what is hidden. BD: elements of a head in a tile, the largest
    power of two that divides D, or one that holds it. S: tiles of the depth, and so many parts."""

    D: int
    W: int
    BD: int
    S: int

    @classmethod
    def of(cls, phi: Phi, block: int, tuning: PhiTuning) -> _Shape:
        dim, width = phi.position.shape[2], phi.w1.shape[2]
        divisor = dim & -dim
        piece = min(tuning.depth, divisor if divisor >= 16 else padded(dim))
        return cls(dim, width, piece, triton.cdiv(block, tuning.depth // piece) * triton.cdiv(dim, piece))

    @property
    def half(self) -> int:
        return (self.D + 1) // 2


@triton.jit
def _multiply(
    raw,
    position,
    w1,
    pages,
    rows,
    parts,
    i,
    h,
    count,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    S: tl.constexpr,
    KV: tl.constexpr,
    PAGE: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """All blocks of head h by tile i of its weights: some tokens' elements, or a piece of them, and some columns."""
    TL: tl.constexpr = DEPTH // BD
    PIECES: tl.constexpr = (D + BD - 1) // BD
    split = i % S
    token, element = split // PIECES * TL, split % PIECES * BD
    n = i // S * BN + tl.arange(0, BN)
    o_k, o_r, o_l, o_d = tl.arange(0, DEPTH), tl.arange(0, M), token + tl.arange(0, TL), element + tl.arange(0, BD)
    k_l, k_d = token + o_k // BD, element + o_k % BD
    there = o_r < count
    named = there[:, None] & (o_l < L)[None, :]
    page = tl.load(pages + o_r[:, None] * L + o_l[None, :], mask=named, other=0)
    place = (page * KV + h) * PAGE + tl.load(rows + o_r[:, None] * L + o_l[None, :], mask=named, other=0)
    in_x = named[:, :, None] & (o_d < D)[None, None, :]
    p_position = position + (h * L + o_l)[None, :, None] * D + o_d[None, None, :]
    b_position = tl.load(tl.broadcast_to(p_position, [M, TL, BD]), mask=in_x, other=0.0)
    at = (h * L + k_l).to(tl.int64) * D + k_d
    in_w = ((k_l < L) & (k_d < D))[:, None] & (n < W)[None, :]
    b_w = tl.load(w1 + at[:, None] * W + n[None, :], mask=in_w)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b_x = tl.load(raw + place[:, :, None] * D + o_d[None, None, :], mask=in_x, other=0.0)
    b_x = (b_x.to(tl.float32) + b_position.to(tl.float32)).to(b_w.dtype)
    # Without these choices Triton brings what is loaded to where a product wants it at once, before it loads the rest.
    b_x = tl.where(there[:, None], tl.reshape(b_x, [M, DEPTH]), 0.0)
    acc = tl.dot(b_x, tl.where(in_w, b_w, 0.0), input_precision=PRECISION)
    p_out = parts + ((h * count + o_r) * S + split)[:, None] * W + n[None, :]
    tl.store(p_out, acc, mask=there[:, None] & (n < W)[None, :])


@triton.jit(do_not_specialize=["count"])
def _parts_kernel(
    k_raw,
    v_raw,
    k_position,
    v_position,
    k_w1,
    v_w1,
    pages,
    rows,
    k_parts,
    v_parts,
    count,
    KV: tl.constexpr,
    PAGE: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    DEPTH: tl.constexpr,
    K_D: tl.constexpr,
    K_W: tl.constexpr,
    K_BD: tl.constexpr,
    K_S: tl.constexpr,
    V_D: tl.constexpr,
    V_W: tl.constexpr,
    V_BD: tl.constexpr,
    V_S: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """``[KV, R, S, W]`` float32 of keys and of values: parts of what is hidden in φ, before its activation."""
    i, h = tl.program_id(0), tl.program_id(1)
    K_TILES: tl.constexpr = (K_W + BN - 1) // BN * K_S
    if i < K_TILES:
        _multiply(
            k_raw, k_position, k_w1, pages, rows, k_parts, i, h, count,
            K_D, K_W, K_BD, K_S, KV, PAGE, L, M, BN, DEPTH, PRECISION, AHEAD,
        )  # fmt: skip
    else:
        _multiply(
            v_raw, v_position, v_w1, pages, rows, v_parts, i - K_TILES, h, count,
            V_D, V_W, V_BD, V_S, KV, PAGE, L, M, BN, DEPTH, PRECISION, AHEAD,
        )  # fmt: skip


@triton.jit
def _finish(
    parts,
    w2,
    cos,
    sin,
    index,
    kept,
    i,
    h,
    r,
    count,
    D: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    KV: tl.constexpr,
    PAIRS: tl.constexpr,
    WP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Some elements of both halves of row r of head h, to their page."""
    HALF: tl.constexpr = (D + 1) // 2
    o_w, o_s, o_d = tl.arange(0, WP), tl.arange(0, CHUNK), i * PAIRS + tl.arange(0, PAIRS)
    in_w, in_d = o_w < W, o_d < HALF
    in_d2 = in_d & (HALF + o_d < D)
    p_w = w2 + (h * W + o_w)[:, None] * D + o_d[None, :]
    b_w = tl.load(p_w, mask=in_w[:, None] & in_d[None, :], other=0.0)
    b_w2 = tl.load(p_w + HALF, mask=in_w[:, None] & in_d2[None, :], other=0.0)
    place = tl.load(index + r * KV + h)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([CHUNK, WP], tl.float32)
    for s in tl.static_range(0, S, CHUNK):
        p_parts = parts + ((h * count + r) * S + s + o_s)[:, None] * W + o_w[None, :]
        total += tl.load(p_parts, mask=(s + o_s < S)[:, None] & in_w[None, :], other=0.0)
    x = tl.sum(total, 0).to(w2.dtype.element_ty).to(tl.float32)
    x = (x / (1 + tl.exp(-x))).to(w2.dtype.element_ty).to(tl.float32)
    first = tl.sum(x[:, None] * b_w.to(tl.float32), 0).to(w2.dtype.element_ty)
    second = tl.sum(x[:, None] * b_w2.to(tl.float32), 0).to(w2.dtype.element_ty)
    if ROTATED:
        b_cos = tl.load(cos + r * HALF + o_d, mask=in_d, other=0.0)
        b_sin = tl.load(sin + r * HALF + o_d, mask=in_d, other=0.0)
        first, second = turned(first.to(b_cos.dtype), second.to(b_cos.dtype), b_cos, b_sin)
        first, second = first.to(w2.dtype.element_ty), second.to(w2.dtype.element_ty)
    p_out = kept + place * D + o_d
    tl.store(p_out, first.to(kept.dtype.element_ty), mask=in_d)
    tl.store(p_out + HALF, second.to(kept.dtype.element_ty), mask=in_d2)


@triton.jit(do_not_specialize=["count"])
def _sum_parts_kernel(
    k_parts,
    v_parts,
    k_w2,
    v_w2,
    cos,
    sin,
    index,
    k_cmp,
    v_cmp,
    count,
    KV: tl.constexpr,
    K_D: tl.constexpr,
    K_W: tl.constexpr,
    K_S: tl.constexpr,
    V_D: tl.constexpr,
    V_W: tl.constexpr,
    V_S: tl.constexpr,
    PAIRS: tl.constexpr,
    WP: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """What is hidden, activated, by w2: elements of a row's keys, which are rotated, or of its values."""
    i, h, r = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    K_TILES: tl.constexpr = ((K_D + 1) // 2 + PAIRS - 1) // PAIRS
    if i < K_TILES:
        _finish(
            k_parts, k_w2, cos, sin, index, k_cmp, i, h, r, count,
            K_D, K_W, K_S, KV, PAIRS, WP, CHUNK, True, AHEAD,
        )  # fmt: skip
    else:
        _finish(
            v_parts, v_w2, cos, sin, index, v_cmp, i - K_TILES, h, r, count,
            V_D, V_W, V_S, KV, PAIRS, WP, CHUNK, False, AHEAD,
        )  # fmt: skip
