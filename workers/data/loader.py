"""Packed batches out of a corpus: streamed, shuffled, resumable, and the same rows for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shoal.workers.data.batch import IGNORE, PackedBatch, empty_batch
from shoal.workers.data.manifest import (
    Tokens,
    checked_files,
    read_manifest,
    read_row_group,
    split_tokens,
    validation_text,
)
from shoal.workers.errors import InvalidInput

Ints = npt.NDArray[np.int64]
Shard = tuple[int | None, int]


@dataclass(frozen=True)
class _Text:
    """Documents end to end: tokens ``[T]`` in the corpus's type, ends ``[documents]``, where each one stops."""

    tokens: Tokens
    ends: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, documents: list[Tokens]) -> _Text:
        return cls(np.concatenate(documents), np.cumsum([len(d) for d in documents], dtype=np.int64))

    def cut(self, start: int, stop: int) -> _Cut:
        """Tokens ``[start, stop)`` with their targets, and the offsets at which documents begin among them."""
        targets = np.full(stop - start, IGNORE, np.int64)
        follow = self.tokens[start + 1 : stop + 1]
        targets[: len(follow)] = follow
        first, last = np.searchsorted(self.ends, (start, stop), side="right")
        inside = self.ends[first:last] - start  # ends in (start, stop]
        targets[inside - 1] = IGNORE
        return _Cut(self.tokens[start:stop].astype(np.int64), targets, inside)


@dataclass(frozen=True)
class _Cut:
    """A stretch of the stream: tokens ``[n]``, targets ``[n]``; ``ends``: offsets, 1 to n, where a document ends."""

    tokens: Ints
    targets: Ints
    ends: Ints


def _pack(cuts: list[_Cut], sequence: int) -> PackedBatch:
    """Join cuts to one batch of rows of ``sequence`` tokens; a piece begins at each document and at each row."""
    total = sum(len(cut.tokens) for cut in cuts)
    if not total:
        return empty_batch()
    bases = np.cumsum([0, *(len(cut.tokens) for cut in cuts)])
    ends = [cut.ends + base for cut, base in zip(cuts, bases, strict=False)]
    bounds = np.unique(np.concatenate([np.arange(0, total, sequence), [total], *ends]))
    positions = np.arange(total) - np.repeat(bounds[:-1], np.diff(bounds))
    return PackedBatch(
        torch.from_numpy(np.concatenate([cut.tokens for cut in cuts])),
        torch.from_numpy(np.concatenate([cut.targets for cut in cuts])),
        torch.from_numpy(positions),
        tuple(bounds.tolist()),
    )


class _Windows:
    """The training split in windows of ``size`` row groups: groups are permuted by epoch, documents by window."""

    def __init__(self, folder: Path, seed: int, size: int) -> None:
        manifest = read_manifest(folder)
        files = checked_files(folder, manifest, "train")
        self.corpus_hash = manifest.corpus_hash
        self._groups = [(folder / file.name, group) for file in files for group in range(file.row_groups)]
        self._seed, self._size = seed, size
        self.count = -(-len(self._groups) // size)

    def load(self, epoch: int, window: int) -> _Text:
        """Read one window; it alone is in memory. Raises InvalidInput for a file that is missing or damaged."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._groups))
        documents: list[Tokens] = []
        for index in order[window * self._size : (window + 1) * self._size]:
            path, group = self._groups[index]
            tokens, offsets = split_tokens(read_row_group(path, group, ["tokens"])["tokens"])
            documents += np.split(tokens, offsets[1:-1])
        shuffled = np.random.default_rng([self._seed, epoch, window]).permutation(len(documents))
        return _Text.of([documents[i] for i in shuffled])


class _Stream:
    """All documents of an epoch end to end, epoch after epoch, from a position (epoch, window, offset)."""

    def __init__(self, windows: _Windows, epoch: int = 0, window: int = 0, offset: int = 0) -> None:
        self._windows = windows
        self.epoch, self.window, self.offset = epoch, window, offset
        self._text = windows.load(epoch, window)

    def take(self, count: int) -> list[_Cut]:
        """The next ``count`` tokens, in a cut for each window they come from."""
        cuts = []
        while count:
            self._enter()
            stop = min(len(self._text), self.offset + count)
            cuts.append(self._text.cut(self.offset, stop))
            count -= stop - self.offset
            self.offset = stop
        return cuts

    def _enter(self) -> None:
        """Load the next window when this one is used up: not before, so that the position is in the window it names."""
        if self.offset < len(self._text):
            return
        self.offset, self.window = 0, self.window + 1
        if self.window == self._windows.count:
            self.epoch, self.window = self.epoch + 1, 0
        self._text = self._windows.load(self.epoch, self.window)


class TrainLoader:
    """This shard's micro-batches of an endless stream of training rows.

    A global batch is ``batch`` rows of exactly ``sequence`` tokens; micro-batch m of M = ``accumulate`` is its m-th
    part, and shard r of R takes the r-th part of each micro-batch, so the rows do not depend on R. ``shard`` is (r, R);
    r = None is a rank without tokens. Each epoch lays all documents end to end in an order of its own. A document that
    a row cuts goes on in the following row as a new piece, with positions from 0; each token of a document but its
    first is the target of exactly one position in an epoch. Rows are shuffled among the ``shuffle_tokens`` tokens of
    rows that follow one another, so that the rows of a long document do not make up a batch.

    ``state`` is that of another loader of the same corpus, seed, sequence and shuffling: the rows go on where that one
    stopped, whatever the two shards.

    Raises NotFound and InvalidInput for a folder that is no corpus, is damaged, or does not fit ``state``.
    """

    def __init__(
        self,
        folder: Path,
        sequence: int,
        batch: int,
        accumulate: int,
        seed: int,
        shuffle_groups: int,
        shuffle_tokens: int,
        shard: Shard,
        state: dict[str, Any] | None = None,
    ) -> None:
        index, shards = shard
        if batch % (accumulate * shards):
            raise InvalidInput(
                f"train.batch={batch} does not divide into {accumulate} micro-batches over {shards} attention ranks: "
                f"set train.batch to a multiple of {accumulate * shards}"
            )
        self._share = batch // accumulate // shards
        self._sequence, self._accumulate, self._index, self._shards = sequence, accumulate, index, shards
        self._size = max(1, shuffle_tokens // sequence)
        windows = _Windows(folder, seed, shuffle_groups)
        self._seed = seed
        self._identity = {
            "corpus": windows.corpus_hash,
            "seed": seed,
            "sequence": sequence,
            "shuffle_groups": shuffle_groups,
            "shuffle_tokens": shuffle_tokens,
        }
        place = self._checked(folder, state) if state is not None else {}
        self._stream = _Stream(windows, **{k: place[k] for k in ("epoch", "window", "offset") if place})
        self._block, self._row = place.get("block", 0), place.get("row", 0)
        self._load_rows()

    def next(self) -> list[PackedBatch]:
        """The ``accumulate`` micro-batches of the next global batch, each ``[share * sequence]`` tokens, or none."""
        batches = []
        for _ in range(self._accumulate):
            rows = [self._next_row() for _ in range(self._share * self._shards)]
            mine = [] if self._index is None else rows[self._share * self._index : self._share * (self._index + 1)]
            batches.append(_pack([cut for row in mine for cut in row], self._sequence))
        return batches

    def state(self) -> dict[str, Any]:
        """Where the rows stand, the same on all shards: JSON-able, a few numbers and the corpus's hash."""
        return {**self._identity, **self._start, "block": self._block, "row": self._row}

    def _load_rows(self) -> None:
        """Cut the rows that are shuffled together."""
        stream = self._stream
        self._start = {"epoch": stream.epoch, "window": stream.window, "offset": stream.offset}
        self._rows = [stream.take(self._sequence) for _ in range(self._size)]
        self._order = np.random.default_rng([self._seed, self._block]).permutation(self._size)

    def _next_row(self) -> list[_Cut]:
        if self._row == self._size:
            self._block, self._row = self._block + 1, 0
            self._load_rows()
        self._row += 1
        return self._rows[self._order[self._row - 1]]

    def _checked(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        names = {"corpus": f"data.corpus={folder}", "seed": "train.seed", "sequence": "train.sequence"}
        for key, value in self._identity.items():
            if state[key] != value:
                raise InvalidInput(
                    f"{names.get(key, f'data.{key}')} is not that of the data position to resume from "
                    f"({key} {value}, was {state[key]}): resume with the same one"
                )
        return state


class ValLoader:
    """This shard's part of the validation text: the same whole documents, in rows, for any number of shards.

    Documents are taken in the order of their hashes until ``tokens`` are predicted in them (all but each one's first),
    laid end to end and cut into rows of ``sequence`` tokens, the last one short. A step is ``batch`` rows over all
    shards; every shard yields the same number of steps, with an empty batch where it has no row. ``tokens`` and
    ``bytes`` are totals over all shards: predicted tokens, and UTF-8 bytes of the documents.

    Raises NotFound and InvalidInput for a folder that is no corpus, is damaged or has no validation documents.
    """

    def __init__(self, folder: Path, sequence: int, tokens: int, batch: int, shard: Shard) -> None:
        text = validation_text(folder, tokens)
        self.tokens, self.bytes = text.predicted, text.bytes
        self._text = _Text.of(text.documents)
        self._sequence, self._batch = sequence, batch
        self._index, self._shards = shard

    def __len__(self) -> int:
        """Steps."""
        return -(-len(self._text) // (self._sequence * self._batch))

    def __iter__(self) -> Iterator[PackedBatch]:
        for step in range(len(self)):
            if self._index is None:
                yield empty_batch()
                continue
            first, last = (step * self._batch + self._batch * i // self._shards for i in (self._index, self._index + 1))
            start, stop = (min(len(self._text), row * self._sequence) for row in (first, last))
            yield _pack([self._text.cut(start, stop)], self._sequence) if start < stop else empty_batch()
