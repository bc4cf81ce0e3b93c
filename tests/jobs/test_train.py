"""``shoal train`` from end to end: what a run leaves, and that it goes on after it was interrupted or damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from shell import PATIENCE, processes_in, shoal, shoal_here, started, steps_done, wait_until
from small import small_corpus, small_recipe
from trained import assert_same_bits, events, flip_a_byte, records

from shoal.jobs.recipe import load_recipe, recipe_to_toml
from shoal.jobs.run_folder import RunFolder
from shoal.workers.checkpoint_files import list_checkpoints
from shoal.workers.config import Recipe

STEPS, EVERY = 28, 7
TRAIN = ("train", "--recipe", "small.toml")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: a recipe, and its prepared corpus."""
    folder = tmp_path_factory.mktemp("here")
    corpus = small_corpus(folder)
    recipe = Recipe.model_validate(
        small_recipe(
            train__dtype="float32", train__steps=STEPS, train__learning_rate=2e-2, train__eval_every=20,
            data__corpus=str(corpus), parallel__ranks=2, checkpoint__every=EVERY,
        )
    )  # fmt: skip
    (folder / "small.toml").write_text(recipe_to_toml(recipe))
    return folder


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """TMPDIR of the commands: it must be empty after them. Short, since Ray's sockets lie in it."""
    folder = Path("/tmp", f"shoal{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(here: Path, temporary: Path) -> Path:
    """A run that nothing disturbed, on two ranks; its command must have printed JSON and nothing but JSON. Two of its
    steps are traced, which are as in runs where none is."""
    traced = ("--set", "train.profile_at=14")
    result = shoal(*TRAIN, *traced, "--name", "whole", "-o", "json", cwd=here, TMPDIR=str(temporary))
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["run"], said["step"], said["stopped"]) == ("runs/whole", STEPS, False)
    assert said["evaluation"]["bits_per_byte"] < said["evaluation"]["unigram_bits_per_byte"]
    assert said["sample"]
    assert "first step after" in result.stderr
    return here / "runs" / "whole"


def test_a_run_leaves_what_the_readme_names_and_nothing_else(whole: Path, temporary: Path) -> None:
    names = {path.name for path in whole.iterdir() if not path.name.startswith("events.out.tfevents.")}
    files = {"recipe.toml", "run.json", "tokenizer.json", "metrics.jsonl", "loss.png", "expert_load.png"}
    assert names == {*files, "checkpoints", "profile"}
    assert {path.name for path in (whole / "profile").iterdir()} == {"rank-0.json.gz", "rank-1.json.gz", "table.txt"}
    assert events(whole) == ["dispatch", "profiled", "checkpoint"]
    assert [info.step for info in list_checkpoints(whole / "checkpoints")] == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]
    assert (whole / "checkpoints" / f"step-{STEPS}" / "manifest.json").is_file()
    assert [record["step"] for record in records(whole)] == list(range(1, STEPS + 1))
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_a_run_ends_with_the_same_bits(
    number: signal.Signals, here: Path, whole: Path, temporary: Path
) -> None:
    """Ctrl-C and SIGTERM reach the whole process group, as from a terminal and a scheduler; nohup ignores SIGHUP."""
    name = f"stopped-{number.name}"
    run = here / "runs" / name
    with started(*TRAIN, "--name", name, cwd=here, TMPDIR=str(temporary)) as process:
        wait_until(lambda: steps_done(run) > 0, process)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 130, stdout + stderr
    assert f"stopped by {number.name}, checkpoint step-" in stdout
    assert f"go on with: shoal train --resume --name {name}\n" in stdout
    before = steps_done(run)
    assert 0 < before < STEPS
    assert list_checkpoints(run / "checkpoints")[-1].step == before
    assert processes_in(temporary) == []
    with started("train", "--resume", "--name", name, cwd=here, before=["nohup"], TMPDIR=str(temporary)) as process:
        wait_until(lambda: steps_done(run) > before, process)
        os.killpg(process.pid, signal.SIGHUP)  # the terminal is closed
        stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stdout + stderr
    assert events(run) == ["dispatch", "stopping", "stopped", "resumed", "dispatch", "checkpoint"]
    assert_same_bits(run, whole, STEPS)
    assert list(temporary.iterdir()) == []


@pytest.mark.slow  # test_supervision has a damaged checkpoint, test_checkpoint other ranks
def test_resumed_on_other_ranks_from_the_checkpoint_before_a_damaged_one(
    here: Path, whole: Path, temporary: Path
) -> None:
    run = here / "runs" / "damaged"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS}")
    file, good = flip_a_byte(run, STEPS - EVERY), STEPS - 2 * EVERY
    result = shoal(
        "train", "--resume", "--name", "damaged", "--placement", "1A:2F", cwd=here, TMPDIR=str(temporary)
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert file.name in result.stdout
    assert f"going on from step {good}" in result.stdout
    # the second of the steps that are traced comes once more
    assert events(run)[-5:] == ["damaged", "resumed", "dispatch", "profiled", "checkpoint"]
    mine, theirs = records(run), records(whole)
    assert [r["step"] for r in mine] == list(range(1, STEPS + 1))
    assert mine[:good] == theirs[:good]
    assert [r["loss"] for r in mine[good:]] == pytest.approx([r["loss"] for r in theirs[good:]], rel=1e-3)


def test_a_run_goes_on_from_anothers_weights_with_a_longer_context(
    here: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 64 to 128 tokens, sequences shared by both ranks; the recipe names the checkpoint that it began with."""
    longer = ("model.context=128", "model.rope_scaling=yarn", "model.rope_factor=2", "model.rope_original=64")
    shared = ("train.sequence=128", "train.batch=4", "parallel.context=2", "train.recompute=2")
    sets = [word for key in (*longer, *shared) for word in ("--set", key)]
    command = (*TRAIN, "--from", "whole", "--name", "longer", "--steps", "3", *sets)
    monkeypatch.setattr("shoal.jobs.train.SAMPLE_TOKENS", 8)
    result = shoal_here(*command, cwd=here)
    assert result.returncode == 0, result.stderr
    run = here / "runs" / "longer"
    initial = load_recipe(run / "recipe.toml").train.initial
    assert initial == str((whole / "checkpoints" / f"step-{STEPS}").resolve())
    first, before = records(run)[0], records(whole)
    assert first["loss"] - before[-1]["loss"] < 0.3 * (before[0]["loss"] - before[-1]["loss"])
    assert [r["step"] for r in records(run)] == [1, 2, 3]


def test_weights_that_do_not_fit_are_refused_before_training(here: Path, whole: Path) -> None:
    missing = shoal_here(*TRAIN, "--from", "nowhere", cwd=here)
    assert missing.returncode == 5
    assert "'nowhere'" in missing.stderr
    other = here / "runs" / "other-tokens"
    shutil.copytree(whole, other)
    (other / "tokenizer.json").write_text((whole / "tokenizer.json").read_text() + "\n")
    result = shoal_here(*TRAIN, "--from", "other-tokens", "--name", "refused", cwd=here)
    assert result.returncode == 3
    assert "train.initial='other-tokens' was trained with another tokenizer" in result.stderr
    assert not (here / "runs" / "refused").exists()


def test_a_damaged_checkpoint_is_not_loaded_even_when_it_is_asked_for(here: Path, whole: Path) -> None:
    run = here / "runs" / "spoilt"
    shutil.copytree(whole, run)
    file = flip_a_byte(run, STEPS - EVERY)
    result = shoal("generate", "spoilt", "--step", str(STEPS - EVERY), cwd=here)
    assert (result.returncode, result.stdout) == (3, "")
    assert file.name in result.stderr


def test_a_finished_run_is_left_as_it_is(here: Path, whole: Path, temporary: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    result = shoal("train", "--resume", "--name", "whole", cwd=here, TMPDIR=str(temporary))
    assert result.returncode == 0, result.stderr
    assert f"runs/whole is done: step {STEPS} of {STEPS}" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_a_next_attempt_waits_for_the_one_before_to_end(here: Path, whole: Path) -> None:
    """As jobs are begun again: the process before may still be writing its last checkpoint."""
    run = ("--name", "whole")
    with ExitStack() as held:
        held.enter_context(RunFolder(whole).locked())
        refused = shoal("train", "--resume", *run, cwd=here)
        assert refused.returncode == 3 and "is being trained by another process" in refused.stderr
        with started("train", "--or-resume", *run, cwd=here) as waiting:
            assert waiting.stderr is not None
            assert "waiting up to 120 s for it to end" in waiting.stderr.readline()
            assert waiting.poll() is None
            held.close()
            out, err = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 0, err
    assert f"runs/whole is done: step {STEPS} of {STEPS}" in out


def test_evaluate_measures_what_training_measured(here: Path, whole: Path) -> None:
    result = shoal_here("evaluate", "whole", "-o", "json", cwd=here)
    assert result.returncode == 0, result.stderr
    said, trained = json.loads(result.stdout), records(whole, "eval")[-1]
    assert said["step"] == trained["step"] == STEPS
    for key in ("loss", "bits_per_byte"):
        assert said[key] == pytest.approx(trained[key], rel=1e-5)
    assert said["unigram_bits_per_byte"] == trained["unigram_bits_per_byte"]
    watched = shoal_here("evaluate", "whole", cwd=here, FORCE_COLOR="1")  # as on a terminal
    assert "100%" in watched.stderr and "100%" not in result.stderr + watched.stdout


def test_a_run_is_used_by_its_url(here: Path, whole: Path, tmp_path: Path) -> None:
    """Here a folder's: what is fetched is checked in tests/workers/test_run_store.py."""
    store = tmp_path / "store" / "whole"
    shutil.copytree(whole, store)
    url, cache = f"file://{store}", {"SHOAL_CACHE": str(tmp_path / "cache")}
    command = ("--prompt", "shoal of", "--tokens", "20", "-o", "json")
    fetched = shoal_here("generate", url, *command, cwd=here, **cache)
    assert fetched.returncode == 0 and f"fetching checkpoint step-{STEPS} of {url}" in fetched.stderr, fetched.stderr
    said, local = json.loads(fetched.stdout), json.loads(shoal_here("generate", "whole", *command, cwd=here).stdout)
    assert (said["text"], said["run"]) == (local["text"], url)
    shutil.rmtree(store / "checkpoints" / f"step-{STEPS}")
    older = shoal_here("evaluate", url, "--tokens", "200", "-o", "json", cwd=here, **cache)
    assert json.loads(older.stdout)["step"] == STEPS - EVERY, older.stderr
    (store / "run.json").write_text((store / "run.json").read_text().replace('"corpus": "', '"corpus": "/gone'))
    gone = shoal_here("evaluate", url, cwd=here, **cache)
    assert gone.returncode == 5 and "which is not here: add --data with a folder of it" in gone.stderr


def test_generate_continues_the_prompt_the_same_way_with_the_same_seed(here: Path, whole: Path) -> None:
    command = ("generate", "runs/whole", "--prompt", "shoal of", "--tokens", "20", "-o", "json")
    first, second, other = (json.loads(shoal_here(*command, "--seed", s, cwd=here).stdout) for s in "112")
    assert first == second
    assert first["text"] != other["text"]
    assert first["prompt"] == "shoal of"


def test_answers_that_are_cut_off_say_how_to_go_on(here: Path, whole: Path) -> None:
    (here / "in.jsonl").write_text("".join(json.dumps({"prompt": f"shoal {i}"}) + "\n" for i in range(5000)))
    command = ("generate", "runs/whole", "--input", "in.jsonl", "--output", "out.jsonl", "--tokens", "20")
    with started(*command, cwd=here) as process:
        ledger = here / "out.jsonl.partial"
        wait_until(lambda: ledger.exists() and ledger.read_bytes().count(b"\n") > 3, process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "go on with the same command: out.jsonl.partial keeps what is answered"
    assert ledger.exists() and not (here / "out.jsonl").exists()


def test_generate_names_its_own_options_where_prompt_and_answer_are_too_long(here: Path, whole: Path) -> None:
    result = shoal_here("generate", "runs/whole", "--prompt", "shoal of", "--tokens", "100000", cwd=here)
    assert (result.returncode, result.stdout) == (3, "")
    assert "--tokens is 100000, together more than the model's context of" in result.stderr
