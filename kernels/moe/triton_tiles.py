"""Which rows each tile of a grouped product takes, worked out on the device."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import current_place, launch, power_of_2


@dataclass(frozen=True)
class Tiles:
    """Tiles of at most ``size`` rows, none with rows of two groups. table: ``[3, most]`` int32: of each tile its first
    row, the end of its group's rows, and its group; undefined after the last. count: ``[1]`` int32, how many there are.
    """

    size: int
    most: int
    table: Tensor
    count: Tensor


def tiles_of(ends: Tensor | None, rows: int, size: int, device: torch.device | None = None) -> Tiles:
    """ends: ``[E]`` int32, where each group of the sorted ``rows`` ends; none: they are one group, on ``device``."""
    if ends is not None:
        return _found(ends, rows, size, ends.device)
    # A graph finds its own: it would go on reading memory of kept ones that were given up since, and what it finds is
    # not there for others until it is replayed.
    if device is None or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _found(None, rows, size, device)
    key = (rows, size, device, *current_place())
    kept = _whole.get(key)
    if kept is None:
        if len(_whole) >= MOST_KEPT:
            _whole.clear()
        kept = _whole[key] = _found(None, rows, size, device)
    return kept


_whole: dict[tuple[Any, ...], Tiles] = {}
"""Of rows that are one group, by their number, the tiles' size, where they lie, and the GPU and the stream on which
they were found."""

MOST_KEPT = 64


def _found(ends: Tensor | None, rows: int, size: int, device: torch.device | None) -> Tiles:
    groups = 1 if ends is None else ends.shape[0]
    most = rows // size + min(groups, rows)
    table = torch.empty(3, most, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    launch(
        _tiles_kernel,
        (groups,),
        count if ends is None else ends,
        table,
        count,
        most,
        rows,
        E=groups,
        EP=power_of_2(groups),
        SIZE=size,
        CHUNK=128,
        GIVEN=ends is not None,
        num_warps=2,
    )
    return Tiles(size, most, table, count)


@triton.jit(do_not_specialize=["most", "rows"])
def _tiles_kernel(
    ends,
    table,
    count,
    most,
    rows,
    E: tl.constexpr,
    EP: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Writes the tiles of one group."""
    own = tl.program_id(0)
    e = tl.arange(0, EP)
    b_start = tl.zeros([EP], tl.int32)
    b_end = b_start + rows
    if GIVEN:
        b_end = tl.load(ends + e, mask=e < E, other=0)
        b_start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (b_end - b_start + SIZE - 1) // SIZE, 0)
    first = tl.sum(tl.where(e < own, tiles, 0), 0)
    number = tl.sum(tl.where(e == own, tiles, 0), 0)
    start = tl.sum(tl.where(e == own, b_start, 0), 0)
    end = tl.sum(tl.where(e == own, b_end, 0), 0)
    for i in range(0, number, CHUNK):
        at = i + tl.arange(0, CHUNK)
        there = at < number
        zeros = tl.zeros([CHUNK], tl.int32)
        tl.store(table + first + at, start + at * SIZE, mask=there)
        tl.store(table + most + first + at, zeros + end, mask=there)
        tl.store(table + 2 * most + first + at, zeros + own, mask=there)
    if own == 0:
        tl.store(count, tl.sum(tiles, 0))
