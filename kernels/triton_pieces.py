"""Tensors made of pieces of others, in Triton: one launch for two tensors, whatever the number of pieces."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2, tiles
from shoal.kernels.pieces import Pieces

MOST = 4096  # numbers of a tile


def put_together(pieces: Pieces, own: Sequence[Tensor], came: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """As :func:`shoal.kernels.pieces.put_together`."""
    own = [_rows(x) for x in own]
    widths = [prod(x.shape[1:]) for x in out]
    block = min(power_of_2(max(widths)), MOST)
    tile = MOST // block
    across = tiles(max(widths), block)
    launch(
        _pieces_kernel,
        (tiles(pieces.count, tile), across, len(out)),
        pieces.table(out[0].device),
        *(side[i] for side in (own, came, out) for i in (0, -1)),
        *(side[i].stride(0) for side in (own, came, out) for i in (0, -1)),
        widths[0],
        widths[-1],
        pieces.count,
        len(pieces.pieces),
        TILE=tile,
        BLOCK=block,
        num_warps=4,
    )


def _rows(x: Tensor) -> Tensor:
    """The same with rows that are contiguous."""
    width = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != width:
            return x.contiguous()
        width *= size
    return x


@triton.jit(do_not_specialize=["count", "pieces"])  # which every batch of documents has others of
def _pieces_kernel(
    pieces_ptr,
    own_0,
    own_1,
    came_0,
    came_1,
    out_0,
    out_1,
    own_stride_0,
    own_stride_1,
    came_stride_0,
    came_stride_1,
    out_stride_0,
    out_stride_1,
    width_0,
    width_1,
    count,
    pieces,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(2) == 0:
        strides = own_stride_0, came_stride_0, out_stride_0
        _put(pieces_ptr, own_0, came_0, out_0, strides, width_0, count, pieces, TILE, BLOCK)
    else:
        strides = own_stride_1, came_stride_1, out_stride_1
        _put(pieces_ptr, own_1, came_1, out_1, strides, width_1, count, pieces, TILE, BLOCK)


@triton.jit
def _put(pieces_ptr, own, came, out, strides, width, count, pieces, TILE: tl.constexpr, BLOCK: tl.constexpr):
    own_stride, came_stride, out_stride = strides
    first = tl.program_id(0) * TILE
    rows = first + tl.arange(0, TILE)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < width
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for piece in range(pieces):
        start = tl.load(pieces_ptr + 4 * piece)
        stop = tl.load(pieces_ptr + 4 * piece + 1)
        if (start < first + TILE) & (stop > first):
            read = (rows + tl.load(pieces_ptr + 4 * piece + 2)).to(tl.int64)[:, None]
            mask = ((rows >= start) & (rows < stop))[:, None] & there[None]
            if tl.load(pieces_ptr + 4 * piece + 3) == 0:
                total += tl.load(own + read * own_stride + columns[None], mask, 0.0).to(tl.float32)
            else:
                total += tl.load(came + read * came_stride + columns[None], mask, 0.0).to(tl.float32)
    to = rows.to(tl.int64)[:, None] * out_stride + columns[None]
    tl.store(out + to, total.to(out.dtype.element_ty), (rows < count)[:, None] & there[None])
