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


class TrainLoader:
    """This shard's micro-batches of an endless stream of training rows.

    A global batch is ``batch`` rows of exactly ``sequence`` tokens; micro-batch m of M = ``accumulate`` is its m-th
    part, and shard r of R takes the r-th part of each micro-batch, so the rows do not depend on R. ``shard`` is (r, R);
    r = None is a rank without tokens. Each epoch lays all documents end to end in an order of its own. A document that
    a row cuts goes on in the next row as a new piece, with positions from 0; each token of a document but its first is
    the target of exactly one position in an epoch. ``state`` is that of another loader of the same corpus, seed and
    ``shuffle_groups``: the stream goes on where that one stopped, whatever the two shards.

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
        shard: Shard,
        state: dict[str, Any] | None = None,
    ) -> None:
        index, shards = shard
        if batch % (accumulate * shards):
            raise InvalidInput(
                f"train.batch={batch} does not divide into {accumulate} micro-batches over {shards} attention ranks: "
                f"set train.batch to a multiple of {accumulate * shards}"
            )
        self._rows = batch // accumulate // shards
        self._sequence, self._accumulate, self._index, self._shards = sequence, accumulate, index, shards
        self._windows = _Windows(folder, seed, shuffle_groups)
        self._identity = {"corpus": self._windows.corpus_hash, "seed": seed, "shuffle_groups": shuffle_groups}
        self._epoch = self._window = self._offset = 0
        if state is not None:
            self._go_to(folder, state)
        self._text = self._windows.load(self._epoch, self._window)

    def next(self) -> list[PackedBatch]:
        """The ``accumulate`` micro-batches of the next global batch, each ``[rows * sequence]`` tokens, or none."""
        mine = self._rows * self._sequence
        batches = []
        for _ in range(self._accumulate):
            if self._index is None:
                self._advance(mine * self._shards)
                batches.append(empty_batch())
                continue
            self._advance(mine * self._index)
            batches.append(_pack(self._take(mine), self._sequence))
            self._advance(mine * (self._shards - 1 - self._index))
        return batches

    def state(self) -> dict[str, Any]:
        """Where the stream stands, the same on all shards: JSON-able, a few numbers and the corpus's hash."""
        return {**self._identity, "epoch": self._epoch, "window": self._window, "offset": self._offset}

    def _go_to(self, folder: Path, state: dict[str, Any]) -> None:
        names = {"corpus": f"data.corpus={folder}", "seed": "train.seed", "shuffle_groups": "data.shuffle_groups"}
        for key, value in self._identity.items():
            if state[key] != value:
                raise InvalidInput(
                    f"{names[key]} is not that of the data position to resume from "
                    f"({key} {value}, was {state[key]}): resume with the same one"
                )
        self._epoch, self._window, self._offset = state["epoch"], state["window"], state["offset"]

    def _take(self, count: int) -> list[_Cut]:
        cuts = []
        while count:
            self._enter()
            stop = min(len(self._text), self._offset + count)
            cuts.append(self._text.cut(self._offset, stop))
            count -= stop - self._offset
            self._offset = stop
        return cuts

    def _advance(self, count: int) -> None:
        while count:
            self._enter()
            step = min(count, len(self._text) - self._offset)
            self._offset += step
            count -= step

    def _enter(self) -> None:
        """Load the next window when this one is used up: not before, so that the state stays in the window it names."""
        if self._offset < len(self._text):
            return
        self._offset, self._window = 0, self._window + 1
        if self._window == self._windows.count:
            self._epoch, self._window = self._epoch + 1, 0
        self._text = self._windows.load(self._epoch, self._window)


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
