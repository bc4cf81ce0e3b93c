"""The paged caches of a model's layers, and attention over them for the tokens of one step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor, nn

from shoal.kernels.few import few_parts, few_products
from shoal.kernels.nsa.paged import (
    HiddenGates,
    PagedCache,
    make_cache,
    paged_decode,
    paged_prefill,
    reads_in_place,
    store_rows,
)
from shoal.kernels.nsa.paged_store import Heads, Phi, store_compressed, store_tokens
from shoal.kernels.paged_full import paged_full_decode, paged_full_prefill
from shoal.workers.config import Recipe
from shoal.workers.engine.tables import Tables, sizes_of
from shoal.workers.model.attention import Compression, FullAttention, NativeSparseAttention


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
        backend, heads, gates = t.recipe.attention.backend, layer.heads(x_TH), layer.gates(x_TH)
        in_place = reads_in_place(heads.q, cache, backend)
        q = self._store(layer, heads, in_place)
        pieces = t.whole if in_place else t.pieces
        outs = [paged_decode(q[rows], gates[rows], cache, d, t.sizes, layer.scale, backend) for rows, d in pieces]
        for rows, part, far, near in t.prefill:
            first = part.near_start * t.sizes.slc_block
            read = (q[rows], gates[rows], cache, part.start, far, near, first, t.sizes, layer.scale)
            outs.append(paged_prefill(*read, backend=backend))
        return _joined(outs, q.new_empty(0, q.shape[1], heads.v.shape[-1]))

    def few_nsa(self, layer: NativeSparseAttention, x_TH: Tensor, triton: bool) -> Tensor:
        """``[T, hidden] -> [T, P, hidden]``: parts that add up to the layer's output, of few single queries.

        triton: as :mod:`shoal.kernels.few` has it; pages are read and written as the recipe's backend says.
        """
        t, cache, backend = self.tables, self.caches[layer], self.tables.recipe.attention.backend
        weights = [each.weight for each in (layer.wq, layer.wk, layer.wv, layer.gate_in)]
        q, k, v, hidden = few_products(x_TH, weights, triton)
        heads = layer.split(q, k, v)
        in_place = reads_in_place(heads.q, cache, backend)
        q = self._store(layer, heads, in_place)
        gates = HiddenGates(hidden, layer.gate_out.weight)
        ((_, d),) = t.whole
        mixed = paged_decode(q, gates, cache, d, t.sizes, layer.scale, backend)
        return few_parts(mixed.flatten(1), layer.wo.weight, triton)

    def _store(self, layer: NativeSparseAttention, heads: Heads, in_place: bool) -> Tensor:
        """Writes the step's tokens and compressed rows to their pages; returns rotated queries."""
        t, cache = self.tables, self.caches[layer]
        q = store_tokens(heads, t.rotation, cache, t.far, t.near, in_place)
        if t.compressed:
            store_compressed(t.compressed, cache, (_weights(layer.compress_k), _weights(layer.compress_v)), in_place)
        return q


def _weights(phi: Compression) -> Phi:
    return Phi(phi.position, phi.w1, phi.w2)


def _joined(outs: SequenceOf[Tensor], none: Tensor) -> Tensor:
    """The rows of all parts; of one, as mostly, without a copy."""
    return outs[0] if len(outs) == 1 else torch.cat([none, *outs])
