"""A corpus of some texts, and how to make it."""

from __future__ import annotations

from pathlib import Path

from shoal.jobs.data.prepare import PrepareOptions, prepare
from shoal.jobs.data.readers import TextSource
from shoal.workers.data.manifest import Manifest

SMALL = PrepareOptions(vocabulary=300, val_fraction=0.3, group_tokens=200)
TEXTS = [f"document {i}: " + "naïve café 漢字 \t\r\n  x = 1;\n" * (i % 7 + 1) for i in range(40)]


def make(folder: Path, texts: list[str], options: PrepareOptions = SMALL) -> Manifest:
    return prepare([TextSource("texts", texts)], folder, options)
