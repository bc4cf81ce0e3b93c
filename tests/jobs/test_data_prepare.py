"""Preparing a corpus: what is in it is the input, whatever its order."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_texts import SMALL, TEXTS, make
from tokenizers import Tokenizer, models, pre_tokenizers

from shoal.jobs.data.inspect import check_files, sample
from shoal.jobs.data.prepare import PrepareOptions, corpus_tokenizer, prepare
from shoal.jobs.data.readers import Document, TextSource
from shoal.jobs.data.tokenizer import Sample, load_tokenizer, train_tokenizer
from shoal.jobs.data.writer import Row, SplitWriter, write_in_hash_order
from shoal.workers.data.manifest import read_manifest
from shoal.workers.errors import InvalidInput

DOCUMENT = 100_000  # bytes


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """A split's rows, read without the project's own reader."""
    return [row for path in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_documents_read_back_as_they_were(tmp_path: Path) -> None:
    texts = [*TEXTS, "spelt out: <|bos|> and <|eos|>", "\ufeffmark", "emoji 👩‍👩‍👧 and \x07 control"]
    manifest = make(tmp_path / "c", texts)
    tokenizer = corpus_tokenizer(tmp_path / "c")
    table = rows(tmp_path / "c", "train") + rows(tmp_path / "c", "val")
    by_hash = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
    assert {row["hash"] for row in table} == set(by_hash) and len(table) == len(texts)
    for row in table:
        text = by_hash[row["hash"]]
        assert (row["tokens"][0], row["tokens"][-1]) == (0, 1)
        assert not {0, 1} & set(row["tokens"][1:-1])
        assert tokenizer.decode(row["tokens"]) == text
        assert row["bytes"] == len(text.encode()) and row["source"] == "texts"
    assert (manifest.tokenizer.bos_token, manifest.tokenizer.eos_token) == ("<|bos|>", "<|eos|>")


@given(text=st.text(min_size=1, max_size=200).filter(str.strip))
def test_any_text_survives_its_tokens(text: str) -> None:
    tokenizer = _trained()
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.decode(tokens.tolist()) == text
    assert [*tokenizer.prompt(text), tokenizer.eos] == tokens.tolist()


def _trained(made: list[Any] = []) -> Any:  # noqa: B006 (trained once)
    if not made:
        made.append(train_tokenizer(TEXTS, 300))
    return made[0]


def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    source = [TextSource("a", TEXTS[:10]), TextSource("b", [*TEXTS[5:], TEXTS[0], "  \n"])]
    manifest = prepare(source, tmp_path / "c", SMALL)
    assert manifest == read_manifest(tmp_path / "c")
    tables = {split: rows(tmp_path / "c", split) for split in ("train", "val")}
    for split, table in tables.items():
        totals = manifest.splits[split]  # type: ignore[index]
        assert totals.documents == len(table) > 0
        assert totals.tokens == sum(len(row["tokens"]) for row in table)
        assert totals.bytes == sum(row["bytes"] for row in table)
    assert manifest.duplicates == 6 and manifest.skipped == {"empty": 1}
    assert {name: totals.documents for name, totals in manifest.sources.items()} == {"a": 10, "b": 30}
    for file in manifest.files:
        data = (tmp_path / "c" / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        if file.split:
            metadata = pq.ParquetFile(tmp_path / "c" / file.name).metadata
            assert (file.row_groups, file.documents) == (metadata.num_row_groups, metadata.num_rows)
    order = [row["hash"] for split in ("train", "val") for row in tables[split]]
    digest = hashlib.sha256("".join([manifest.tokenizer.sha256, *order]).encode()).hexdigest()
    assert manifest.corpus_hash == digest
    assert set(check_files(tmp_path / "c").values()) == {"ok"}
    assert {path.name for path in (tmp_path / "c").iterdir()} == {*(f.name for f in manifest.files), "manifest.json"}
    assert sample(tmp_path / "c")[1].startswith("document ")


def test_columns_and_row_groups_are_as_documented(tmp_path: Path) -> None:
    make(tmp_path / "c", TEXTS)
    file = pq.ParquetFile(tmp_path / "c" / "train-00000.parquet")
    schema = file.schema_arrow
    assert schema.field("tokens").type == pa.list_(pa.uint16())
    assert schema.field("source").type == pa.dictionary(pa.int32(), pa.string())
    assert (schema.field("hash").type, schema.field("bytes").type) == (pa.string(), pa.int64())
    sizes = [sum(map(len, file.read_row_group(i)["tokens"].to_pylist())) for i in range(file.metadata.num_row_groups)]
    longest = max(len(row["tokens"]) for row in rows(tmp_path / "c", "train"))
    assert len(sizes) > 2 and all(200 <= size < 200 + longest for size in sizes[:-1])


def test_the_split_does_not_depend_on_the_order(tmp_path: Path) -> None:
    forward, backward = make(tmp_path / "a", TEXTS), make(tmp_path / "b", TEXTS[::-1])
    hashes = {c: {s: [r["hash"] for r in rows(tmp_path / c, s)] for s in ("train", "val")} for c in "ab"}
    assert hashes["a"]["val"] == hashes["b"]["val"] == sorted(hashes["a"]["val"])
    assert hashes["a"]["train"] != hashes["b"]["train"] and set(hashes["a"]["train"]) == set(hashes["b"]["train"])
    assert forward.tokenizer.sha256 == backward.tokenizer.sha256
    more = make(tmp_path / "c", [*TEXTS, "another one"], PrepareOptions(vocabulary=300, val_fraction=0.3))
    assert set(hashes["a"]["val"]) <= {row["hash"] for row in rows(tmp_path / "c", "val")}
    assert more.splits["val"].documents >= forward.splits["val"].documents


@pytest.mark.parametrize("texts", [TEXTS[:2], TEXTS[:9][::-1]])
def test_a_small_corpus_keeps_its_smallest_hash_for_validation(tmp_path: Path, texts: list[str]) -> None:
    """A fraction that takes no document by hash still validates on one, the same in any order."""
    manifest = make(tmp_path / "c", texts, PrepareOptions(vocabulary=300, val_fraction=1e-9))
    smallest = min(hashlib.sha256(text.encode()).hexdigest() for text in texts)
    assert [row["hash"] for row in rows(tmp_path / "c", "val")] == [smallest]
    assert manifest.splits["train"].documents == len(texts) - 1
    assert smallest not in {row["hash"] for row in rows(tmp_path / "c", "train")}


def test_a_fraction_of_zero_keeps_nothing_back(tmp_path: Path) -> None:
    manifest = make(tmp_path / "c", TEXTS[:1], PrepareOptions(vocabulary=300, val_fraction=0))
    assert manifest.splits["val"].documents == 0 and not list((tmp_path / "c").glob("val*"))


def test_one_document_is_too_few_to_split(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"1 document, too few .* --separator"):
        make(tmp_path / "c", TEXTS[:1])
    with pytest.raises(InvalidInput, match=r"--val-fraction 1\.5 is not in \[0, 1\)"):
        make(tmp_path / "c", TEXTS, PrepareOptions(val_fraction=1.5))
    assert list(tmp_path.iterdir()) == []


def test_preparing_twice_in_new_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shoal.jobs.data.prepare import *; "
        "from shoal.jobs.data.readers import *; "
        "sources = open_inputs([Path(sys.argv[1])], ReadOptions()); "
        "prepare(sources, Path(sys.argv[2], 'c'), PrepareOptions(vocabulary=900))"
    )
    source = Path(json.__file__).parent
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(source), str(tmp_path / seed)]
        subprocess.run(command, check=True, env=environment, timeout=120)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / s / "c").iterdir()} for s in "12")
    assert one == two and {"tokenizer.json", "manifest.json", "train-00000.parquet"} <= set(one)


def test_the_tokenizers_sample_is_bounded_fair_and_free_of_duplicates() -> None:
    texts = [f"{i:05d}" * 20 for i in range(1000)]

    def drawn(order: list[str]) -> list[str]:
        sample = Sample(limit=2000)
        for text in order:
            sample.add(text, hashlib.sha256(text.encode()).digest())
            assert sum(map(len, sample.texts())) < 2000 + 2000 // 16
        return sample.texts()

    chosen = drawn(texts)
    assert chosen == drawn(texts[::-1]) == drawn([*texts, *texts])
    smallest = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert chosen == smallest[: len(chosen)] and sum(map(len, chosen)) >= 2000


def test_validation_text_stays_out_of_the_tokenizer(tmp_path: Path) -> None:
    manifest = make(tmp_path / "a", TEXTS)
    val = {row["hash"] for row in rows(tmp_path / "a", "val")}
    train_only = [text for text in TEXTS if hashlib.sha256(text.encode()).hexdigest() not in val]
    assert make(tmp_path / "b", train_only).tokenizer.sha256 == manifest.tokenizer.sha256


def word_tokenizer(path: Path, words: int, specials: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, words)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("specials", "added", "ends"),
    [
        (["<s>", "</s>"], (), ("<s>", "</s>")),
        (["<|endoftext|>"], ("<|bos|>",), ("<|bos|>", "<|endoftext|>")),
        ([], ("<|bos|>", "<|eos|>"), ("<|bos|>", "<|eos|>")),
    ],
)
def test_an_existing_tokenizer_is_used_and_completed(
    tmp_path: Path, specials: list[str], added: tuple[str, ...], ends: tuple[str, str]
) -> None:
    path = word_tokenizer(tmp_path / "given.json", 70_000, specials)
    texts = [f"w{i} w69999 w1 w2 w3 <s>" for i in range(1, 30)]
    manifest = make(tmp_path / "c", texts, PrepareOptions(tokenizer=path, val_fraction=0.3))
    entry = manifest.tokenizer
    assert (entry.added, (entry.bos_token, entry.eos_token), entry.trained) == (added, ends, False)
    assert manifest.vocabulary == max(entry.bos, entry.eos) + 1 == 70_000 + len(specials) + len(added)
    table = rows(tmp_path / "c", "train")
    assert pq.read_schema(tmp_path / "c" / "train-00000.parquet").field("tokens").type == pa.list_(pa.uint32())
    for row in table:  # neither cut to 3 nor padded to 64; "<s>" in a text is no bos
        assert len(row["tokens"]) >= 8 and row["tokens"][2:6] == [69999, 1, 2, 3]
        assert row["tokens"].count(entry.bos) == 1
    again = load_tokenizer(tmp_path / "c" / "tokenizer.json")
    assert (again.bos, again.eos, again.added) == (entry.bos, entry.eos, ())


def test_the_validation_split_is_sorted_by_passes_that_fit_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    dtype = np.dtype(np.uint16)
    spool = SplitWriter(tmp_path, "val", dtype, group_tokens=50, prefix="spool-")
    names = [hashlib.sha256(bytes([i])).hexdigest() for i in range(100)]
    for name in names:
        spool.add(Row(random.integers(0, 99, 10).astype(np.uint16), "s", name, 1))
    final = SplitWriter(tmp_path, "val", dtype, group_tokens=50, file_tokens=300)
    order = write_in_hash_order(spool.close(), final, memory_tokens=130)
    files = final.close()
    assert order == sorted(names) == [row["hash"] for row in rows(tmp_path, "val")]
    assert len(files) == 4 and [f.tokens for f in files] == [300, 300, 300, 100]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Four times the text, made on the fly, peaks where the smaller one did: batches are held, not the corpus."""

    class Stream:
        def __init__(self, count: int) -> None:
            self.size = count * DOCUMENT

        def documents(self, skipped: Counter[str]) -> Iterator[Document]:
            for i in range(self.size // DOCUMENT):
                yield Document(f"{i:010d}" * (DOCUMENT // 10), "stream")

    tokenizer = word_tokenizer(tmp_path / "t.json", 100, ["<s>", "</s>"])
    peaks = []
    for count in (100, 400):
        tracemalloc.start()
        options = PrepareOptions(tokenizer=tokenizer, group_tokens=100)
        prepare([Stream(count)], tmp_path / str(count), options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 1 << 22 < peaks[1] < 1.2 * peaks[0] < 400 * DOCUMENT / 2


def test_the_settings_of_a_tokenizer_go_with_it(tmp_path: Path) -> None:
    """Where they alone name its bos and eos, a corpus that is prepared with a corpus's tokenizer has the same one."""
    (tmp_path / "in").mkdir()
    text = _trained().tokenizer.to_str().replace("<|bos|>", "<A>").replace("<|eos|>", "<Z>")
    (tmp_path / "in" / "tokenizer.json").write_text(text)
    settings = '{"bos_token": "<A>", "eos_token": {"content": "<Z>"}, "chat_template": "{{ messages }}"}'
    (tmp_path / "in" / "tokenizer_config.json").write_text(settings)
    made = []
    for source, name in (("in", "one"), ("one", "two")):
        options = PrepareOptions(tokenizer=tmp_path / source / "tokenizer.json", val_fraction=0.3)
        made.append(make(tmp_path / name, TEXTS, options))
        assert (tmp_path / name / "tokenizer_config.json").read_text() == settings
        assert check_files(tmp_path / name)["tokenizer_config.json"] == "ok"
    assert made[0].tokenizer == made[1].tokenizer and made[0].corpus_hash == made[1].corpus_hash
    assert (made[0].tokenizer.bos_token, made[0].tokenizer.eos_token, made[0].tokenizer.added) == ("<A>", "<Z>", ())


@pytest.mark.parametrize("said", ['""', "null", "7", '{"content": ""}', "[]"])
def test_settings_that_name_no_bos_leave_it_to_the_common_names(said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(_trained().tokenizer.to_str().replace("<|bos|>", "<A>"))
    (tmp_path / "tokenizer_config.json").write_text(f'{{"bos_token": {said}, "eos_token": {said}}}')
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.name(found.bos), found.eos, found.added) == ("<|bos|>", 1, ("<|bos|>",))
