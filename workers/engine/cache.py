"""The paged caches of a model's layers, and attention over them for the tokens of one step."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from shoal.kernels.nsa.layout import BlockSizes
from shoal.kernels.nsa.paged import (
    DecodeTables,
    PagedCache,
    compress_blocks,
    decode_tables,
    make_cache,
    paged_decode,
    paged_prefill,
    row_index,
    store_rows,
)
from shoal.kernels.paged_full import paged_full_decode, paged_full_prefill
from shoal.kernels.rope import rope_tables, rotate
from shoal.workers.config import Recipe
from shoal.workers.engine.sampling import spans
from shoal.workers.model.attention import FullAttention, NativeSparseAttention, Projected, block_sizes

COPIED = 1 << 26  # elements of keys that are copied at a time
SINGLE = 8  # chunks of at most this many tokens are computed as single queries, all sequences together


@dataclass(frozen=True)
class Part:
    """The tokens of one sequence in a step: ``tokens`` stand at ``start …``. far: its pages from the start on; near:
    its pages from page number ``near_start`` on; both reach to its last token."""

    tokens: tuple[int, ...]
    start: int
    far: np.ndarray
    near: np.ndarray
    near_start: int

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


def sizes_of(recipe: Recipe) -> BlockSizes:
    """NSA's block sizes; full attention has pages only, of ``slc_block`` tokens."""
    page = recipe.attention.slc_block
    return block_sizes(recipe.attention) if recipe.attention.kind == "nsa" else BlockSizes(page, page, page, 1, 0, 1, 1)


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


class StepTables:
    """Where the tokens of a step are written to and what they read, on the device, for all layers.

    Tokens lie in the order of the parts; those of short parts must come first. Everything goes to the device in one
    copy: a decode step of a small model takes milliseconds, and each copy costs the host some hundredths of one.
    """

    def __init__(self, recipe: Recipe, parts: SequenceOf[Part], dtype: torch.dtype, device: torch.device) -> None:
        self.recipe, self.parts, self.device = recipe, parts, device
        self.sizes, self.nsa = sizes_of(recipe), recipe.attention.kind == "nsa"
        self.singles = [p for p in parts if len(p.tokens) <= SINGLE]
        self.chunks = parts[len(self.singles) :]
        assert all(len(p.tokens) > SINGLE for p in self.chunks), "short parts come first"
        self.single_tokens = sum(len(p.tokens) for p in self.singles)
        host = _HostTables(parts, self.sizes, self.nsa)
        there = _upload(host.arrays | host.of_singles(len(self.singles)) | host.of_chunks(len(self.singles)), device)
        self.tokens, self.positions = there["tokens"], there["positions"]
        wide, model = torch.promote_types(dtype, torch.float32), recipe.model
        kv, page = model.kv_heads, self.sizes.slc_block
        self.far = row_index(there["far"], there["row"], kv, page)
        self.near = row_index(there["near"], there["row"], kv, page) if self.nsa else self.far[:0]
        self.rotation = rope_tables(self.positions, model.head_dim, model.rope_base, dtype=wide)
        self.compressed = len(there["cmp_row"])
        if self.compressed:
            self.cmp = row_index(there["cmp_far"], there["cmp_row"], kv, page // self.sizes.cmp_stride)
            self.raw_page, self.raw_row = there["raw_page"], there["raw_row"]
            self.cmp_rotation = rope_tables(there["cmp_start"], model.head_dim, model.rope_base, dtype=wide)
        self.decode = self._decode_tables(there) if self.singles else []
        rows = spans([self.single_tokens, *(len(p.tokens) for p in self.chunks)])[1:]
        self.prefill = [
            (at, p, there[f"far {i}"], there[f"near {i}"])
            for i, (at, p) in enumerate(zip(rows, self.chunks, strict=True))
        ]

    def _decode_tables(self, there: dict[str, Tensor]) -> list[tuple[slice, DecodeTables]]:
        """Of the single queries, as many at a time as let the copies of their keys stay small."""
        tables = there["single_far"], there["single_near"], there["single_first"]
        if self.single_tokens > len(self.singles):
            tables = tables[0][there["single_of"]], tables[1][there["single_of"]], tables[2][there["single_of"]]
        blind = any(p.start + 1 < self.sizes.cmp_block for p in self.singles)
        kv, dim = self.recipe.model.kv_heads, self.recipe.model.head_dim
        step = max(1, COPIED // (self._keys_read(tables[0].shape[1]) * kv * dim))
        found = []
        for start in range(0, self.single_tokens, step):
            rows = slice(start, min(start + step, self.single_tokens))
            far, near, first = (table[rows] for table in tables)
            found.append((rows, decode_tables(self.positions[rows], far, near, first, kv, self.sizes, blind)))
        return found

    def _keys_read(self, pages: int) -> int:
        """Most keys that a branch copies for a query whose sequence has so many pages."""
        s = self.sizes
        return (
            max(pages * (s.slc_block // s.cmp_stride), s.slc_count * s.slc_block) if self.nsa else pages * s.slc_block
        )


class PagedAttention:
    """Attention of the tokens of a step over the caches, which it writes them to first. ``Attending``, for serving."""

    def __init__(self, tables: StepTables, caches: dict[nn.Module, PagedCache]) -> None:
        self.tables, self.caches = tables, caches

    def full(self, layer: FullAttention, x_TH: Tensor) -> Tensor:
        """``[T, hidden] -> [T, H, d_v]``."""
        t, cache = self.tables, self.caches[layer]
        q, k, v = layer.project(x_TH, t.rotation)
        store_rows(cache.k_slc, t.far, k)
        store_rows(cache.v_slc, t.far, v)
        outs = [
            paged_full_decode(q[rows], cache.k_slc, cache.v_slc, d.positions, d.far, layer.scale)
            for rows, d in t.decode
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
        outs = [paged_decode(p.q[rows], p.gates[rows], cache, d, t.sizes, layer.scale, backend) for rows, d in t.decode]
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
        if t.compressed:
            raw = (x[t.raw_page, :, t.raw_row].permute(2, 0, 1, 3) for x in (cache.k_raw, cache.v_raw))
            k_cmp, v_cmp = (
                compress_blocks(blocks, phi.position, phi.w1, phi.w2)
                for blocks, phi in zip(raw, (layer.compress_k, layer.compress_v), strict=True)
            )
            store_rows(cache.k_cmp, t.cmp, rotate(k_cmp, *t.cmp_rotation))
            store_rows(cache.v_cmp, t.cmp, v_cmp)


class _HostTables:
    """The numbers of a step on the host, int64, for all parts at once: a loop over them in Python takes longer than a
    small model's layers."""

    def __init__(self, parts: SequenceOf[Part], sizes: BlockSizes, nsa: bool) -> None:
        self.parts, self.sizes = parts, sizes
        page = sizes.slc_block
        starts, counts = _ints(p.start for p in parts), _ints(len(p.tokens) for p in parts)
        self.first = _ints(p.near_start for p in parts)
        self.far, self.near = _pad([p.far for p in parts]), _pad([p.near for p in parts])
        self.of, at = _spread(starts, counts)
        none = _ints(())
        self.arrays = {
            "tokens": np.fromiter(chain.from_iterable(p.tokens for p in parts), np.int64, len(at)),
            "positions": at,
            "row": at % page,
            "far": self.far[self.of, at // page],
            "near": self.near[self.of, at // page - self.first[self.of]] if nsa else none,
            "cmp_row": none,
        }
        if nsa:
            self.arrays |= self._compressed(starts, starts + counts)

    def _compressed(self, starts: np.ndarray, stops: np.ndarray) -> dict[str, np.ndarray]:
        """The compressed rows that end in this step: where they go, and the raw rows that φ reads."""
        s, page = self.sizes, self.sizes.slc_block
        per, none = page // s.cmp_stride, s.cmp_block // s.cmp_stride - 1
        begun = np.maximum(starts // s.cmp_stride, none)
        of, ended = _spread(begun, np.maximum(stops // s.cmp_stride - begun, 0))
        keys = (ended[:, None] + 1) * s.cmp_stride - s.cmp_block + np.arange(s.cmp_block)
        return {
            "cmp_far": self.far[of, ended // per],
            "cmp_row": ended % per,
            "cmp_start": keys[:, 0],
            "raw_page": self.near[of[:, None], keys // page - self.first[of][:, None]],
            "raw_row": keys % page,
        }

    def of_singles(self, count: int) -> dict[str, np.ndarray]:
        """Pages of the first ``count`` parts, a row each, and which of them each of their tokens belongs to."""
        singles = self.parts[:count]
        far, near = max((len(p.far) for p in singles), default=0), max((len(p.near) for p in singles), default=0)
        tokens = sum(len(p.tokens) for p in singles)
        return {
            "single_far": self.far[:count, :far],
            "single_near": self.near[:count, :near],
            "single_first": self.first[:count] * self.sizes.slc_block,
            "single_of": self.of[:tokens],
        }

    def of_chunks(self, begin: int) -> dict[str, np.ndarray]:
        """Pages of each part from number ``begin`` on."""
        found = {}
        for i, p in enumerate(self.parts[begin:]):
            found[f"far {i}"], found[f"near {i}"] = _ints(p.far), _ints(p.near)
        return found


def _joined(outs: SequenceOf[Tensor], none: Tensor) -> Tensor:
    """The rows of all parts; of one, as mostly, without a copy."""
    return outs[0] if len(outs) == 1 else torch.cat([none, *outs])


def _upload(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays as int64 tensors on the device, in one copy."""
    sizes = [array.size for array in arrays.values()]
    flat = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate([array.ravel() for array in arrays.values()], out=flat.numpy())
    there = flat.to(device, non_blocking=True).split(sizes)
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), there, strict=True)}


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int64)


def _spread(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of ``counts`` consecutive numbers from ``starts`` on, joined; and which run each number is of."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) + (starts - (np.cumsum(counts) - counts))[of]


def _pad(lists: SequenceOf[np.ndarray]) -> np.ndarray:
    """Rows of one length, filled up with their own first page, which is theirs to read."""
    table = np.zeros((len(lists), max(map(len, lists), default=0)), np.int64)
    for row, pages in zip(table, lists, strict=True):
        row[len(pages) :] = pages[0] if len(pages) else 0
        row[: len(pages)] = pages
    return table
