"""Inference jobs over files: rows in and out, rows and files that cannot be used, progress."""

from __future__ import annotations

import asyncio
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_source import CONTEXT, TOKENIZER, Source, done, expected, job, prompts, quiet, read, written
from rich.console import Console
from small import small_recipe

from shoal.jobs.batch import Engine, Summary, make_view
from shoal.jobs.batch_files import COLUMNS
from shoal.workers.config import Recipe
from shoal.workers.engine.request import Limits
from shoal.workers.errors import InvalidInput, NotFound, ShoalError

# Rows in, rows out


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".parquet"])
@pytest.mark.parametrize("out", [".jsonl", ".parquet"])
def test_every_row_is_answered_in_the_order_of_the_input(tmp_path: Path, kind: str, out: str) -> None:
    source = written(tmp_path / f"in{kind}", [{"id": f"row-{i}", "prompt": f"fish {i}", "more": i} for i in range(9)])
    target, tokens = tmp_path / f"out{out}", Source(hold=9)  # the last request is answered first
    summary = done(source, target, tokens, concurrency=9)
    rows = read(target)
    assert [tuple(row) for row in rows] == [COLUMNS] * 9
    assert rows == [
        {
            "id": f"row-{i}", "prompt": f"fish {i}", "text": expected(f"fish {i}", seed=3 + i), "tokens": 6,
            "finish_reason": "length", "error": None,
        }
        for i in range(9)
    ]  # fmt: skip
    assert (summary.rows, summary.failed, summary.resumed, summary.tokens) == (9, 0, 0, 54)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name])
    assert len({request.id for request in tokens.asked}) == 9


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_row_may_have_its_own_settings(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "fish", "max_tokens": 2, "temperature": 0.0, "seed": 9},
        {"prompt": "fish", "max_tokens": None, "temperature": None, "seed": None},
        {"prompt": "fish", "max_tokens": 3, "temperature": 2.0, "seed": None},
    ]
    tokens = Source()
    done(written(tmp_path / f"in{kind}", rows), tmp_path / "out.jsonl", tokens, concurrency=1)
    asked = [request.sampling for request in tokens.asked]
    assert [(s.max_tokens, s.temperature, s.seed) for s in asked] == [(2, 0.0, 9), (6, 0.5, 4), (3, 2.0, 5)]
    assert all(s.stop_tokens == (TOKENIZER.eos,) for s in asked)
    assert tokens.asked[0].prompt[0] == TOKENIZER.bos
    assert TOKENIZER.eos not in tokens.asked[0].prompt


def test_numbers_and_gaps_as_pandas_writes_them(tmp_path: Path) -> None:
    nan = float("nan")
    table = {"id": [5.0, nan], "prompt": ["fish", "net"], "max_tokens": [2.0, nan], "seed": [nan, 8.0]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    tokens = Source()
    done(tmp_path / "in.parquet", tmp_path / "out.parquet", tokens, concurrency=1)
    assert [(r.sampling.max_tokens, r.sampling.seed) for r in tokens.asked] == [(2, 3), (6, 8)]
    assert [row["id"] for row in read(tmp_path / "out.parquet")] == [5, 1]


@pytest.mark.parametrize("out", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("ids", "kept"), [([7, 2**40], True), (["b", "a"], True), ([7, "a"], False), ([None, 7], True)]
)
def test_ids_keep_their_type_where_the_file_can(tmp_path: Path, out: str, ids: list[Any], kept: bool) -> None:
    source = written(tmp_path / "in.jsonl", [{"id": id, "prompt": "fish"} for id in ids])
    done(source, tmp_path / f"out{out}", Source())
    found = [row["id"] for row in read(tmp_path / f"out{out}")]
    whole = [number if id is None else id for number, id in enumerate(ids)]
    assert found == (whole if kept or out == ".jsonl" else [str(id) for id in whole])


def test_no_more_requests_are_in_flight_than_asked_for(tmp_path: Path) -> None:
    tokens = Source()
    done(written(tmp_path / "in.jsonl", prompts(40)), tmp_path / "out.jsonl", tokens, concurrency=7)
    assert tokens.most == 7
    assert len(tokens.asked) == 40


def test_the_engine_answers_the_same_however_many_rows_are_in_flight(tmp_path: Path) -> None:
    import torch

    from shoal.jobs.serve.engines import InProcess
    from shoal.workers.engine.engine import Engine as OwnEngine
    from shoal.workers.model import Transformer

    torch.manual_seed(0)
    recipe = Recipe.model_validate(small_recipe(train__dtype="float64", model__vocab=TOKENIZER.size))
    model = Transformer(recipe, device=torch.device("cpu")).eval()
    rows = [{"prompt": f"fish {i} " + "turns " * (i % 4), "max_tokens": 1 + i % 7} for i in range(12)]
    source = written(tmp_path / "in.jsonl", rows)

    async def answered(target: Path, concurrency: int) -> Summary:
        # one request waits at most, so that others find the queue full and come again
        client = InProcess(OwnEngine(model, Limits(sequences=2, waiting=1)))
        try:
            with job(source, target) as batch:
                engine = Engine(client.generate, TOKENIZER, recipe.model.context)
                return await batch.run(engine, quiet(), concurrency)
        finally:
            await client.close()

    one, many = (asyncio.run(answered(tmp_path / f"{n}.jsonl", n)) for n in (1, 8))
    found = read(tmp_path / "1.jsonl")
    assert (tmp_path / "8.jsonl").read_text() == (tmp_path / "1.jsonl").read_text()
    assert (one.failed, many.failed) == (0, 0)
    for row, asked in zip(found, rows, strict=True):
        assert row["finish_reason"] == "stop" or row["tokens"] == asked["max_tokens"]
    assert len({row["text"] for row in found}) > 6


# Rows that cannot be answered

LONG = "fish " * CONTEXT
BAD = [
    ("{}", "prompt is missing"),
    ('{"prompt": null}', "prompt is missing"),
    ('{"prompt": ""}', "prompt is empty"),
    ('{"prompt": 7}', "prompt=7 is no text"),
    ('{"prompt": ["a"]}', "prompt=['a'] is no text"),
    (r'{"prompt": "\ud800"}', r"prompt='\ud800' is no text"),
    ('{"prompt": "fish", "max_tokens": 0}', "max_tokens=0 is out of range"),
    ('{"prompt": "fish", "max_tokens": 1.5}', "max_tokens=1.5 is no whole number"),
    ('{"prompt": "fish", "max_tokens": "6"}', "max_tokens='6' is no whole number"),
    ('{"prompt": "fish", "max_tokens": true}', "max_tokens=True is no whole number"),
    ('{"prompt": "fish", "max_tokens": Infinity}', "max_tokens=inf is no whole number"),
    ('{"prompt": "fish", "temperature": -1}', "temperature=-1 is out of range"),
    ('{"prompt": "fish", "temperature": 1e999}', "temperature=inf is out of range"),
    ('{"prompt": "fish", "seed": "x"}', "seed='x' is no whole number"),
    ('{"prompt": "fish", "seed": 18446744073709551616}', "seed=18446744073709551616 is out of range"),
    ('{"prompt": "fish", "id": 1.5}', "id=1.5 is neither text nor a 64-bit integer"),
    ('{"prompt": "fish", "id": 99999999999999999999}', "neither text nor a 64-bit integer"),
    ('{"prompt": "fish", "id": [1]}', "id=[1] is neither text nor a 64-bit integer"),
    (r'{"prompt": "fish", "id": "\udfff"}', "is neither text nor a 64-bit integer"),
    ("[]", "not a JSON object"),
    ("{oops", "not a JSON object"),
    ("[" * 100_000, "not a JSON object"),
    (json.dumps({"prompt": LONG}), f"max_tokens=6 do not fit into the context of {CONTEXT}"),
    (json.dumps({"prompt": "fish", "max_tokens": CONTEXT}), f"do not fit into the context of {CONTEXT}"),
    ('{"prompt": "refused by the engine"}', "cannot be computed"),
]


@pytest.mark.parametrize("out", [".jsonl", ".parquet"])
def test_a_bad_row_is_told_in_its_place_and_others_are_answered(tmp_path: Path, out: str) -> None:
    lines = [line for bad, _ in BAD for line in (bad, '{"id": "good", "prompt": "fish", "seed": 1}', "")]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    summary = done(tmp_path / "in.jsonl", tmp_path / f"out{out}", Source())
    rows = read(tmp_path / f"out{out}")
    assert (summary.rows, summary.failed) == (2 * len(BAD), len(BAD))
    for number, ((_, says), row) in enumerate(zip(BAD, rows[::2], strict=True)):
        assert says in row["error"]
        assert "\n" not in row["error"] and len(row["error"]) < 250
        assert (str(row["id"]), row["text"], row["tokens"], row["finish_reason"]) == (str(2 * number), None, 0, None)
    good = {"id": "good", "prompt": "fish", "text": expected("fish", seed=1), "tokens": 6, "finish_reason": "length"}
    assert all(row == good | {"error": None} for row in rows[1::2])


def test_bad_cells_of_a_table_are_told_in_their_place(tmp_path: Path) -> None:
    text = pa.array([b"fish", b"\xff\xfe", b"net", None]).view(pa.string())  # as a careless writer leaves it
    pq.write_table(pa.table({"prompt": text, "seed": pa.array([True, None, None, None])}), tmp_path / "in.parquet")
    done(tmp_path / "in.parquet", tmp_path / "out.jsonl", Source())
    errors = [row["error"] for row in read(tmp_path / "out.jsonl")]
    assert "seed=True is no whole number" in errors[0]
    assert "prompt=b'\\xff\\xfe' is no text" in errors[1]
    assert errors[2] is None
    assert "prompt is missing" in errors[3]


# Files that cannot be used


def refused(error: type[ShoalError], says: str, source: Path, target: Path) -> None:
    before = sorted(target.parent.glob("*")) if target.parent.is_dir() else []
    with pytest.raises(error, match=says), job(source, target):
        pass
    assert (sorted(target.parent.glob("*")) if target.parent.is_dir() else []) == before


def test_files_that_cannot_be_used_are_refused_before_any_work(tmp_path: Path) -> None:
    good, out = written(tmp_path / "good.jsonl", prompts(2)), tmp_path / "out.jsonl"

    def made(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    refused(NotFound, "none.jsonl does not exist", tmp_path / "none.jsonl", out)
    (tmp_path / "folder.jsonl").mkdir()
    refused(NotFound, "is no file", tmp_path / "folder.jsonl", out)
    refused(InvalidInput, r"--input .*csv does not end in \.jsonl", made("in.csv", b"prompt\nfish\n"), out)
    refused(InvalidInput, r"--output .*csv does not end in \.jsonl", good, tmp_path / "out.csv")
    refused(InvalidInput, "has no rows", made("empty.jsonl", b"\n \n"), out)
    refused(InvalidInput, "no line with a key 'prompt'", made("keys.jsonl", b'{"text": "fish"}\n[1]\n'), out)
    refused(InvalidInput, "no line with a key 'prompt'", made("binary.jsonl", bytes(range(256)) * 4), out)
    refused(InvalidInput, "not a readable Parquet file", made("not.parquet", b"PAR1 or not"), out)
    refused(InvalidInput, "not a readable Parquet file", made("empty.parquet", b""), out)
    pq.write_table(pa.table({"text": ["fish"], "n": [1]}), tmp_path / "column.parquet")
    refused(InvalidInput, r"no column 'prompt' \(it has text, n\)", tmp_path / "column.parquet", out)
    pq.write_table(pa.table({"prompt": [1]}), tmp_path / "kind.parquet")
    refused(InvalidInput, r"no text in column 'prompt' \(int64\)", tmp_path / "kind.parquet", out)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    refused(InvalidInput, "has no rows", tmp_path / "rows.parquet", out)


def test_an_output_that_would_lose_something_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", prompts(2))
    refused(InvalidInput, "is the input itself", source, source)
    (tmp_path / "link.jsonl").symlink_to(source)
    refused(InvalidInput, "is the input itself", source, tmp_path / "link.jsonl")
    refused(InvalidInput, "folder that does not exist", source, tmp_path / "no" / "out.jsonl")
    (tmp_path / "out.jsonl").write_text("precious")
    refused(InvalidInput, "exists already", source, tmp_path / "out.jsonl")
    for content in ("precious", "precious\n", '{"a": 1}\n', "{}\n"):
        (tmp_path / "two.jsonl.partial").write_text(content)
        refused(InvalidInput, "not what an inference job left", source, tmp_path / "two.jsonl")
        assert (tmp_path / "two.jsonl.partial").read_text() == content
    assert (tmp_path / "out.jsonl").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", prompts(2))
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(InvalidInput, "cannot be written", source, tmp_path / "locked" / "out.jsonl")


# Progress


def test_lines_are_rare_and_the_last_row_is_told() -> None:
    now, console = [0.0], quiet()
    view = make_view(console, 1000, 100, lambda: now[0])
    for rows in range(101, 1001):
        now[0] += 0.125
        view.show(rows, rows // 500, 20 * (rows - 100))
    view.close()
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["100 of 1,000 rows were finished before", "row 180/1,000  160 tok/s  ETA 0:01:42"]
    assert len(lines) == 13  # one every ten seconds, and the last
    assert lines[-1] == "row 1,000/1,000  160 tok/s  2 failed  ETA 0:00:00"


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "xterm"})
    with job(written(tmp_path / "in.jsonl", prompts(5)), tmp_path / "out.jsonl") as batch:
        asyncio.run(batch.run(Source().engine, console))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "5/5" in shown
    assert "tok/s" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
