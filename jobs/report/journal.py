"""metrics.jsonl: one JSON object a line, appended as a run goes on, cut back when it falls back to a checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.workers.errors import InvalidInput

Record = dict[str, Any]

# What a step computed; it is computed again after a fallback. Events happened, and stay.
REPEATED = ("train", "eval", "load", "gates", "coverage")


def read_records(path: Path) -> Iterator[Record]:
    """The records of a metrics.jsonl, in order; lines that are not JSON objects (a torn last one) are left out.

    A file that does not exist has no records.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            record = _parsed(line)
            if record is not None:
                yield record


class Journal:
    """Appends records to ``path``, each of them in the file when ``append`` returns.

    Raises InvalidInput when the file cannot be opened or written.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = path
        self._fd = -1
        self.rewind(resume_step)

    def append(self, record: Record) -> None:
        """Writes one line. Numbers that are not finite become null, which is what JSON has for them."""
        line = json.dumps(_finite(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            raise self._refusal(error) from error

    def rewind(self, step: int | None) -> None:
        """Removes what was computed after ``step`` (None: nothing) and a torn last line; events stay.

        The new file replaces the old one at once: a reader, or a crash, sees one or the other.
        """
        self.close()
        try:
            self._cut(step)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Closes the file; ``rewind`` opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _cut(self, step: int | None) -> None:
        if not self.path.exists():
            return
        draft = self.path.with_name(self.path.name + ".part")
        changed = False
        try:
            with self.path.open("rb") as old, draft.open("wb") as new:
                for line in old:
                    if line.endswith(b"\n") and _stays(_parsed(line), step):
                        new.write(line)
                    else:
                        changed = True
                new.flush()
                os.fsync(new.fileno())
            if changed:
                draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)

    def _refusal(self, error: OSError) -> InvalidInput:
        return InvalidInput(
            f"{self.path} cannot be written ({error.strerror}): free or unlock that disk, then resume the run"
        )


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _stays(record: Record | None, step: int | None) -> bool:
    if record is None:
        return False
    return step is None or record.get("kind") not in REPEATED or record.get("step", 0) <= step


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
