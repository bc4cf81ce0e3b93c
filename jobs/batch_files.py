"""The files of an inference job: rows of prompts in, finished rows that survive a kill, rows of answers out."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.jobs.data.publish import sha256_file
from shoal.jobs.data.readers import JSONL
from shoal.workers.errors import InvalidInput, NotFound

KINDS = (*JSONL, ".parquet")
KNOWN = ("id", "prompt", "max_tokens", "temperature", "seed")  # columns of an input that are read; others are not
COLUMNS = ("id", "prompt", "text", "tokens", "finish_reason", "error")  # of an output
GROUP = 1024  # rows in memory at once
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A prompt. number: its place in the file, from 0, which is its id where it has none. own: values of Sampling
    that it gives itself. error: why it cannot be used; empty if it can."""

    number: int
    id: int | str
    prompt: str | None
    own: dict[str, Any] = field(default_factory=dict)
    error: str = ""


# In


@dataclass(frozen=True)
class Input:
    """A file of prompts, ``rows`` of them. sha256: of its bytes."""

    path: Path
    rows: int
    sha256: str

    @classmethod
    def open(cls, path: Path) -> Input:
        """Looks at a file. Raises NotFound, and InvalidInput where no row of it could be used."""
        _check_kind("--input", path)
        if not path.is_file():
            raise NotFound(f"--input {path} does not exist or is no file: give a .jsonl or .parquet file of prompts")
        try:
            rows = _count_parquet(path) if path.suffix == ".parquet" else _count_jsonl(path)
            if not rows:
                raise InvalidInput(f"--input {path} has no rows: give a file with prompts")
            return cls(path, rows, sha256_file(path))
        except OSError as error:
            raise _unreadable(path, error) from None

    def read(self) -> Iterator[Row]:
        """The rows in order, those that cannot be used with their error. Raises InvalidInput for a damaged file."""
        try:
            records = _read_parquet(self.path) if self.path.suffix == ".parquet" else _read_jsonl(self.path)
            for number, record in enumerate(records):
                yield _row(number, record)
        except OSError as error:
            raise _unreadable(self.path, error) from None


def _check_kind(option: str, path: Path) -> None:
    if path.suffix not in KINDS:
        raise InvalidInput(f"{option} {path} does not end in {', '.join(KINDS)}: name a file of one of these kinds")


def _unreadable(path: Path, error: OSError) -> InvalidInput:
    why = error.strerror or str(error).splitlines()[0]
    return InvalidInput(f"--input {path} cannot be read ({why}): check the file and its permissions")


def _count_jsonl(path: Path) -> int:
    """Lines with something on them. Raises InvalidInput when none is an object with a prompt."""
    rows, usable = 0, False
    for record in _read_jsonl(path):
        rows += 1
        usable = usable or (isinstance(record, dict) and "prompt" in record)
    if rows and not usable:
        raise InvalidInput(f'--input {path} has no line with a key \'prompt\': write lines like {{"prompt": "text"}}')
    return rows


def _read_jsonl(path: Path) -> Iterator[Any]:
    """What each line says; None for a line that is not JSON. Empty lines are no rows."""
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _count_parquet(path: Path) -> int:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, int(file.metadata.num_rows)
    except pa.ArrowException as error:
        raise _damaged(path, error) from None
    if "prompt" not in schema.names:
        names = ", ".join(schema.names[:8])
        raise InvalidInput(f"--input {path} has no column 'prompt' (it has {names}): rename the one with the texts")
    kind = schema.field("prompt").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InvalidInput(f"--input {path} has no text in column 'prompt' ({kind}): write text into it")
    return rows


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            known = [name for name in KNOWN if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=GROUP, columns=known):
                columns = [_values(batch.column(name)) for name in known]
                yield from (dict(zip(known, values, strict=True)) for values in zip(*columns, strict=True))
    except pa.ArrowException as error:
        raise _damaged(path, error) from None


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # in some row: it alone is refused, for holding bytes
        return [_decoded(value) for value in column.cast(pa.binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _damaged(path: Path, error: Exception) -> InvalidInput:
    why = str(error).splitlines()[0]
    return InvalidInput(f"--input {path} is not a readable Parquet file ({why}): write it again")


def _row(number: int, record: Any) -> Row:
    name: int | str = number
    prompt = None
    try:
        if not isinstance(record, dict):
            raise InvalidInput("the line is not a JSON object: correct it")
        name = _id(record.get("id"), number)
        prompt = _prompt(record.get("prompt"))
        return Row(number, name, prompt, _own(record))
    except InvalidInput as error:
        return Row(number, name, prompt, error=str(error))


def _id(given: Any, number: int) -> int | str:
    if _missing(given):
        return number
    if isinstance(given, float) and given.is_integer():  # pandas makes floats of integers where some are missing
        given = int(given)
    if isinstance(given, int) and not isinstance(given, bool) and -(2**63) <= given < 2**63:
        return given
    if isinstance(given, str) and _is_unicode(given):
        return given
    raise InvalidInput(f"id={_shown(given)} is neither text nor a 64-bit integer: give one of these, or none")


def _prompt(given: Any) -> str:
    if _missing(given):
        raise InvalidInput("prompt is missing: give a text")
    if not isinstance(given, str) or not _is_unicode(given):
        raise InvalidInput(f"prompt={_shown(given)} is no text: give one")
    if not given:
        raise InvalidInput("prompt is empty: give a text")
    return given


def _missing(value: Any) -> bool:
    """Nothing, null, or NaN, which pandas writes for nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _own(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its sampling."""
    found = {}
    for key, whole in (("max_tokens", True), ("temperature", False), ("seed", True)):
        value: Any = record.get(key)
        if _missing(value):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (whole and isinstance(value, float) and not value.is_integer()):
            raise InvalidInput(f"{key}={_shown(value)} is no {'whole ' * whole}number: give one, or none")
        found[key] = int(value) if whole else value
    return found


def _is_unicode(text: str) -> bool:
    """Whether it holds no half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


# Finished rows


class Ledger:
    """Finished rows of a job, a line each, in the order in which they finished; ``job`` stands in the first line.

    A row is in the file when ``add`` returns, so that it outlives this process however that ends. A line that was
    torn then is left out when the file is opened again, and its row is computed again. One process holds it at a time.
    """

    def __init__(self, path: Path, job: Record) -> None:
        """Begins a job's ledger, or goes on with it. Raises InvalidInput when it is another job's, or held."""
        self.path, self.failed, self.whole_ids = path, 0, True
        self._places: dict[int, int] = {}  # of rows, in bytes from the beginning
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read(job)
            except BaseException:
                os.close(self._fd)
                raise
        except BlockingIOError:
            raise InvalidInput(f"{path} is being written by another process: let that end, or end it") from None
        except OSError as error:
            raise self._refusal(error) from None

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, number: int, record: Record) -> None:
        """Writes down a row that is finished: ``COLUMNS``. Raises InvalidInput when the file cannot be written."""
        try:
            place = self._append({"row": number, **record})
        except OSError as error:
            raise self._refusal(error) from None
        self._take(number, place, record)

    def records(self) -> Iterator[Record]:
        """All rows by number."""
        with self.path.open("rb") as file:
            for _, place in sorted(self._places.items()):
                file.seek(place)
                record = json.loads(file.readline())
                yield {name: record[name] for name in COLUMNS}

    def close(self, remove: bool = False) -> None:
        """Lets go of the file; ``remove``: it has served."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _read(self, job: Record) -> None:
        line = head = b""
        with self.path.open("rb") as file:
            head = file.readline()
            if not head.endswith(b"\n") and _line(job).startswith(head):  # new, or killed while it was begun
                os.ftruncate(self._fd, 0)
                self._append(job)
                return
            self._check(_parsed(head), job)
            place = len(head)
            for line in file:
                record = _parsed(line)
                if record:
                    self._take(record["row"], place, record)
                place += len(line)
        if line and not line.endswith(b"\n"):
            os.write(self._fd, b"\n")

    def _check(self, begun: Record | None, job: Record) -> None:
        if begun is None or begun.keys() != job.keys():
            raise InvalidInput(f"{self.path} is not what an inference job left: move it, or choose another --output")
        for key, value in job.items():
            if begun[key] != value:
                raise InvalidInput(
                    f"{self.path} was begun with {key}={begun[key]}, and now {key}={value}: "
                    "give the same to go on with it, or remove it to begin anew"
                )

    def _take(self, number: int, place: int, record: Record) -> None:
        self._places[number] = place
        self.failed += bool(record["error"])
        self.whole_ids = self.whole_ids and isinstance(record["id"], int)

    def _append(self, record: Record) -> int:
        line = _line(record)
        place = os.fstat(self._fd).st_size
        while line:
            line = line[os.write(self._fd, line) :]
        return place

    def _refusal(self, error: OSError) -> InvalidInput:
        return InvalidInput(
            f"{self.path} cannot be written ({error.strerror}): free or unlock its disk, or choose another --output"
        )


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> Record | None:
    """A line's object; None for a line that is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


# Out


def check_output(source: Path, target: Path) -> None:
    """Raises InvalidInput when ``target`` is the input, exists, has no folder, or is of an unknown kind."""
    _check_kind("--output", target)
    if source.resolve() == target.resolve():
        raise InvalidInput(f"--output {target} is the input itself: choose another --output")
    if target.exists() or target.is_symlink():
        raise InvalidInput(f"--output {target} exists already: remove it, or choose another --output")
    if not target.parent.is_dir():
        raise InvalidInput(f"--output {target} lies in a folder that does not exist: make {target.parent}")


def write_output(target: Path, ledger: Ledger) -> None:
    """Writes all rows in the input's order; the file appears at once, when it is whole. Raises InvalidInput."""
    draft = target.with_name(f".{target.name}.tmp")
    try:
        if target.suffix == ".parquet":
            _write_parquet(draft, ledger)
        else:
            _write_jsonl(draft, ledger)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise InvalidInput(f"--output {target} cannot be written ({why}): free its disk, then go on") from None
    finally:
        draft.unlink(missing_ok=True)


def _write_jsonl(path: Path, ledger: Ledger) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in ledger.records():
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, ledger: Ledger) -> None:
    """The id column holds integers when all ids are, else text."""
    types = {"id": pa.int64() if ledger.whole_ids else pa.string(), "tokens": pa.int64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
    records = ledger.records()
    # the sink is our own, so that it can be closed after a failed write
    with pa.OSFile(str(path), "wb") as sink, pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        while group := list(islice(records, GROUP)):
            if not ledger.whole_ids:
                group = [{**record, "id": str(record["id"])} for record in group]
            writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=GROUP)
