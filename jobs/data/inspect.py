"""Looking at a prepared corpus: whether its files are whole, and what a document reads like."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shoal.jobs.data.prepare import corpus_tokenizer
from shoal.jobs.data.publish import sha256_file
from shoal.jobs.data.writer import read_rows
from shoal.workers.data.manifest import checked_files, read_manifest

FileState = Literal["ok", "damaged", "missing"]


def check_files(folder: Path) -> dict[str, FileState]:
    """Hash every file of the manifest: what stands with each one. Raises NotFound where there is no corpus."""
    return {file.name: _state(folder / file.name, file.sha256) for file in read_manifest(folder).files}


def _state(path: Path, sha256: str) -> FileState:
    try:
        return "ok" if sha256_file(path) == sha256 else "damaged"
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "damaged"


def sample(folder: Path, tokens: int = 128) -> tuple[str, str]:
    """The label of the first training document, and the text of its first ``tokens`` tokens."""
    row = next(read_rows(folder, checked_files(folder, read_manifest(folder), "train")[:1]))
    return row.source, corpus_tokenizer(folder).decode(row.tokens[:tokens].tolist())
