"""Where the tokens of a step are written to and what they read: worked out once for all layers."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.nsa.layout import BlockSizes
from shoal.kernels.nsa.paged import DecodeTables, decode_tables, row_index
from shoal.kernels.nsa.paged_store import Compressed
from shoal.workers.config import Recipe
from shoal.workers.engine.sampling import spans
from shoal.workers.model.attention import block_sizes, rotations

COPIED = 1 << 26  # elements of keys that are copied at a time
WARM = 128  # tokens of a prompt that is computed only to have its kernels compiled
ALIGNED = 16  # numbers: an array that begins anywhere else would be another variant of a Triton kernel
SINGLE = 8  # chunks of at most this many tokens are computed as single queries, all sequences together


class Part(NamedTuple):
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


class Tables:
    """What the layers of a step read. far, near: ``[T, KV]``, where each token's rows go, indices of ``row_index``.

    compressed: None when no row ends. whole: the single queries, which come first, with the rows of the step that they
    are; nothing when there are none. prefill: of each longer part its rows, far pages and near ones.
    """

    far: Tensor
    near: Tensor

    def __init__(
        self,
        recipe: Recipe,
        tokens: Tensor,
        positions: Tensor,
        dtype: torch.dtype,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """rotation: of the positions, where it is known."""
        self.recipe, self.tokens, self.positions = recipe, tokens, positions
        self.sizes, self.nsa = sizes_of(recipe), recipe.attention.kind == "nsa"
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.rotation = rotation or self.rope(positions)
        self.compressed: Compressed | None = None
        self.whole: list[tuple[slice, DecodeTables]] = []
        self.prefill: list[tuple[slice, Part, Tensor, Tensor]] = []

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the model's rotation."""
        m = self.recipe.model
        return rotations(m, positions, self.dtype)

    def to_rows(self, pages: Tensor, rows: Tensor) -> Tensor:
        """Where rows of pages of l' tokens lie."""
        return row_index(pages, rows, self.recipe.model.kv_heads, self.sizes.slc_block)

    def to_compressed(self, pages: Tensor, rows: Tensor) -> Tensor:
        """Where compressed rows of pages lie."""
        return row_index(pages, rows, self.recipe.model.kv_heads, self.sizes.slc_block // self.sizes.cmp_stride)

    @cached_property
    def pieces(self) -> list[tuple[slice, DecodeTables]]:
        """The single queries, as many at a time as let the copies of their keys stay small."""
        kv, dim = self.recipe.model.kv_heads, self.recipe.model.head_dim
        found = []
        for _, d in self.whole:
            step = max(1, COPIED // (self._keys_read(d.far.shape[-1]) * kv * dim))
            for start in range(0, len(d.positions), step):
                rows = slice(start, min(start + step, len(d.positions)))
                part = DecodeTables(d.positions[rows], d.far[rows], d.near[rows], d.near_first[rows], d.sizes, d.blind)
                found.append((rows, part))
        return found

    def _keys_read(self, pages: int) -> int:
        """Most keys that a branch copies for a query whose sequence has so many pages."""
        s = self.sizes
        return (
            max(pages * (s.slc_block // s.cmp_stride), s.slc_count * s.slc_block) if self.nsa else pages * s.slc_block
        )


class StepTables(Tables):
    """Of any parts, those of few tokens first. Everything goes to the device in one copy: a decode step of a small
    model takes milliseconds, and each copy costs the host some hundredths of one."""

    def __init__(self, recipe: Recipe, parts: SequenceOf[Part], dtype: torch.dtype, device: torch.device) -> None:
        singles = [p for p in parts if len(p.tokens) <= SINGLE]
        chunks = parts[len(singles) :]
        assert all(len(p.tokens) > SINGLE for p in chunks), "short parts come first"
        host = _HostTables(parts, sizes_of(recipe), recipe.attention.kind == "nsa")
        there = _upload(host.arrays | host.of_singles(len(singles)) | host.of_chunks(len(singles)), device)
        super().__init__(recipe, there["tokens"], there["positions"], dtype)
        self.far = self.to_rows(there["far"], there["row"])
        self.near = self.to_rows(there["near"], there["row"]) if self.nsa else self.far[:0]
        if len(there["cmp_row"]):
            self.compressed = Compressed(
                self.to_compressed(there["cmp_far"], there["cmp_row"]),
                there["raw_page"],
                there["raw_row"],
                self.rope(there["cmp_start"]),
            )
        count = sum(len(p.tokens) for p in singles)
        if count:
            tables = there["single_far"], there["single_near"], there["single_first"]
            if count > len(singles):
                tables = tables[0][there["single_of"]], tables[1][there["single_of"]], tables[2][there["single_of"]]
            blind = any(p.start + 1 < self.sizes.cmp_block for p in singles)
            at = self.positions[:count]
            self.whole = [(slice(0, count), decode_tables(at, *tables, recipe.model.kv_heads, self.sizes, blind=blind))]
        rows = spans([count, *(len(p.tokens) for p in chunks)])[1:]
        self.prefill = [
            (at, p, there[f"far {i}"], there[f"near {i}"]) for i, (at, p) in enumerate(zip(rows, chunks, strict=True))
        ]


def warm_parts(recipe: Recipe, step: int, back: int, sequences: int) -> list[list[Part]]:
    """Steps that together call every variant of the kernels that prompts need, over page 0 alone. step: tokens of the
    longest. back: how many tokens before its first one a part reads of the near pages. sequences: of a step, at most.

    Kernels differ with the pages of a sequence, by powers of two, and beside a prompt others go on by single tokens;
    the more there are, the fewer programs share one of them. Few tokens alone are routed in one launch.
    """
    page, context, found = sizes_of(recipe).slc_block, recipe.model.context, []
    whole = -(-context // page)
    for pages in [whole, *(1 << i for i in reversed(range((whole - 1).bit_length())))]:
        stop = min(pages * page, context)
        counts = (1, min(stop, step if pages == whole else max(WARM, 2 * SINGLE)))
        found.append([over_page_0(stop - n, n, page, back, recipe.model.vocab) for n in counts if n == 1 or n > SINGLE])
    first = over_page_0(0, 1, page, back, recipe.model.vocab)
    return [*found, [first] * sequences, [first]]


def over_page_0(start: int, count: int, page: int, back: int, vocab: int) -> Part:
    """Tokens at ``start …`` of a sequence whose pages are all the same one."""
    pages, near_start = -(-(start + count) // page), max(0, start - back) // page
    tokens = tuple(i % vocab for i in range(count))
    return Part(tokens, start, np.zeros(pages, np.int64), np.zeros(pages - near_start, np.int64), near_start)


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
            found[f"far {i}"], found[f"near {i}"] = p.far, p.near
        return found


def _upload(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays as int64 tensors on the device, in one copy."""
    rooms = [-(-array.size // ALIGNED) * ALIGNED for array in arrays.values()]
    flat = torch.empty(sum(rooms), dtype=torch.int64, pin_memory=device.type == "cuda")
    for room, array in zip(flat.split(rooms), arrays.values(), strict=True):
        room.numpy()[: array.size] = array.ravel()
    there = flat.to(device, non_blocking=True).split(rooms)
    return {name: part[: a.size].view(a.shape) for (name, a), part in zip(arrays.items(), there, strict=True)}


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int64)


def _spread(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of ``counts`` consecutive numbers from ``starts`` on, joined; and which run each number is of."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) + (starts - (np.cumsum(counts) - counts))[of]


def _pad(lists: SequenceOf[np.ndarray]) -> np.ndarray:
    """Rows of one length."""
    table = np.zeros((len(lists), max(map(len, lists), default=0)), np.int64)
    fill(table, lists)
    return table


def fill(rows: np.ndarray, lists: SequenceOf[np.ndarray]) -> None:
    """Puts pages into rows, each filled up with the first of them, which is its own to read."""
    for row, pages in zip(rows, lists, strict=True):
        row[: len(pages)] = pages
        row[len(pages) :] = pages[0] if len(pages) else 0
