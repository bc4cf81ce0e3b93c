"""Every kind of input, good and bad: what is read, what is skipped and counted, what is refused in which sentence."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.jobs.data import readers
from shoal.jobs.data.prepare import PrepareOptions, prepare
from shoal.jobs.data.readers import ReadOptions, open_inputs
from shoal.jobs.data.tokenizer import load_tokenizer, train_tokenizer
from shoal.workers.errors import InvalidInput, NotFound


def read(*paths: Path, **options: object) -> tuple[list[tuple[str, str]], Counter[str]]:
    """(source, text) of every document, and what was skipped."""
    skipped: Counter[str] = Counter()
    sources = open_inputs(list(paths), ReadOptions(**options))  # type: ignore[arg-type]
    found = [(d.source, d.text) for source in sources for d in source.documents(skipped)]
    return found, +skipped


def test_files_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("línea\r\n\ttab\n".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "one\\n"}\n\n{"text": "zwei ü", "n": 1}\n{"text": " "}')
    pq.write_table(pa.table({"text": ["p", None, "q"], "n": [1, 2, 3]}), tmp_path / "c.parquet")
    found, skipped = read(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet")
    assert found == [
        ("a.txt", "línea\r\n\ttab\n"),
        ("b.jsonl", "one\n"),
        ("b.jsonl", "zwei ü"),
        ("c.parquet", "p"),
        ("c.parquet", "q"),
    ]
    assert skipped == {"empty": 2}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_parquet_columns_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["x", "y", "x"]).cast(kind)
    pq.write_table(pa.table({"body": column}), tmp_path / "t.parquet", row_group_size=2)
    assert [text for _, text in read(tmp_path / "t.parquet", field="body")[0]] == ["x", "y", "x"]


@pytest.mark.parametrize("chunk", [3, 7, 1 << 22])
def test_a_separator_cuts_a_file_wherever_the_reads_fall(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK", chunk)
    texts = ["first ü", "\nsecond 漢字\n", "third <|end"]
    (tmp_path / "s.txt").write_text("<|end|>".join([*texts[:2], "", texts[2]]))
    found, skipped = read(tmp_path / "s.txt", separator="<|end|>")
    assert [text for _, text in found] == texts and skipped == {"empty": 1}


def test_a_folder_is_walked_in_order_and_says_what_it_left_out(tmp_path: Path) -> None:
    top = tmp_path / "project"
    (top / "src" / "deep").mkdir(parents=True)
    (top / ".git").mkdir()
    files: dict[str, bytes] = {
        "src/deep/z.py": b"z = 1\n",
        "src/b.py": b"b = 1\n",
        "a.md": b"# a\n",
        "data.jsonl": b'{"text": "row"}\n',
        "settings.jsonl": b'{"other": 1}\n',
        "logo.png": b"\x89PNG\r\n\x1a\n\0\0",
        "late.bin": b"x" * 5_000_000 + b"\0",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "empty.txt": b"",
        ".hidden": b"secret",
        ".git/config": b"x",
        "broken.parquet": b"PAR1 no",
    }
    for name, data in files.items():
        (top / name).write_bytes(data)
    os.mkfifo(top / "pipe")
    (top / "dangling").symlink_to(top / "nowhere")
    found, skipped = read(top)
    assert found == [("project", text) for text in ("# a\n", "row", "b = 1\n", "z = 1\n")]
    assert skipped == {
        "binary": 2,
        "not UTF-8": 1,
        "empty": 1,
        "hidden": 2,
        "not a regular file": 2,
        "not Parquet": 1,
        "no field text": 1,
    }


def test_an_unreadable_file_is_counted() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        folder = Path(name, "in")
        with unprivileged():
            _check_unreadable(folder)


def _check_unreadable(folder: Path) -> None:
    folder.mkdir()
    (folder / "closed.txt").write_text("x")
    (folder / "open.txt").write_text("y")
    (folder / "closed").mkdir(mode=0)
    (folder / "closed.txt").chmod(0)
    assert read(folder) == ([("in", "y")], Counter(unreadable=2))
    with pytest.raises(InvalidInput, match=r"closed\.txt cannot be read \(Permission denied\)"):
        read(folder / "closed.txt")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root reads everything: be nobody for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_corpora_are_not_read_as_text(tmp_path: Path) -> None:
    """Not one that is there already, and not the one that is being written inside the input."""
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(f"text {name} " * 9)
    options = PrepareOptions(vocabulary=300, val_fraction=0.5)
    for out in (tmp_path / "data" / "one", tmp_path / "data" / "two"):
        read_options = ReadOptions(ignore=(out.resolve(),))
        manifest = prepare(open_inputs([tmp_path], read_options), out, options)
        assert sum(totals.documents for totals in manifest.splits.values()) == 6
    assert manifest.skipped == {"prepared corpus": 1}
    with pytest.raises(InvalidInput, match="one is a prepared corpus already"):
        open_inputs([tmp_path / "data" / "one"], ReadOptions())


BAD = {
    "empty.txt": (b"", r"empty\.txt is empty: give a file with text"),
    "photo.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", r"photo\.jpg is a binary file: give a text"),
    "latin.txt": ("caf\xe9".encode("latin-1"), r"latin\.txt is not UTF-8: convert it"),
    "cut.txt": ("caf\xe9".encode()[:-1], r"cut\.txt is not UTF-8: convert it"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', r"broken\.jsonl, line 3 is not JSON \(.+\): correct"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', r"bytes\.jsonl, line 1 is not JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2 has no field 'text': .* --field \(body, id\)"),
    "number.jsonl": (b'{"text": 5}\n', r"line 1 has no text in field 'text'"),
    "list.jsonl": (b'["text"]\n', r"line 1 has no field 'text'"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', r"line 1 holds half a surrogate pair"),
    "no.parquet": (b"plain text", r"no\.parquet is not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_given_directly_is_refused(tmp_path: Path, name: str) -> None:
    data, sentence = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidInput, match=sentence) as refused:
        read(tmp_path / name)
    assert refused.value.exit_code == 3 and "\n" not in str(refused.value)


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "t.parquet")
    with pytest.raises(InvalidInput, match=r"t\.parquet has no column 'text': .* --field \(body, n\)"):
        read(tmp_path / "t.parquet")
    with pytest.raises(InvalidInput, match=r"no text in column 'n' \(int64\)"):
        read(tmp_path / "t.parquet", field="n")


def test_a_parquet_file_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(5000)]}), path, row_group_size=1000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"t\.parquet (is not a readable Parquet file|cannot be read)"):
        read(path)


def test_what_is_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nothing\.txt does not exist") as missing:
        read(tmp_path / "nothing.txt")
    assert missing.value.exit_code == 5
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="pipe is neither a file nor a folder"):
        read(tmp_path / "pipe")


def test_an_empty_folder_is_refused_with_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no text \(skipped: nothing\)"):
        prepare(open_inputs([tmp_path / "in"], ReadOptions()), tmp_path / "c", PrepareOptions())
    (tmp_path / "in" / "x.png").write_bytes(b"\0")
    (tmp_path / "in" / ".x").write_bytes(b"x")
    with pytest.raises(InvalidInput, match=r"holds no text \(skipped: 1 binary, 1 hidden\)"):
        prepare(open_inputs([tmp_path / "in"], ReadOptions()), tmp_path / "c", PrepareOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("content", ["not json", "{}", '{"model": 3}', json.dumps({"version": "1.0"}), "\0"])
def test_a_tokenizer_file_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"tokenizer\.json is not a tokenizer\.json \(") as refused:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(refused.value)
    with pytest.raises(NotFound, match=r"absent\.json does not exist"):
        load_tokenizer(tmp_path / "absent.json")


def test_a_vocabulary_too_small_for_bytes() -> None:
    with pytest.raises(InvalidInput, match=r"--vocab 257 does not hold 256 bytes, bos and eos: set it to 258"):
        train_tokenizer(["text"], 257)
    assert train_tokenizer(["text"], 258).size == 258
