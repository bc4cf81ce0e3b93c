"""What the layers of a decode step read of its rows, worked out in one launch: where keys go, pages by heads, angles of
RoPE, and what φ takes. In PyTorch's operations it is some eighty launches, in a step of a few hundred."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch
from shoal.kernels.nsa.layout import BlockSizes
from shoal.kernels.nsa.paged import DecodeTables
from shoal.kernels.nsa.paged_store import Compressed
from shoal.kernels.nsa.triton_select import padded

WIDTH = 256  # pages that are copied at a time


@dataclass(frozen=True)
class RowPlaces:
    """far, near: ``[B, KV]``, where each token's rows go. rotation: cosines and sines ``[B, d/2]``. tables: of single
    queries. compressed: a compressed row for every token, those that do not end on a page that nobody reads; None where
    none was asked for."""

    far: Tensor
    near: Tensor
    rotation: tuple[Tensor, Tensor]
    tables: DecodeTables
    compressed: Compressed | None


def triton_row_places(
    positions: Tensor,
    near_start: Tensor,
    far: Tensor,
    near: Tensor,
    rates: Tensor,
    kv: int,
    sizes: BlockSizes,
    dtype: torch.dtype,
    scratch: int | None,
) -> RowPlaces:
    """positions, near_start (the number of the first near page): ``[B]``; far: ``[B, P]``, near: ``[B, W]``, pages; all
    int64, contiguous. rates: ``[d/2 + 1]`` float64: RoPE's angles a token, and the factor on cosines and sines. dtype:
    of these. scratch: the far page of compressed rows that do not end; None: no compressed rows.
    """
    (count, pages), windows, half, device = far.shape, near.shape[1], len(rates) - 1, far.device

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    cos, sin, first_cos, first_sin = (torch.empty(count, half, dtype=dtype, device=device) for _ in range(4))
    to_far, to_near, to_compressed, first = ints(count, kv), ints(count, kv), ints(count, kv), ints(count)
    by_far, by_near = ints(count, kv, pages), ints(count, kv, windows)
    raw_page, raw_row = ints(count, sizes.cmp_block), ints(count, sizes.cmp_block)
    if count:
        launch(
            _places_kernel,
            (count,),
            *(positions, near_start, far, near, rates, to_far, to_near, first, by_far, by_near, cos, sin),
            *(to_compressed, raw_page, raw_row, first_cos, first_sin, scratch or 0, pages, windows),
            KV=kv,
            KVP=padded(kv, least=1),
            PAGE=sizes.slc_block,
            STRIDE=sizes.cmp_stride,
            L=sizes.cmp_block,
            LP=padded(sizes.cmp_block, least=1),
            HALF=half,
            HALFP=padded(half, least=1),
            COMPRESS=scratch is not None,
            WIDTH=WIDTH,
        )
    new = Compressed(to_compressed, raw_page, raw_row, (first_cos, first_sin))
    tables = DecodeTables(positions, by_far, by_near, first, sizes)
    return RowPlaces(to_far, to_near, (cos, sin), tables, None if scratch is None else new)


@triton.jit
def _angles(rates, t, cos, sin, n, HALF: tl.constexpr, HALFP: tl.constexpr):
    """RoPE's cosines and sines at position t to row n."""
    o_d = tl.arange(0, HALFP)
    inside = o_d < HALF
    angle = t.to(tl.float64) * tl.load(rates + o_d, mask=inside, other=0.0)
    size = tl.load(rates + HALF)
    tl.store(cos + n * HALF + o_d, (size * tl.cos(angle)).to(cos.dtype.element_ty), mask=inside)
    tl.store(sin + n * HALF + o_d, (size * tl.sin(angle)).to(sin.dtype.element_ty), mask=inside)


@triton.jit
def _by_heads(pages, out, n, count, KV: tl.constexpr, KVP: tl.constexpr, WIDTH: tl.constexpr):
    """A row of pages as an index of ``by_head``."""
    o_h = tl.arange(0, KVP)
    for start in range(0, count, WIDTH):
        o_p = start + tl.arange(0, WIDTH)
        b_page = tl.load(pages + n * count + o_p, mask=o_p < count, other=0)
        inside = (o_h < KV)[:, None] & (o_p < count)[None, :]
        place = out + (n * KV + o_h)[:, None] * count + o_p[None, :]
        tl.store(place, b_page[None, :] * KV + o_h[:, None], mask=inside)


@triton.jit(do_not_specialize=["scratch", "pages", "windows"])
def _places_kernel(
    positions,
    near_start,
    far,
    near,
    rates,
    to_far,
    to_near,
    first,
    by_far,
    by_near,
    cos,
    sin,
    to_compressed,
    raw_page,
    raw_row,
    first_cos,
    first_sin,
    scratch,
    pages,
    windows,
    KV: tl.constexpr,
    KVP: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    HALF: tl.constexpr,
    HALFP: tl.constexpr,
    COMPRESS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row."""
    n, o_h = tl.program_id(0).to(tl.int64), tl.arange(0, KVP)
    t, start = tl.load(positions + n), tl.load(near_start + n)
    in_h = o_h < KV
    page = tl.load(far + n * pages + t // PAGE)
    tl.store(to_far + n * KV + o_h, (page * KV + o_h) * PAGE + t % PAGE, mask=in_h)
    page = tl.load(near + n * windows + t // PAGE - start)
    tl.store(to_near + n * KV + o_h, (page * KV + o_h) * PAGE + t % PAGE, mask=in_h)
    tl.store(first + n, start * PAGE)
    _by_heads(far, by_far, n, pages, KV, KVP, WIDTH)
    _by_heads(near, by_near, n, windows, KV, KVP, WIDTH)
    _angles(rates, t, cos, sin, n, HALF, HALFP)
    if COMPRESS:
        # Row c ends with key (c + 1) · d - 1 and has l keys; the first ones do not exist.
        PER: tl.constexpr = PAGE // STRIDE
        row = tl.maximum((t + 1) // STRIDE - 1, 0)
        begin = (row + 1) * STRIDE - L
        ends = ((t + 1) % STRIDE == 0) & (begin >= 0)
        page = tl.where(ends, tl.load(far + n * pages + row // PER), scratch)
        tl.store(to_compressed + n * KV + o_h, (page * KV + o_h) * PER + row % PER, mask=in_h)
        o_l = tl.arange(0, LP)
        key = tl.maximum(begin + o_l, 0)
        window = tl.minimum(tl.maximum(key // PAGE - start, 0), windows - 1)
        b_page = tl.load(near + n * windows + window, mask=o_l < L, other=0)
        tl.store(raw_page + n * L + o_l, b_page, mask=o_l < L)
        tl.store(raw_row + n * L + o_l, key % PAGE, mask=o_l < L)
        _angles(rates, tl.maximum(begin, 0), first_cos, first_sin, n, HALF, HALFP)
