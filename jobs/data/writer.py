"""Rows of a corpus to Parquet: bounded row groups, bounded files, and the validation split in the order of hashes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shoal.jobs.data.publish import sha256_file
from shoal.workers.data.manifest import CorpusFile, Split, Tokens, read_row_group, split_tokens

GROUP_TOKENS = 1 << 18
FILE_TOKENS = 1 << 26


@dataclass(frozen=True)
class Row:
    """A document: ``tokens [T]`` with bos and eos, its label, SHA-256 of its text in hexadecimal, its UTF-8 length."""

    tokens: Tokens
    source: str
    hash: str
    bytes: int


def schema(dtype: np.dtype[np.unsignedinteger]) -> pa.Schema:
    """The columns of a corpus."""
    return pa.schema(
        {
            "tokens": pa.list_(pa.from_numpy_dtype(dtype)),
            "source": pa.dictionary(pa.int32(), pa.string()),
            "hash": pa.string(),
            "bytes": pa.int64(),
        }
    )


@dataclass
class SplitWriter:
    """Writes rows to ``folder/{split}-00000.parquet`` and on, a row group every ``group_tokens`` tokens."""

    folder: Path
    split: Split
    dtype: np.dtype[np.unsignedinteger]
    group_tokens: int = GROUP_TOKENS
    file_tokens: int = FILE_TOKENS
    prefix: str = ""
    files: list[CorpusFile] = field(default_factory=list)
    _rows: list[Row] = field(default_factory=list)
    _pending: int = 0
    _open: _OpenFile | None = None

    def add(self, row: Row) -> None:
        """Append a row; what has been gathered is written when it fills a row group."""
        self._rows.append(row)
        self._pending += len(row.tokens)
        if self._pending >= self.group_tokens:
            self._write_group()

    def close(self) -> list[CorpusFile]:
        """Write what is left and return the files."""
        if self._rows:
            self._write_group()
        self._close_file()
        return self.files

    def abandon(self) -> None:
        """Let go of an open file after a failure, whatever its state."""
        if self._open:
            self._open.sink.close()

    def _write_group(self) -> None:
        if self._open is None:
            path = self.folder / f"{self.prefix}{self.split}-{len(self.files):05d}.parquet"
            self._open = _OpenFile.create(path, schema(self.dtype))
        self._open.write(_table(self._rows, self._open.writer.schema))
        self._open.documents += len(self._rows)
        self._open.tokens += self._pending
        self._rows, self._pending = [], 0
        if self._open.tokens >= self.file_tokens:
            self._close_file()

    def _close_file(self) -> None:
        if self._open:
            self.files.append(self._open.close(self.split))
            self._open = None


@dataclass
class _OpenFile:
    """A Parquet file that is being written. The sink is our own, so that it can be closed after a failed write."""

    path: Path
    sink: pa.OSFile
    writer: pq.ParquetWriter
    documents: int = 0
    tokens: int = 0
    row_groups: int = 0

    @classmethod
    def create(cls, path: Path, columns: pa.Schema) -> _OpenFile:
        sink = pa.OSFile(str(path), "wb")
        writer = pq.ParquetWriter(
            sink,
            columns,
            compression="zstd",
            use_dictionary=["source"],
            write_statistics=False,
            write_page_checksum=True,
        )
        return cls(path, sink, writer)

    def write(self, table: pa.Table) -> None:
        self.writer.write_table(table, row_group_size=len(table))
        self.row_groups += 1

    def close(self, split: Split) -> CorpusFile:
        self.writer.close()
        self.sink.close()
        return CorpusFile(
            name=self.path.name,
            sha256=sha256_file(self.path),
            size=self.path.stat().st_size,
            split=split,
            documents=self.documents,
            tokens=self.tokens,
            row_groups=self.row_groups,
        )


def _table(rows: list[Row], columns: pa.Schema) -> pa.Table:
    offsets = np.cumsum([0, *(len(row.tokens) for row in rows)], dtype=np.int32)
    tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([row.tokens for row in rows])))
    return pa.table(
        [
            tokens.cast(columns.field("tokens").type),
            pa.array([row.source for row in rows]).dictionary_encode(),
            pa.array([row.hash for row in rows]),
            pa.array([row.bytes for row in rows], pa.int64()),
        ],
        schema=columns,
    )


def read_rows(folder: Path, files: list[CorpusFile]) -> Iterator[Row]:
    """The rows of Parquet files, a row group in memory at a time."""
    for file in files:
        for group in range(file.row_groups):
            table = read_row_group(folder / file.name, group, ["tokens", "source", "hash", "bytes"])
            tokens, offsets = split_tokens(table["tokens"])
            rest = (table[name].to_pylist() for name in ("source", "hash", "bytes"))
            for start, end, source, digest, size in zip(offsets[:-1], offsets[1:], *rest, strict=True):
                yield Row(tokens[start:end], source, digest, size)


def write_in_hash_order(spool: list[CorpusFile], writer: SplitWriter, memory_tokens: int = FILE_TOKENS) -> list[str]:
    """Add the rows of ``spool`` to ``writer`` in the order of their hashes, and return the hashes in that order.

    Each pass over the spool takes the next rows in that order, about ``memory_tokens`` tokens of them, into memory.
    """
    order = sorted(row.hash for row in read_rows(writer.folder, spool))
    passes = max(1, -(-sum(file.tokens for file in spool) // memory_tokens))
    share = max(1, -(-len(order) // passes))
    for start in range(0, len(order), share):
        first, last = order[start], order[min(start + share, len(order)) - 1]
        rows = [row for row in read_rows(writer.folder, spool) if first <= row.hash <= last]
        for row in sorted(rows, key=lambda row: row.hash):
            writer.add(row)
    return order
