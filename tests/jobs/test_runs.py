"""shoal runs: what a run folder holds is what is listed and shown."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.jobs.cli.runs import plot
from shoal.jobs.load import choose_step, find_run
from shoal.jobs.recipe import load_recipe, recipe_to_toml
from shoal.jobs.run_folder import RunFolder, as_begun, check_same_recipe, discard_unused
from shoal.jobs.runs import list_runs, show_run
from shoal.workers.errors import InvalidInput, NotFound

SHOAL = [sys.executable, "-m", "shoal.jobs.cli.main", "runs"]


def write_run(root: Path, name: str, losses: list[float | None], checkpoints: tuple[int, ...] = ()) -> Path:
    """A run folder as training leaves it."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe_to_toml(load_recipe("tiny")))
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "tokens": 4096 * step, "loss": loss, "tokens_per_second": 1000.0 + step}
        for step, loss in enumerate(losses, start=1)
    ]
    records.append({"kind": "eval", "step": len(losses), "loss": 2.0, "bits_per_byte": 1.25, "gzip_bits_per_byte": 2.5})
    told = [("dispatch", "rows are put"), ("dispatch", "rows are exchanged"), *[("checkpoint", "written")] * 7]
    told.append(("recovered", "rank 1 came back"))
    records += [{"kind": "event", "step": 1, "event": event, "text": text} for event, text in told]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in checkpoints:
        write_checkpoint(folder / "checkpoints" / f"step-{step}", step)
    return folder


def write_checkpoint(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    entry = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    manifest = {"format": 1, "step": step, "time": "2026-01-01T00:00:00+00:00", "world": 2, "software": {}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {"state.json": entry}}))


def shoal_runs(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run([*SHOAL, *arguments], capture_output=True, text=True, encoding="utf-8", env=env, timeout=60)


def test_list_tells_how_far_each_run_came(tmp_path: Path) -> None:
    write_run(tmp_path, "second", [5.0, 4.0, 3.5], checkpoints=(2, 10, 3))
    first = write_run(tmp_path, "first", [5.0])
    for file in first.iterdir():
        os.utime(file, (1000, 1000))
    (tmp_path / "no-run").mkdir()
    (tmp_path / "second" / "checkpoints" / ".step-4.tmp-ab12").mkdir()
    shutil.copytree(first, tmp_path / ".shoal-scratch-third-abcd1234")  # an import that is under way
    runs = json.loads(shoal_runs("list", "-o", "json", SHOAL_RUNS=str(tmp_path)).stdout)
    assert [run["name"] for run in runs] == ["first", "second"]
    assert runs[0]["updated"] == "1970-01-01T00:16:40+00:00"
    run = runs[1]
    assert (run["recipe"], run["step"], run["steps"]) == ("tiny", 3, load_recipe("tiny").train.steps)
    assert (run["loss"], run["bits_per_byte"], run["checkpoints"]) == (3.5, 1.25, [2, 3, 10])
    *_, row = shoal_runs("list", "--runs-dir", str(tmp_path), COLUMNS="80").stdout.splitlines()
    assert row.split()[:6] == ["second", "tiny", f"3/{run['steps']}", "3.5000", "1.2500", "10"]
    assert len(row.split()) == 8  # the day and the minute of its last record, on the same line


def test_show_draws_the_curve_and_tells_the_facts(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "mine", [6.25, None, 3.5, 2.125])
    (folder / "loss.png").write_bytes(b"png")
    data = json.loads(shoal_runs("show", "mine", "--runs-dir", str(tmp_path), "-o", "json").stdout)
    assert data["curve"] == [[1, 6.25], [3, 3.5], [4, 2.125]]
    assert (data["tokens"], data["tokens_per_second"], data["plots"]) == (16384, 1004.0, ["loss.png"])
    assert data["evals"][0]["gzip_bits_per_byte"] == 2.5
    assert data["dispatch"] == "rows are exchanged"
    text = shoal_runs("show", "mine", "--runs-dir", str(tmp_path)).stdout
    for fact in ("6.250", "2.125", "16,384", "loss.png", "1.2500", "rows are exchanged", "rank 1 came back"):
        assert fact in text


def test_show_has_the_table_of_the_steps_that_were_traced(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "mine", [6.25])
    assert show_run(tmp_path, "mine").profile == ()
    (folder / "profile").mkdir()
    (folder / "profile" / "table.txt").write_text("step 1 on rank 0\n 80.0 %  aten::mm\n")
    assert show_run(tmp_path, "mine").profile == ("step 1 on rank 0", " 80.0 %  aten::mm")
    assert "\n 80.0 %  aten::mm\n" in shoal_runs("show", "mine", "--runs-dir", str(tmp_path)).stdout


def test_a_run_goes_on_with_other_steps_to_trace_but_not_with_those_that_are_done(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path, "mine", [6.25], checkpoints=(20,)))
    for at in (0, 20, 21):  # of 20 and 21 there is one left
        check_same_recipe(folder, load_recipe("tiny", [f"train.profile_at={at}"]))
    done = load_recipe("tiny", ["train.profile_at=19"])
    with pytest.raises(InvalidInput, match=r"train\.profile_at=19 .* step 20: set train\.profile_at to 21 or more"):
        check_same_recipe(folder, done)
    folder.recipe_file.write_text(recipe_to_toml(done))
    check_same_recipe(folder, done)  # asked for in time


@pytest.mark.parametrize("said", ["", "embedding_std = 0.0\n"])
def test_a_run_from_before_embeddings_began_wider_goes_on_as_it_began(said: str, tmp_path: Path) -> None:
    """Its recipe says nothing of it, or that they were as the other weights."""
    folder = RunFolder(write_run(tmp_path, "mine", [6.25], checkpoints=(20,)))
    lines = recipe_to_toml(load_recipe("tiny", ["train.initial=first"]))
    folder.recipe_file.write_text(lines.replace("embedding_std = 1.0\n", said))
    wanted = load_recipe("tiny", ["checkpoint.every=7", "train.initial=other"])
    check_same_recipe(folder, wanted)
    own, again = folder.recipe(), as_begun(folder, wanted)
    assert again.model == wanted.model.model_copy(update={"embedding_std": 0.0})
    assert (again.train, again.checkpoint) == (own.train, wanted.checkpoint)
    folder.recipe_file.write_text(recipe_to_toml(again))
    assert as_begun(folder, wanted) == again  # what is written of it says the same
    folder.recipe_file.write_text(lines)
    assert as_begun(folder, wanted).model == wanted.model


def test_a_run_that_is_being_written_can_be_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "live", [5.0, 4.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "loss": 3.75}\n{"kind": "train", "st')
    assert show_run(tmp_path, "live").curve == ((1, 5.0), (2, 3.75))
    new = tmp_path / "new"
    new.mkdir()
    (new / "recipe.toml").write_text("name = ")
    run = {run.name: run for run in list_runs(tmp_path)}["new"]
    assert (run.recipe, run.step, run.loss, run.checkpoints) == (None, None, None, ())
    assert shoal_runs("show", "new", "--runs-dir", str(tmp_path)).returncode == 0


def test_a_run_goes_by_its_name_or_its_folder(tmp_path: Path) -> None:
    """As ``shoal train`` names it at its end, and as the commands that use a run take it."""
    folder = write_run(tmp_path, "tiny", [5.0, 4.0])
    assert show_run(Path("elsewhere"), str(folder)) == show_run(tmp_path, "tiny")
    with pytest.raises(NotFound, match=r"run 'tinny' is neither a run's folder nor in .*: did you mean tiny$"):
        find_run("tinny", tmp_path)


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are_and_a_damaged_one_by_its_name(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, "tiny", [5.0], checkpoints=(20, 40))
    folder = find_run("tiny", tmp_path)
    assert choose_step(folder, None) == (40, [])
    with pytest.raises(NotFound, match=r"no checkpoint of step 30 \(it has 20, 40\)"):
        choose_step(folder, 30)
    for state in folder.path.glob("checkpoints/step-*/state.json"):
        state.write_text("{ }")
    with pytest.raises(InvalidInput, match=r"no whole checkpoint \(checkpoint .*step-40 is damaged"):
        choose_step(folder, None)


def test_an_unknown_run_is_not_found_with_the_near_names(tmp_path: Path) -> None:
    write_run(tmp_path, "tiny-0001", [5.0])
    write_run(tmp_path, "large", [5.0])
    with pytest.raises(NotFound, match=r"run 'tiny-001' is neither a run's folder nor in .*: did you mean tiny-0001$"):
        show_run(tmp_path, "tiny-001")
    with pytest.raises(NotFound, match="there are large, tiny-0001"):
        show_run(tmp_path, "zzz")
    with pytest.raises(NotFound):
        show_run(tmp_path / "large", "../large")
    with pytest.raises(NotFound, match="holds no runs"):
        show_run(tmp_path / "none", "tiny")
    for name in ("", "a" * 300):
        with pytest.raises(NotFound, match="there are large, tiny-0001"):
            show_run(tmp_path, name)
    assert (
        find_run("large/", tmp_path).path
        == find_run(f"{tmp_path.name}/large", tmp_path.parent).path
        == tmp_path / "large"
    )


def test_no_runs_is_an_empty_list_and_a_file_is_refused(tmp_path: Path) -> None:
    result = shoal_runs("list", "--runs-dir", str(tmp_path / "none"))
    assert (result.returncode, "no runs in" in result.stdout) == (0, True)
    assert shoal_runs("list", "-o", "json", "--runs-dir", str(tmp_path / "none")).stdout == "[]\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="Not a directory"):
        list_runs(tmp_path / "file")


FINITE = st.floats(min_value=-1e6, max_value=1e6)


@given(st.dictionaries(st.integers(0, 10**9), FINITE, min_size=1, max_size=50), st.integers(8, 70), st.integers(2, 12))
def test_a_plot_has_its_size_and_its_range(points: dict[int, float], width: int, height: int) -> None:
    lines = plot(sorted(points.items()), width, height)
    assert len(lines) == height + 2
    curves = [line.split("│")[1] for line in lines[:height]]
    assert {len(curve) for curve in curves} == {width}
    dots = sum((ord(cell) - 0x2800).bit_count() for curve in curves for cell in curve)
    assert 1 <= dots <= min(len(points), 2 * width)
    assert all(0x2800 <= ord(cell) < 0x2900 for curve in curves for cell in curve)


def test_a_falling_curve_falls() -> None:
    lines = plot([(step, 8.0 - step) for step in range(8)], width=4, height=4)
    assert lines[0].startswith("8.000 │")
    assert lines[3].startswith("1.000 │")
    filled = [[x for x, cell in enumerate(line.split("│")[1]) if cell != "\u2800"] for line in lines[:4]]
    assert filled == sorted(filled)
    assert (filled[0][0], filled[3][-1]) == (0, 3)
    assert plot([]) == []


def test_a_run_moved_with_its_corpus_finds_it_and_needs_it_only_to_train(tmp_path: Path) -> None:
    """A run carries its tokenizer; the corpus is found beside it again, wherever both went."""
    from small import small_corpus, small_recipe

    from shoal.jobs.data.prepare import corpus_tokenizer
    from shoal.jobs.run_folder import RunFolder, write_identity
    from shoal.workers.config import Recipe

    before, after = tmp_path / "before", tmp_path / "after"
    corpus, folder = small_corpus(before / "data"), RunFolder(before / "runs" / "first")
    folder.path.mkdir(parents=True)
    write_identity(folder, Recipe.model_validate(small_recipe()), corpus, "")
    ids = corpus_tokenizer(corpus).encode(["the sea swims"])[0].tolist()
    assert folder.corpus() == corpus
    before.rename(after)
    moved = RunFolder(after / "runs" / "first")
    assert moved.corpus().samefile(after / "data" / "corpus")
    (after / "data").rename(tmp_path / "elsewhere")
    tokenizer = moved.tokenizer()
    assert tokenizer.encode(["the sea swims"])[0].tolist() == ids
    assert tokenizer.decode(ids) == "the sea swims"


@pytest.mark.parametrize(("events", "stays"), [([], False), (["dispatch"], False), (["dispatch", "waiting"], True)])
def test_a_run_that_was_refused_at_its_start_leaves_no_folder(events: list[str], stays: bool, tmp_path: Path) -> None:
    """Which way rows would have gone is said before the first step, and is nothing to keep."""
    folder = write_run(tmp_path, "refused", [])
    records = [{"kind": "event", "step": 0, "event": event, "text": ""} for event in events]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    discard_unused(RunFolder(folder))
    assert folder.exists() == stays
