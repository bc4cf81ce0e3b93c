"""Writing to the paged cache of NSA, in Triton: what a step's tokens leave there takes one launch, and the compressed
rows two more beside the products of φ. A decode step is short of time for launches, not for numbers.

Results are PyTorch's bits: products and sums are rounded one by one, which ``enable_fp_fusion=False`` asks for. Up to
``FEW_ROWS`` compressed rows are computed by :mod:`shoal.kernels.nsa.triton_phi` instead, to rounding.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.hopper import begins_ahead
from shoal.kernels.launches import launch
from shoal.kernels.nsa.paged import PagedCache
from shoal.kernels.nsa.paged_store import Compressed, Heads, Phi
from shoal.kernels.nsa.triton_phi import triton_compress_few
from shoal.kernels.nsa.triton_select import padded
from shoal.kernels.triton_rope import turned

TILE = 8  # query heads of a program
FEW_ROWS = 16
"""Compressed rows up to which φ takes two launches of its own, in 16 bits; its sums have another order than PyTorch's.
0: never."""


def triton_store_tokens(
    heads: Heads, rotation: tuple[Tensor, Tensor], cache: PagedCache, far: Tensor, near: Tensor
) -> Tensor:
    """What :func:`shoal.kernels.nsa.paged_store.store_tokens` does and returns."""
    q, k, v = (x.contiguous() for x in (heads.q, heads.k, heads.v))
    (tokens, count, dim), (branches, kv, dim_v) = q.shape, v.shape[1:]
    out = torch.empty_like(q)
    if not tokens:
        return out
    launch(
        _tokens_kernel,
        (tokens, triton.cdiv(count, TILE) + 2 * branches),
        *(q, k, v, *rotation, far, near, out),
        *(cache.k_raw, cache.k_slc, cache.k_win, cache.v_raw, cache.v_slc, cache.v_win),
        H=count,
        TILE=TILE,
        KV=kv,
        KVP=padded(kv, least=1),
        enable_fp_fusion=False,
        **_widths(dim, dim_v),
        **begins_ahead(q),
    )
    return out


def triton_store_compressed(new: Compressed, cache: PagedCache, phi: tuple[Phi, Phi]) -> None:
    """What :func:`shoal.kernels.nsa.paged_store.store_compressed` does."""
    rows, block = new.raw_page.shape
    kv, page, dim_v = cache.v_raw.shape[1:]
    if not rows:
        return
    if rows <= FEW_ROWS and phi[0].w1.element_size() == 2:
        triton_compress_few(new, cache, phi, FEW_ROWS)
        return
    shape = {"KV": kv, **_widths(cache.k_raw.shape[3], dim_v)}
    k_blocks, v_blocks = (
        torch.empty(kv, rows, block * x.shape[3], dtype=torch.promote_types(x.dtype, p.position.dtype), device=x.device)
        for x, p in zip((cache.k_raw, cache.v_raw), phi, strict=True)
    )
    launch(
        _blocks_kernel,
        (rows, kv, 2),
        *(cache.k_raw, cache.v_raw, *(p.position.contiguous() for p in phi), new.raw_page, new.raw_row),
        *(k_blocks, v_blocks, rows),
        PAGE=page,
        L=block,
        LP=padded(block, least=1),
        **shape,
    )
    k, v = (p.of(blocks).contiguous() for p, blocks in zip(phi, (k_blocks, v_blocks), strict=True))
    launch(
        _compressed_kernel,
        (rows, 2),
        *(k, v, *new.rotation, new.index, cache.k_cmp, cache.v_cmp, rows),
        KVP=padded(kv, least=1),
        enable_fp_fusion=False,
        **shape,
    )


def _widths(dim: int, dim_v: int) -> dict[str, int]:
    """Of half a key and of a value, and the powers of two that hold them."""
    return {"HALF": dim // 2, "HALFP": padded(dim // 2, least=1), "E": dim_v, "EP": padded(dim_v, least=1)}


@triton.jit
def _copy_rows(x, rows, out, places, there, E: tl.constexpr, EP: tl.constexpr):
    """Rows of x ``[…, E]`` to places of out ``[…, E]``."""
    o_e = tl.arange(0, EP)
    inside = there[:, None] & (o_e < E)[None, :]
    b_x = tl.load(x + rows[:, None] * E + o_e[None, :], mask=inside)
    tl.store(out + places[:, None] * E + o_e[None, :], b_x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_rows(x, rows, cos, sin, n, out, places, there, HALF: tl.constexpr, HALFP: tl.constexpr):
    """The same of rows of two halves, rotated by the angles of row n."""
    o_d = tl.arange(0, HALFP)
    inside = there[:, None] & (o_d < HALF)[None, :]
    b_cos = tl.load(cos + n * HALF + o_d, mask=o_d < HALF, other=0.0)[None, :]
    b_sin = tl.load(sin + n * HALF + o_d, mask=o_d < HALF, other=0.0)[None, :]
    p_x, p_out = x + rows[:, None] * (2 * HALF) + o_d[None, :], out + places[:, None] * (2 * HALF) + o_d[None, :]
    first = tl.load(p_x, mask=inside, other=0.0).to(b_cos.dtype)
    second = tl.load(p_x + HALF, mask=inside, other=0.0).to(b_cos.dtype)
    first, second = turned(first, second, b_cos, b_sin)
    # Rounded to the type of x first, whatever out's.
    first, second = first.to(x.dtype.element_ty), second.to(x.dtype.element_ty)
    tl.store(p_out, first.to(out.dtype.element_ty), mask=inside)
    tl.store(p_out + HALF, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tokens_kernel(
    q,
    k,
    v,
    cos,
    sin,
    far,
    near,
    out,
    k_raw,
    k_slc,
    k_win,
    v_raw,
    v_slc,
    v_win,
    H: tl.constexpr,
    TILE: tl.constexpr,
    KV: tl.constexpr,
    KVP: tl.constexpr,
    HALF: tl.constexpr,
    HALFP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One token: some of its query heads, or the keys or the values of one branch."""
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles: tl.constexpr = (H + TILE - 1) // TILE
    if i < tiles:
        o_h = i * TILE + tl.arange(0, TILE)
        _rotate_rows(q, n * H + o_h, cos, sin, n, out, n * H + o_h, o_h < H, HALF, HALFP)
        return
    branch, o_h = (i - tiles) % 3, tl.arange(0, KVP)
    there, rows = o_h < KV, (n * 3 + branch) * KV + o_h
    index = near
    if branch == 1:
        index = far
    places = tl.load(index + n * KV + o_h, mask=there, other=0)
    if i - tiles == 0:
        _copy_rows(k, rows, k_raw, places, there, 2 * HALF, 2 * HALFP)
    elif i - tiles < 3:
        kept = k_win
        if branch == 1:
            kept = k_slc
        _rotate_rows(k, rows, cos, sin, n, kept, places, there, HALF, HALFP)
    else:
        kept = v_win
        if branch == 0:
            kept = v_raw
        elif branch == 1:
            kept = v_slc
        _copy_rows(v, rows, kept, places, there, E, EP)


@triton.jit
def _take_block(
    raw,
    position,
    pages,
    rows,
    out,
    r,
    h,
    count,
    KV: tl.constexpr,
    PAGE: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """Block r of KV head h, with the position added, from rows of pages that lie anywhere."""
    o_l, o_e = tl.arange(0, LP), tl.arange(0, EP)
    in_l = o_l < L
    inside = in_l[:, None] & (o_e < E)[None, :]
    page = tl.load(pages + r * L + o_l, mask=in_l, other=0)
    place = (page * KV + h) * PAGE + tl.load(rows + r * L + o_l, mask=in_l, other=0)
    b_x = tl.load(raw + place[:, None] * E + o_e[None, :], mask=inside, other=0.0).to(tl.float32)
    b_x += tl.load(position + (h * L + o_l)[:, None] * E + o_e[None, :], mask=inside, other=0.0).to(tl.float32)
    p_out = out + ((h * count + r) * L + o_l)[:, None] * E + o_e[None, :]
    tl.store(p_out, b_x.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _blocks_kernel(
    k_raw,
    v_raw,
    k_position,
    v_position,
    pages,
    rows,
    k_out,
    v_out,
    count,
    PAGE: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    HALFP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """What φ takes of one compressed row and KV head: its keys or its values."""
    r, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.program_id(2) == 0:
        _take_block(
            k_raw, k_position, pages, rows, k_out, r, h, count, KV, PAGE, L, LP, 2 * HALF, 2 * HALFP
        )  # fmt: skip
    else:
        _take_block(v_raw, v_position, pages, rows, v_out, r, h, count, KV, PAGE, L, LP, E, EP)


@triton.jit(do_not_specialize=["count"])
def _compressed_kernel(
    k,
    v,
    cos,
    sin,
    index,
    k_cmp,
    v_cmp,
    count,
    KV: tl.constexpr,
    KVP: tl.constexpr,
    HALF: tl.constexpr,
    HALFP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """The compressed keys or values of one row, which φ made by heads, to their page."""
    r, o_h = tl.program_id(0).to(tl.int64), tl.arange(0, KVP)
    there, rows = o_h < KV, o_h * count.to(tl.int64) + r
    places = tl.load(index + r * KV + o_h, mask=there, other=0)
    if tl.program_id(1) == 0:
        _rotate_rows(k, rows, cos, sin, r, k_cmp, places, there, HALF, HALFP)
    else:
        _copy_rows(v, rows, v_cmp, places, there, E, EP)
