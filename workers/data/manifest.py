"""What a prepared corpus is: its folder, its manifest, and its validation text. Imports no torch.

A corpus folder holds ``train-*.parquet``, ``val-*.parquet`` (a row a document), ``tokenizer.json``, ``unigram.npy``,
``manifest.json``, and ``tokenizer_config.json`` where the tokenizer came with one. Validation files are
in the order of the documents' hashes; training files in that of the input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from shoal.workers.errors import InvalidInput, NotFound

MANIFEST = "manifest.json"
FORMAT: Literal["shoal-corpus"] = "shoal-corpus"

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
Tokens = npt.NDArray[np.unsignedinteger]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Totals(_Part):
    """Sums over documents. ``tokens`` counts bos and eos; ``bytes`` is the UTF-8 length of the texts."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )


class CorpusFile(_Part):
    """A file of the folder. ``split`` is None, and the counts 0, for what is not Parquet."""

    name: str
    sha256: str
    size: int
    split: Split | None = None
    documents: int = 0
    tokens: int = 0
    row_groups: int = 0


class TokenizerEntry(_Part):
    """The tokenizer of a corpus. ``added`` names the special tokens that its file had not and that were added."""

    sha256: str
    bos: int
    eos: int
    bos_token: str
    eos_token: str
    trained: bool
    added: tuple[str, ...] = ()


class Manifest(_Part):
    """The contents of ``manifest.json``. ``vocabulary`` is the largest token id plus one.

    ``corpus_hash`` is SHA-256 over the tokenizer's hash and the hashes of all documents, training then validation.
    """

    format: Literal["shoal-corpus"] = FORMAT
    version: Literal[1] = 1
    name: str
    vocabulary: int
    vocabulary_asked: int | None
    tokenizer: TokenizerEntry
    val_fraction: float
    splits: dict[Split, Totals]
    sources: dict[str, Totals]
    files: tuple[CorpusFile, ...]
    skipped: dict[str, int]
    duplicates: int
    corpus_hash: str

    def parquet(self, split: Split) -> list[CorpusFile]:
        """The Parquet files of a split, in order."""
        return [file for file in self.files if file.split == split]


def is_corpus(folder: Path) -> bool:
    """Whether ``folder`` holds a published corpus (of any version)."""
    try:
        return json.loads((folder / MANIFEST).read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``; NotFound where there is no corpus, InvalidInput where the manifest is damaged."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{folder} is not a prepared corpus (no {MANIFEST}): make one with shoal data prepare") from None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise InvalidInput(f"{path} is damaged ({where}: {first['msg']}): prepare the corpus again") from None


def checked_files(folder: Path, manifest: Manifest, split: Split) -> list[CorpusFile]:
    """The split's files, each there and of the size in the manifest; InvalidInput names the first that is not."""
    files = manifest.parquet(split)
    if not files:
        kind = "training" if split == "train" else "validation"
        raise InvalidInput(f"{folder} holds no {kind} documents: prepare it again with another --val-fraction")
    for file in files:
        path = folder / file.name
        try:
            size = path.stat().st_size
        except OSError:
            raise InvalidInput(f"{path} is missing: restore it or prepare the corpus again") from None
        if size != file.size:
            raise InvalidInput(
                f"{path} is damaged ({size} bytes instead of {file.size}): restore it or prepare the corpus again"
            )
    return files


def read_row_group(path: Path, group: int, columns: list[str]) -> pa.Table:
    """One row group with its page checksums verified; InvalidInput when the file is missing or damaged."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read_row_group(group, columns=columns)
    except FileNotFoundError:
        raise InvalidInput(f"{path} is missing: restore it or prepare the corpus again") from None
    except (OSError, pa.ArrowException, IndexError) as error:
        why = str(error).splitlines()[0]
        raise InvalidInput(f"{path} is damaged ({why}): restore it or prepare the corpus again") from None


def split_tokens(column: pa.ChunkedArray) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """A ``list<uint>`` column as (tokens ``[T]`` end to end, offsets ``[documents + 1]``)."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.values.to_numpy(zero_copy_only=False)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


@dataclass(frozen=True)
class ValidationText:
    """Whole validation documents in the order of their hashes. ``bytes``: UTF-8 length of their texts.

    ``predicted`` counts the tokens a model predicts in them: all but each document's first (eos included, bos not).
    """

    documents: list[Tokens]
    bytes: int

    @property
    def predicted(self) -> int:
        return sum(len(document) - 1 for document in self.documents)


def validation_text(folder: Path, tokens: int) -> ValidationText:
    """The first validation documents by hash, until ``tokens`` are predicted in them; one document at least.

    Raises NotFound and InvalidInput as :func:`read_manifest` does, and InvalidInput where there are no such documents.
    """
    documents: list[Tokens] = []
    predicted = size = 0
    for document, length in _validation_documents(folder):
        documents.append(document)
        predicted += len(document) - 1
        size += length
        if predicted >= tokens:
            break
    return ValidationText(documents, size)


def _validation_documents(folder: Path) -> Iterator[tuple[Tokens, int]]:
    for file in checked_files(folder, read_manifest(folder), "val"):
        for group in range(file.row_groups):
            table = read_row_group(folder / file.name, group, ["tokens", "bytes"])
            tokens, offsets = split_tokens(table["tokens"])
            lengths = table["bytes"].to_pylist()
            for start, end, length in zip(offsets[:-1], offsets[1:], lengths, strict=True):
                yield tokens[start:end], length
