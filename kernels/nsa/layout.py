"""Where the blocks of a packed batch lie: built once for a batch, shared by all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.host import numbers_on
from shoal.kernels.nsa.rows import Needs, Rows, Run, needs, runs


@dataclass(frozen=True)
class BlockSizes:
    """NSA's block sizes, in keys (NSA section 3.3); the names are those of a recipe's ``[attention]`` table.

    Raises ValueError for sizes the equations do not allow.
    """

    cmp_block: int
    """l: keys in a compression block."""
    cmp_stride: int
    """d: keys between the starts of two compression blocks."""
    slc_block: int
    """l': keys in a selection block."""
    slc_count: int
    """n: selected blocks a query, forced ones counted."""
    slc_initial: int
    """Forced blocks at the start of the document."""
    slc_local: int
    """Forced blocks that end with the query's own."""
    window: int
    """w: keys of the sliding window, the query's own included."""

    def __post_init__(self) -> None:
        if min(self.cmp_block, self.cmp_stride, self.slc_block, self.slc_count, self.slc_local, self.window) < 1:
            raise ValueError(f"block sizes must be 1 or more: {self}")
        if self.cmp_block % self.cmp_stride or self.slc_block % self.cmp_stride:
            raise ValueError(f"cmp_block and slc_block must be multiples of cmp_stride: {self}")
        if self.cmp_block > self.slc_block:
            raise ValueError(f"cmp_block must not be longer than slc_block: {self}")
        if self.slc_initial < 0 or self.slc_initial + self.slc_local > self.slc_count:
            raise ValueError(f"slc_count must hold the forced blocks, slc_initial + slc_local: {self}")

    def cmp_blocks(self, keys: int) -> int:
        """How many compression blocks lie whole within the first ``keys`` keys of a document."""
        return max(0, (keys - self.cmp_block) // self.cmp_stride + 1)

    def slc_blocks(self, keys: int) -> int:
        """How many selection blocks the first ``keys`` keys of a document touch."""
        return -(-keys // self.slc_block)


@dataclass(frozen=True)
class Tile:
    """Some consecutive queries, and the rows of keys that they may see.

    A tile lies within one document, or it holds several whole documents that are so short that every query selects
    all of its blocks. The masks are added to scores ``[…, rows, group, keys]``: 0 where visible, -inf where not. They
    cover only the last keys of a range; all keys before those are visible to every row.
    """

    start: int
    stop: int
    """Rows ``start ≤ t < stop`` of q."""
    position: int
    """Of the first query in its document."""
    first: int
    last: int
    """Rows of k_slc ``first ≤ s < last``: from the start of the tile's (first) document to its last query."""
    win_first: int
    win_last: int
    """Rows of k_win, of the tile's windows."""
    cmp_first: int
    cmp_stop: int
    """Rows of k_cmp: compression blocks that some query of the tile sees."""
    own_mask: Tensor
    """``[rows, 1, rows]``: causal, within a document."""
    win_mask: Tensor
    """``[rows, 1, win_last - win_first]``."""
    cmp_mask: Tensor
    """``[rows, 1, ≤ cmp_stop - cmp_first]``."""
    cmp_none: Tensor | None
    """``[rows, 1, 1]`` bool: rows that see no compression block; None when every row sees one."""
    blocks: int
    """Selection blocks of the document up to ``stop``, where a choice has to be made; 0: every row takes all."""


class ChunkInverse(NamedTuple):
    """What ``chunk_tokens`` and ``cmp_chunks`` of a layout say, the other way round; -1 for none.

    places: ``[T]`` int32, where each token stands in ``chunk_tokens``. blocks: ``[n]`` int32, the compression block
    that begins with each chunk.
    """

    places: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, tokens: int, chunk_tokens: Tensor, stride: int, cmp_chunks: Tensor) -> ChunkInverse:
        """Of T tokens, and chunks of ``stride`` of them."""

        def inverse(count: int, rows: Tensor) -> Tensor:
            empty = torch.full((count,), -1, dtype=torch.int32, device=rows.device)
            return empty.scatter_(0, rows, torch.arange(len(rows), dtype=torch.int32, device=rows.device))

        return cls(inverse(tokens, chunk_tokens), inverse(len(chunk_tokens) // stride, cmp_chunks))


@dataclass(frozen=True)
class Layout:
    """Index tables of one packed batch, for all its queries or for some.

    queries: tokens of the pack that are rows of q. needs: tokens and compression blocks of the pack that are rows of
    the keys: ``far`` of k_slc, ``near`` of k_win, ``cmp`` of k_cmp, each all that these queries may see or more.
    cu_seqlens: N+1 offsets of the documents. cmp_starts: ``[C]`` int64, first key of each compression block in the
    pack. cmp_positions: ``[C]`` int64, the same counted from the start of the document (RoPE's position of the
    compressed key). cmp_documents: ``[C]`` int64. chunk_tokens: ``[n*d]`` int64, the tokens of the n whole chunks of
    ``d`` keys of all documents. cmp_chunks: ``[C]`` int64, the first chunk of each compression block. cmp_before: N+1
    counts, compression blocks before each document. slc_blocks: N counts, selection blocks of each document.
    tile: queries that the PyTorch kernels compute together, at most.
    dense_keys: with at most this many keys, selected attention masks dense scores; with more it gathers blocks.
    """

    cu_seqlens: tuple[int, ...]
    sizes: BlockSizes
    device: torch.device
    queries: Rows
    needs: Needs
    cmp_starts: Tensor
    cmp_positions: Tensor
    cmp_documents: Tensor
    chunk_tokens: Tensor
    cmp_chunks: Tensor
    cmp_before: tuple[int, ...]
    slc_blocks: tuple[int, ...]
    tile: int
    dense_keys: int

    @property
    def tokens(self) -> int:
        """T, the tokens of the pack."""
        return self.cu_seqlens[-1]

    @cached_property
    def inverse(self) -> ChunkInverse:
        """Made when it is first asked for, by the backward pass of φ."""
        return ChunkInverse.of(self.tokens, self.chunk_tokens, self.sizes.cmp_stride, self.cmp_chunks)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The work of the PyTorch kernels, in order; made when it is first asked for, since Triton's need none."""
        maker, sizes = _TileMaker(self), self.sizes
        return tuple(maker.tile(*part) for part in _parts(self.cu_seqlens, self.queries, self.tile, sizes))


def make_layout(
    cu_seqlens: tuple[int, ...],
    sizes: BlockSizes,
    device: torch.device | str,
    tile: int | None = None,
    dense_keys: int | None = None,
    queries: Rows | None = None,
) -> Layout:
    """The layout of a pack; the last few are remembered, so that every layer may ask for it.

    cu_seqlens: N+1 offsets on the host, ``0 … T``. tile: queries computed together. dense_keys: see
    :class:`Layout`. Both are chosen here when None and change speed, never results (beyond rounding). queries: the
    tokens that are queries, over the keys that :func:`shoal.kernels.nsa.rows.needs` names; None: all, over all keys.
    Raises ValueError for offsets that do not begin with 0, or fall.
    """
    device = torch.device(device)
    if tile is None:
        tile = 64 if device.type == "cpu" else 256
    if dense_keys is None:
        dense_keys = 8 * sizes.slc_count * sizes.slc_block
    return _make_layout(tuple(cu_seqlens), sizes, device, tile, dense_keys, queries)


@lru_cache(maxsize=8)
def _make_layout(
    cu_seqlens: tuple[int, ...],
    sizes: BlockSizes,
    device: torch.device,
    tile: int,
    dense_keys: int,
    some: Rows | None,
) -> Layout:
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
    if cu_seqlens[:1] != (0,) or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens={cu_seqlens}: offsets of documents begin with 0 and do not fall")
    before = tuple(accumulate(map(sizes.cmp_blocks, lengths), initial=0))
    chunks_before = tuple(accumulate((n // sizes.cmp_stride for n in lengths), initial=0))
    # All that travels to a GPU: what follows from it is computed there.
    offsets, cmp_firsts, chunk_firsts = numbers_on(device, [cu_seqlens, before, chunks_before])
    documents, index = in_documents(cmp_firsts, before[-1])
    chunk_documents, chunk = in_documents(chunk_firsts, chunks_before[-1])
    positions = index * sizes.cmp_stride
    chunk_starts = offsets[chunk_documents] + chunk * sizes.cmp_stride
    everything, blocks, chunks = (Rows.of([(0, n)]) for n in (cu_seqlens[-1], before[-1], chunks_before[-1]))
    whole = Needs(everything, everything, blocks, blocks, everything, chunks)
    queries, need = (everything, whole) if some is None else (some, needs(cu_seqlens, sizes, some))
    return Layout(
        cu_seqlens=cu_seqlens,
        sizes=sizes,
        device=device,
        queries=queries,
        needs=need,
        cmp_starts=offsets[documents] + positions,
        cmp_positions=positions,
        cmp_documents=documents,
        chunk_tokens=(chunk_starts[:, None] + torch.arange(sizes.cmp_stride, device=device)).flatten(),
        cmp_chunks=chunk_firsts[documents] + index,
        cmp_before=before,
        slc_blocks=tuple(sizes.slc_blocks(n) for n in lengths),
        tile=tile,
        dense_keys=dense_keys,
    )


def in_documents(before: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of ``total`` things that lie document by document, each one's document, and its index among those of it.

    before: ``[N + 1]`` int64, how many there are before each document, and in all. Returns two ``[total]`` int64.
    """
    each = torch.arange(total, device=before.device)
    documents = torch.searchsorted(before[1:], each, right=True)
    return documents, each - before[documents]


def _parts(
    cu_seqlens: tuple[int, ...], queries: Rows, tile: int, sizes: BlockSizes
) -> Iterator[tuple[int, int, int, int]]:
    """Cut queries into ``(first document, last document, start, stop)``, tokens of the pack: at most ``tile`` each."""
    short = min(tile, sizes.slc_count * sizes.slc_block)
    pieces = runs(cu_seqlens, queries)
    at = 0
    while at < len(pieces):
        first, last = pieces[at], at
        alone = first.stop - first.start > short or first.start > cu_seqlens[first.document]
        while not alone and last + 1 < len(pieces):
            following: Run = pieces[last + 1]
            whole = following.start == pieces[last].stop  # the one before ends with it, so that it begins here
            if not whole or following.stop - first.start > tile or following.stop - following.start > short:
                break
            last += 1
        stop = pieces[last].stop
        for row in range(first.start, stop, tile):
            yield first.document, pieces[last].document, row, min(row + tile, stop)
        at = last + 1


class _TileMaker:
    """Makes tiles; those that lie within one document share their masks."""

    def __init__(self, layout: Layout) -> None:
        self.cu_seqlens, self.sizes, self.cmp_before = layout.cu_seqlens, layout.sizes, layout.cmp_before
        self.queries, self.need, self.device = layout.queries, layout.needs, layout.device
        self.cmp_documents, self.cmp_ends = layout.cmp_documents, layout.cmp_starts + self.sizes.cmp_block - 1
        self.token_documents, _ = in_documents(numbers_on(self.device, self.cu_seqlens), layout.tokens)
        self.shared: dict[tuple[object, ...], Tensor] = {}

    def tile(self, doc: int, end: int, start: int, stop: int) -> Tile:
        """Of tokens ``start ≤ t < stop`` in documents ``doc`` to ``end``."""
        sizes, first, several = self.sizes, self.cu_seqlens[doc], end > doc
        at, rows, seen = start - first, stop - start, stop - first
        win_first = max(first, start - sizes.window + 1)
        cmp_first = self.cmp_before[doc]
        cmp_stop = self.cmp_before[end] + sizes.cmp_blocks(stop - self.cu_seqlens[end])
        cmp_all = 0 if several else sizes.cmp_blocks(at + 1)
        lead = at + 1 - sizes.cmp_block
        phase = lead % sizes.cmp_stride if lead >= 0 else lead
        alone = (start,) if several else ()
        cmp_mask = self._mask(start, stop, cmp_first + cmp_all, cmp_stop, "cmp", (rows, phase, *alone))
        blind = at + 1 < sizes.cmp_block and cmp_stop > cmp_first
        row, far, near = self.queries.at(start), self.need.far.at(first), self.need.near.at(win_first)
        cmp_row = self.need.cmp.at(cmp_first) if cmp_stop > cmp_first else 0
        return Tile(
            start=row,
            stop=row + rows,
            position=at,
            first=far,
            last=far + seen,
            win_first=near,
            win_last=near + stop - win_first,
            cmp_first=cmp_row,
            cmp_stop=cmp_row + cmp_stop - cmp_first,
            own_mask=self._mask(start, stop, start, stop, "own", (rows, *alone)),
            win_mask=self._mask(start, stop, win_first, stop, "win", (rows, start - win_first, *alone)),
            cmp_mask=cmp_mask,
            cmp_none=torch.isneginf(cmp_mask).all(-1, keepdim=True) if blind else None,
            blocks=sizes.slc_blocks(seen) if not several and sizes.slc_blocks(seen) > sizes.slc_count else 0,
        )

    def _mask(self, start: int, stop: int, low: int, high: int, kind: str, key: tuple[int, ...]) -> Tensor:
        """Mask ``[stop - start, 1, high - low]`` of queries over keys (``own``, ``win``) or compression blocks."""
        known = self.shared.get((kind, *key))
        if known is not None:
            return known
        rows = torch.arange(start, stop, device=self.device)[:, None]
        documents = self.token_documents[start:stop, None]
        if kind == "cmp":
            visible = (self.cmp_documents[low:high] == documents) & (self.cmp_ends[low:high] <= rows)
        else:
            keys = torch.arange(low, high, device=self.device)
            visible = (self.token_documents[low:high] == documents) & (keys <= rows)
            if kind == "win":
                visible &= keys > rows - self.sizes.window
        mask = torch.zeros(visible.shape, device=self.device).masked_fill_(~visible, -torch.inf)[:, None]
        self.shared[(kind, *key)] = mask
        return mask
