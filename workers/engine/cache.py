"""The paged caches of a model's layers, and attention over them for the tokens of one step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor, nn

from shoal.kernels.nsa.paged import (
    PagedCache,
    compress_blocks,
    make_cache,
    paged_decode,
    paged_prefill,
    reads_in_place,
    store_rows,
)
from shoal.kernels.paged_full import paged_full_decode, paged_full_prefill
from shoal.kernels.rope import rotate
from shoal.workers.config import Recipe
from shoal.workers.engine.tables import Tables, sizes_of
from shoal.workers.model.attention import FullAttention, NativeSparseAttention, Projected


def reach(recipe: Recipe) -> int:
    """Tokens before a position whose near pages are read: the window's, or those of unfinished compression blocks."""
    a = recipe.attention
    return max(a.window - 1, a.cmp_block - 1, 1) if a.kind == "nsa" else 0


def page_bytes(recipe: Recipe, itemsize: int) -> tuple[int, int]:
    """Bytes of a far and of a near page, over all layers."""
    m, a = recipe.model, recipe.attention
    row = m.layers * m.kv_heads * (m.head_dim + m.v_dim) * itemsize
    if a.kind == "full":
        return a.slc_block * row, 0
    return (a.slc_block + a.slc_block // a.cmp_stride) * row, 2 * a.slc_block * row


def make_caches(recipe: Recipe, far: int, near: int, dtype: torch.dtype, device: torch.device) -> list[PagedCache]:
    """Empty pages, a cache a layer. Full attention uses the pages of the selected branch alone: ``near`` is 0."""
    m, sizes = recipe.model, sizes_of(recipe)
    dims = (m.head_dim, m.v_dim)
    return [make_cache(far, near, m.kv_heads, dims, sizes, dtype, device) for _ in range(m.layers)]


class PagedAttention:
    """Attention of the tokens of a step over the caches, which it writes them to first. ``Attending``, for serving."""

    def __init__(self, tables: Tables, caches: dict[nn.Module, PagedCache]) -> None:
        self.tables, self.caches = tables, caches

    def full(self, layer: FullAttention, x_TH: Tensor) -> Tensor:
        """``[T, hidden] -> [T, H, d_v]``."""
        t, cache = self.tables, self.caches[layer]
        q, k, v = layer.project(x_TH, t.rotation)
        store_rows(cache.k_slc, t.far, k)
        store_rows(cache.v_slc, t.far, v)
        outs = [
            paged_full_decode(q[rows], cache.k_slc, cache.v_slc, d.positions, d.far, layer.scale)
            for rows, d in t.pieces
        ]
        for rows, part, far, _ in t.prefill:
            outs.append(paged_full_prefill(q[rows], cache.k_slc, cache.v_slc, part.start, far, layer.scale))
        return _joined(outs, q.new_empty(0, q.shape[1], v.shape[-1]))

    def nsa(self, layer: NativeSparseAttention, x_TH: Tensor) -> Tensor:
        """``[T, hidden] -> [T, H, d_v]``."""
        t, cache = self.tables, self.caches[layer]
        p = layer.project(x_TH, t.rotation)
        self._store(layer, p, cache)
        backend = t.recipe.attention.backend
        pieces = t.whole if reads_in_place(p.q, cache, backend) else t.pieces
        outs = [paged_decode(p.q[rows], p.gates[rows], cache, d, t.sizes, layer.scale, backend) for rows, d in pieces]
        for rows, part, far, near in t.prefill:
            first = part.near_start * t.sizes.slc_block
            read = (p.q[rows], p.gates[rows], cache, part.start, far, near, first, t.sizes, layer.scale)
            outs.append(paged_prefill(*read, backend=backend))
        return _joined(outs, p.q.new_empty(0, p.q.shape[1], p.v_slc.shape[-1]))

    def _store(self, layer: NativeSparseAttention, p: Projected, cache: PagedCache) -> None:
        t = self.tables
        for index, kept, values in (
            (t.far, cache.k_slc, p.k_slc),
            (t.far, cache.v_slc, p.v_slc),
            (t.near, cache.k_win, p.k_win),
            (t.near, cache.v_win, p.v_win),
            (t.near, cache.k_raw, p.k_cmp),
            (t.near, cache.v_raw, p.v_cmp),
        ):
            store_rows(kept, index, values)
        if new := t.compressed:
            raw = (x[new.raw_page, :, new.raw_row].permute(2, 0, 1, 3) for x in (cache.k_raw, cache.v_raw))
            k_cmp, v_cmp = (
                compress_blocks(blocks, phi.position, phi.w1, phi.w2)
                for blocks, phi in zip(raw, (layer.compress_k, layer.compress_v), strict=True)
            )
            store_rows(cache.k_cmp, new.index, rotate(k_cmp, *new.rotation))
            store_rows(cache.v_cmp, new.index, v_cmp)


def _joined(outs: SequenceOf[Tensor], none: Tensor) -> Tensor:
    """The rows of all parts; of one, as mostly, without a copy."""
    return outs[0] if len(outs) == 1 else torch.cat([none, *outs])
