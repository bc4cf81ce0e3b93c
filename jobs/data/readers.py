"""Documents out of text files, folders of them, JSONL and Parquet: one at a time, never a whole corpus."""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.jobs.data.publish import SCRATCH
from shoal.workers.data.manifest import is_corpus
from shoal.workers.errors import InvalidInput, NotFound

JSONL = (".jsonl", ".ndjson")
CHUNK = 1 << 22


@dataclass(frozen=True)
class Document:
    """A text, and the label of where it comes from."""

    text: str
    source: str


class Source(Protocol):
    """An input that can be read more than once, always in the same order."""

    @property
    def size(self) -> int:
        """About how many bytes are read from it."""

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Its documents; what is left out is counted in ``skipped`` by reason."""


@dataclass(frozen=True)
class ReadOptions:
    """``field``: the JSONL field or Parquet column with the text. ``separator``: ends a document inside a text file.

    ``ignore``: absolute paths of corpus folders, there or under way, that are not walked into.
    """

    field: str = "text"
    separator: str | None = None
    ignore: tuple[Path, ...] = ()


class _Unusable(Exception):
    """A file that cannot be used: in a folder its reason is counted, given directly its sentence is shown."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class TextSource:
    """Texts that are in memory already."""

    label: str
    texts: Sequence[str]

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        for text in self.texts:
            if text.strip():
                yield Document(text, self.label)
            else:
                skipped["empty"] += 1


@dataclass(frozen=True)
class FileSource:
    """Files, each read as its ending says. ``direct``: named by a person, so that a bad one is refused, not skipped."""

    label: str
    files: Sequence[Path]
    options: ReadOptions
    direct: bool = True

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files if path.is_file())

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        for path in self.files:
            yield from _documents(path, self, skipped)


@dataclass(frozen=True)
class FolderSource:
    """A folder, walked in sorted order; hidden entries, prepared corpora and unusable files are skipped."""

    label: str
    folder: Path
    options: ReadOptions

    @property
    def size(self) -> int:
        return FileSource(self.label, list(self._walk(Counter())), self.options).size

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        files = list(self._walk(skipped))
        yield from FileSource(self.label, files, self.options, direct=False).documents(skipped)

    def _walk(self, skipped: Counter[str]) -> Iterator[Path]:
        def unreadable(_: OSError) -> None:
            skipped["unreadable"] += 1

        for root, folders, files in os.walk(self.folder, onerror=unreadable):
            here = Path(root)
            folders[:] = (name for name in folders if not name.startswith(SCRATCH))  # such as the corpus under way
            shown = sorted(name for name in folders if not name.startswith("."))
            skipped["hidden"] += sum(name.startswith(".") for name in (*folders, *files))
            kept = [name for name in shown if not self._ignored(here / name)]
            skipped["prepared corpus"] += len(shown) - len(kept)
            folders[:] = kept
            for name in sorted(files):
                if name.startswith("."):
                    continue
                if (here / name).is_file():
                    yield here / name
                else:
                    skipped["not a regular file"] += 1

    def _ignored(self, folder: Path) -> bool:
        """Whether ``folder`` is a corpus, or one of ``ignore``."""
        return folder.resolve() in self.options.ignore or is_corpus(folder)


def open_inputs(inputs: Sequence[Path], options: ReadOptions) -> list[Source]:
    """A source for each path. Raises NotFound for a path that is not there, InvalidInput for a device or a pipe."""
    sources: list[Source] = []
    for path in inputs:
        label = path.resolve().name or "root"
        if path.is_dir():
            if is_corpus(path):
                raise InvalidInput(f"{path} is a prepared corpus already: give the text that it was made from")
            sources.append(FolderSource(label, path, options))
        elif path.is_file():
            sources.append(FileSource(label, [path], options))
        elif path.exists():
            raise InvalidInput(f"{path} is neither a file nor a folder: copy its contents into a file first")
        else:
            raise NotFound(f"{path} does not exist: give a text file, a folder, a .jsonl or a .parquet file")
    return sources


def _documents(path: Path, source: FileSource, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of one file. A file in a folder is skipped only while nothing of it has been taken."""
    taken = False
    try:
        for text in _texts(path, source.options):
            if text.strip():
                taken = True
                yield Document(text, source.label)
            else:
                skipped["empty"] += 1
    except _Unusable as unusable:
        if source.direct or taken:
            raise InvalidInput(str(unusable)) from None
        skipped[unusable.reason] += 1


def _texts(path: Path, options: ReadOptions) -> Iterator[str]:
    try:
        if path.stat().st_size == 0:
            raise _Unusable("empty", f"{path} is empty: give a file with text")
        if path.suffix in JSONL:
            yield from _read_jsonl(path, options.field)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, options.field)
        elif options.separator:
            yield from _read_separated(path, options.separator)
        else:
            yield "".join(_decoded(path))
    except OSError as error:
        why = error.strerror or str(error)
        raise _Unusable("unreadable", f"{path} cannot be read ({why}): check the file and its permissions") from None


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in pieces. A NUL byte means that it is no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK)
            if b"\0" in chunk:
                raise _Unusable("binary", f"{path} is a binary file: give a text, .jsonl or .parquet file")
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                raise _Unusable("not UTF-8", f"{path} is not UTF-8: convert it, say with iconv -t UTF-8") from None
            if not chunk:
                return


def _read_separated(path: Path, separator: str) -> Iterator[str]:
    """The parts between separators. The file is read twice, so that a bad one is known before anything is taken."""
    for _ in _decoded(path):
        pass
    rest = ""
    for piece in _decoded(path):
        *whole, rest = (rest + piece).split(separator)
        yield from whole
    if rest:
        yield rest


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                why = str(error).split(":")[0]
                raise _Unusable("not JSON", f"{where} is not JSON ({why}): correct or remove the line") from None
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(list(record)[:8]) if isinstance(record, dict) and record else "none"
                problem = "text in field" if isinstance(record, dict) and field in record else "field"
                sentence = f"{where} has no {problem} {field!r}: name one of its fields with --field ({keys})"
                raise _Unusable(f"no field {field}", sentence)
            if not _is_unicode(text):
                sentence = f"{where} holds half a surrogate pair, which is no character: correct the line"
                raise _Unusable("not Unicode", sentence)
            yield text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                names = ", ".join(schema.names)
                sentence = f"{path} has no column {column!r}: name one of its columns with --field ({names})"
                raise _Unusable(f"no field {column}", sentence)
            kind = schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                sentence = f"{path} has no text in column {column!r} ({kind}): name another with --field"
                raise _Unusable(f"no text in {column}", sentence)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pa.ArrowException, UnicodeDecodeError) as error:
        why = str(error).splitlines()[0]
        raise _Unusable("not Parquet", f"{path} is not a readable Parquet file ({why}): write it again") from None
