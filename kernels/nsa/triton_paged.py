"""NSA over a paged cache, in Triton: single queries, as a decode step has them, and chunks of a prompt.

Single queries take four launches, each with work for many programs even when there is one query: partial outputs of
compressed rows and what importance needs of them, the choice, partial outputs of chosen and window pages, their sum.
Each launch may begin before the one before it has ended, and waits inside for what that one writes. Nothing is read by
the host and no size depends on how long the sequences are, only on how many pages the tables have room for: a CUDA
graph can hold it. A chunk's keys and values are copied out of their pages and read by the kernels of training.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from shoal.kernels.hopper import begins_ahead
from shoal.kernels.nsa.layout import BlockSizes
from shoal.kernels.nsa.paged import DecodeTables, HiddenGates, PagedCache
from shoal.kernels.nsa.triton_forward import ForwardTuning, attend
from shoal.kernels.nsa.triton_paged_choose import choose_kernel
from shoal.kernels.nsa.triton_paged_copy import copy_rows
from shoal.kernels.nsa.triton_paged_parts import compressed_rows_kernel, pages_kernel
from shoal.kernels.nsa.triton_paged_sum import sum_branches
from shoal.kernels.nsa.triton_select import LOG2E, halves, padded, precision
from shoal.kernels.nsa.triton_tables import chunk_tables

MOST = 32  # programs that share a head's compressed rows: their outputs are added up by one program


@dataclass(frozen=True)
class PagedTuning:
    """rows: compressed rows of a tile. programs: how many run at a time, about. blocks: whose importance one adds up.
    warps, stages: of a program that reads compressed rows, and of one that reads pages. ahead: whether a launch may
    begin before the one before it has ended, where the GPU can do that."""

    rows: int = 64
    programs: int = 384
    blocks: int = 64
    warps: tuple[int, int] = (4, 4)
    stages: tuple[int, int] = (3, 3)
    ahead: bool = True


@lru_cache(maxsize=1024)
def _shared(heads: int, tiles: int, programs: int) -> int:
    """How many programs share the tiles of each head, so that those which run at a time end at one time, about."""

    def cost(splits: int) -> int:
        return triton.cdiv(heads * splits, programs) * (triton.cdiv(tiles, splits) + 1)

    best = min(range(1, min(tiles, MOST) + 1), key=cost)
    return triton.cdiv(tiles, triton.cdiv(tiles, best))


@lru_cache(maxsize=1024)
def _at_once(heads: int, count: int, windows: int, programs: int) -> int:
    """How many pages a program takes, of those chosen for each head and of its window."""

    def cost(each: int) -> int:
        return triton.cdiv(heads * (triton.cdiv(count, each) + triton.cdiv(windows, each)), programs) * (each + 1)

    return min(range(1, max(count, windows) + 1), key=cost)


def triton_paged_decode(
    q: Tensor,
    gates: Tensor | HiddenGates,
    cache: PagedCache,
    tables: DecodeTables,
    sizes: BlockSizes,
    scale: float,
    tuning: PagedTuning | None = None,
) -> Tensor:
    """What :func:`shoal.kernels.nsa.paged.paged_decode` returns, from the same arguments. scale: above 0.

    On a Hopper GPU the last kernel launched before must not be what writes ``tables.positions``, unless the host waited
    for it: they are read before that one has ended.
    """
    tuning = tuning or PagedTuning()
    n, heads, dim = q.shape
    kv, dim_v = cache.v_slc.shape[1], cache.v_slc.shape[3]
    pages, windows = tables.far.shape[-1], tables.near.shape[-1]
    per, skipped, count = sizes.slc_block // sizes.cmp_stride, sizes.cmp_block // sizes.cmp_stride - 1, sizes.slc_count
    out = q.new_empty(n, heads, dim_v)
    if not n:
        return out
    # Nothing is copied between launches: the last one reads gates before it waits for the one before.
    q, gates, group = q.contiguous(), gates.contiguous(), heads // kv
    tile = padded(tuning.rows // per, least=1)  # pages of a tile
    tiles, lags = triton.cdiv(pages, tile), 1 + triton.cdiv(skipped, per)
    splits = _shared(n * kv, tiles, tuning.programs)
    each = _at_once(n * kv, count, windows, tuning.programs)
    chosen_parts = triton.cdiv(count, each)
    parts = splits + chosen_parts + triton.cdiv(windows, each)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(n, kv, *shape, dtype=dtype, device=q.device)

    part, tops, totals = empty(parts, group, dim_v), empty(parts, group), empty(parts, group)
    sums, edges, bases = empty(pages, group), empty(tiles, group), empty(tiles, group)
    # By powers of two of the pages, for which kernels are compiled beforehand.
    wide = padded(pages, least=1)
    blocks = max(tile, min(tuning.blocks * max(1, wide // 4096), wide))
    sharers, free = triton.cdiv(pages, blocks), count - sizes.slc_initial - sizes.slc_local
    best, arrivals = empty(sharers, free, 2, dtype=torch.int32), empty(dtype=torch.int32)
    chosen = empty(count, dtype=torch.int32)
    launch: dict[str, Any] = begins_ahead(q, tuning.ahead)
    # What grows with the sequences is no constant of a kernel: it would be compiled again and again while serving.
    shape = {"KV": kv, "G": group, "GP": padded(group)}
    widths = {"E": dim_v, "EP": padded(dim_v), "PRECISION": precision(q.dtype), **halves(dim)}
    rows = {"PER": per, "STRIDE": sizes.cmp_stride, "LAGS": lags, "TILE": tile}
    compressed_rows_kernel[(n * kv, splits)](
        *(q, cache.k_cmp, cache.v_cmp, tables.positions, tables.far, sums, edges, bases, arrivals, part, tops, totals),
        *(scale * LOG2E, pages, triton.cdiv(tiles, splits), parts),
        PER_P=padded(per, least=1),
        SKIPPED=skipped,
        num_warps=tuning.warps[0],
        num_stages=tuning.stages[0],
        **shape,
        **widths,
        **rows,
        **launch,
    )
    choose_kernel[(n * kv, sharers)](
        *(sums, edges, bases, tops, totals, tables.positions, best, arrivals, chosen, pages, splits, parts),
        SP=MOST,
        EACH=blocks,
        CP=padded(triton.cdiv(wide, blocks) * free, least=1),
        BLOCK=sizes.slc_block,
        COUNT=count,
        INITIAL=sizes.slc_initial,
        LOCAL=sizes.slc_local,
        num_warps=1,
        **shape,
        **rows,
        **launch,
    )
    pages_kernel[(n * kv, parts - splits)](
        *(q, cache.k_slc, cache.v_slc, cache.k_win, cache.v_win, tables.positions, tables.far, tables.near),
        *(tables.near_first, chosen, part, tops, totals, scale * LOG2E, pages, windows, splits, parts, each),
        COUNT=count,
        WINDOW=sizes.window,
        BLOCK=sizes.slc_block,
        BN=padded(sizes.slc_block),
        num_warps=tuning.warps[1],
        num_stages=tuning.stages[1],
        **shape,
        **widths,
        **launch,
    )
    sum_branches((part, tops, totals), gates, out, (splits, splits + chosen_parts), group, launch)
    return out


def triton_paged_prefill(
    q: Tensor,
    gates: Tensor,
    cache: PagedCache,
    position: int,
    far: Tensor,
    near: Tensor,
    near_first: int,
    sizes: BlockSizes,
    scale: float,
    tuning: ForwardTuning | None = None,
) -> Tensor:
    """What :func:`shoal.kernels.nsa.paged.paged_prefill` returns, from the same arguments. scale: above 0."""
    far = far[: sizes.slc_blocks(position + q.shape[0])]
    skipped = sizes.cmp_block // sizes.cmp_stride - 1  # rows that do not exist
    k_cmp, v_cmp = (x[skipped:] for x in copy_rows(cache.k_cmp, cache.v_cmp, far))
    k_slc, v_slc = copy_rows(cache.k_slc, cache.v_slc, far)
    k_win, v_win = copy_rows(cache.k_win, cache.v_win, near)
    tables = chunk_tables(position, q.shape[0], near_first, sizes, q.device)
    tensors = (q.contiguous(), k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates.contiguous())
    return attend(*tensors, tables, scale, tuning or ForwardTuning()).out
