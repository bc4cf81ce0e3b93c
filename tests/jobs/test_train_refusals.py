"""What ``shoal train`` refuses or survives: one sentence, the right exit code, nothing lost, nothing left behind."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shell import SHOAL, environment, shoal, shoal_here
from small import VOCAB, small_corpus, small_recipe
from trained import records

from shoal.jobs.recipe import recipe_to_toml
from shoal.workers.checkpoint_files import last_good
from shoal.workers.config import Recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def here(tmp_path: Path, corpus: Path) -> Path:
    """A folder as a user has it: a recipe of 10 steps, its prepared corpus, a run that was never trained."""
    recipe = Recipe.model_validate(
        small_recipe(train__dtype="float32", train__steps=10, data__corpus=str(corpus), checkpoint__every=5)
    )
    (tmp_path / "small.toml").write_text(recipe_to_toml(recipe))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "runs")
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "recipe.toml").write_text(recipe_to_toml(recipe))
    (tmp_path / "runs" / "old" / "run.json").write_text(json.dumps({"corpus": str(corpus), "corpus_hash": "none"}))
    return tmp_path


def refused(result: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    """The command ended with ``code``, printed no result, and one sentence on standard error that says all of this."""
    assert (result.returncode, result.stdout) == (code, ""), result
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for text in says:
        assert text in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        pytest.param(["--recipe", "smal.toml"], 5, ["recipe 'smal.toml' is neither a file"], id="missing recipe"),
        pytest.param(["--set", "moe.topk=2"], 3, ["moe.topk", "did you mean moe.top_k"], id="misspelt key"),
        pytest.param(["--set", "moe.top_k=9"], 3, ["moe.top_k=9", "moe.experts=8"], id="more than there are"),
        pytest.param(["--set", "model.kv_heads=3"], 3, ["model.heads=4", "model.kv_heads=3"], id="heads"),
        pytest.param(["--set", "attention.cmp_block=6"], 3, ["attention.cmp_block=6"], id="stride"),
        pytest.param(["--workers", "3"], 3, ["moe.experts=8", "3 expert ranks"], id="ranks that do not divide"),
        pytest.param(["--workers", "0"], 3, ["parallel.ranks=0"], id="no ranks"),
        pytest.param(["--placement", "1A:1F", "--set", "model.dense_layers=3"], 3, ["dense_layers=3"], id="no experts"),
        pytest.param(["--placement", "2A2F"], 3, ["placement='2A2F'", "nA:mF"], id="placement"),
        pytest.param(["--set", "model.vocab=200"], 3, ["model.vocab=200", f"{VOCAB}"], id="vocabulary"),
        pytest.param(["--data", "nowhere"], 5, ["nowhere"], id="missing data"),
        pytest.param(["--resume"], 2, ["--name"], id="resume what"),
        pytest.param(["--resume", "--name", "none"], 5, ["runs/none is not a run"], id="missing run"),
        pytest.param(["--name", "old"], 3, ["runs/old exists", "--resume"], id="existing run"),
        pytest.param(["--name", "../up"], 2, ["--name '../up'"], id="name with a path"),
        pytest.param(["--runs-dir", "small.toml"], 3, ["small.toml cannot be written"], id="runs folder is a file"),
        pytest.param(["--runs-dir", "dangling"], 3, ["dangling cannot be written"], id="runs folder leads nowhere"),
        pytest.param(
            ["--resume", "--name", "old", "--set", "model.hidden=64"], 3, ["model.hidden=32", "model.hidden=64"],
            id="run of another recipe",
        ),
        pytest.param(
            ["--resume", "--name", "old", "--steps", "7"], 3, ["train.steps=7", "(--from old begins it with these"],
            id="a longer run",
        ),
        pytest.param(["--resume", "--name", "old"], 3, ["runs/old", "hash none"], id="run of another corpus"),
        pytest.param(
            ["--set", "model.hidden=65536", "--set", "moe.expert_hidden=65536"], 4, ["parallel.ranks=1", "memory free"],
            id="memory",
        ),
        pytest.param(
            ["--set", "train.batch=262144"], 4, ["memory free: add --set train.accumulate="], id="a batch too large"
        ),
        pytest.param(
            ["--workers", "1024", "--set", "parallel.expert=1", "--set", "train.batch=1024"], 4,
            ["parallel.ranks=1024", "memory free"], id="more ranks than memory",
        ),
        pytest.param(["--set", "parallel.device=cuda"], 4, ["parallel.device='cuda'", "no NVIDIA GPU"], id="no GPU"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_before_anything_starts(
    arguments: list[str], code: int, says: list[str], here: Path
) -> None:
    if "parallel.device=cuda" in arguments and any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    recipe = [] if {"--recipe", "--resume"} & set(arguments) else ["--recipe", "small.toml"]
    refused(shoal_here("train", *recipe, *arguments, cwd=here), code, *says)
    assert [path.name for path in (here / "runs").iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "empty"),
        ("image.txt", bytes(range(256)) * 64, "image.txt"),
    ],
)
def test_an_empty_or_binary_file_is_no_data(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    result = shoal_here("data", "prepare", name, "--out", "data/mine", "--vocab", "300", cwd=tmp_path)
    refused(result, 3, name, says)
    assert not (tmp_path / "data" / "mine").exists()


def test_a_folder_that_is_no_corpus_is_refused(here: Path) -> None:
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").write_text("some text")
    refused(
        shoal_here("train", "--recipe", "small.toml", "--data", "notes", cwd=here),
        5,
        "data.corpus='notes'",
        "shoal data prepare",
    )


def test_a_damaged_corpus_is_refused_by_name(here: Path, corpus: Path) -> None:
    copy = here / "copy"
    shutil.copytree(corpus, copy)
    file = next(copy.glob("train-*.parquet"))
    file.write_bytes(file.read_bytes()[:-100])
    refused(shoal_here("train", "--recipe", "small.toml", "--data", "copy", cwd=here), 3, file.name, "is damaged")


def test_a_cluster_that_is_not_there_is_refused(here: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        result = shoal("train", "--recipe", "small.toml", cwd=here, RAY_ADDRESS=address)
    assert result.returncode == 4, result
    assert f"RAY_ADDRESS={address} does not answer" in result.stderr
    assert result.stderr.count("\n") == 1


# Disks and machines with something missing


@contextmanager
def disk(where: Path, size: str) -> Iterator[Path]:
    """A file system of a few bytes, of its own, at ``where``."""
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def test_a_full_disk_is_refused_at_the_start(here: Path) -> None:
    with disk(here / "full", "64k") as full:
        with (full / "filler").open("wb") as file, pytest.raises(OSError, match="No space"):
            file.write(bytes(1 << 20))
        result = shoal("train", "--recipe", "small.toml", "--runs-dir", "full/runs", cwd=here)
    refused(result, 3, "full/runs", "No space left on device", "free some space or choose another --runs-dir")


def test_a_read_only_disk_is_refused_at_the_start(here: Path) -> None:
    with disk(here / "locked", "64k") as locked:
        subprocess.run(["mount", "-o", "remount,ro", locked], check=True)
        result = shoal("train", "--recipe", "small.toml", "--runs-dir", "locked/runs", cwd=here)
    refused(result, 3, "locked/runs", "Read-only file system", "make it a writable folder or choose another --runs-dir")


@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_ends_the_run_with_its_last_checkpoint_whole(goes_on: bool, here: Path) -> None:
    """A checkpoint of the small model takes 1.1 MB: a second does not fit; with more space the run goes on."""
    with disk(here / "small", "1800k") as small:
        result = shoal("train", "--recipe", "small.toml", "--name", "run", "--runs-dir", "small", cwd=here)
        assert result.returncode == 3, result
        assert result.stderr.startswith("error: ")
        assert "No space left on device" in result.stderr
        assert "step-5" in result.stderr
        assert result.stderr.count("\n") == 1
        good, damaged = last_good(small / "run" / "checkpoints")
        assert good is not None
        assert (good.step, damaged) == (5, [])
        if not goes_on:
            return
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        again = shoal("train", "--resume", "--name", "run", "--runs-dir", "small", cwd=here)
        assert again.returncode == 0, again.stderr
        assert [r["step"] for r in records(small / "run")] == list(range(1, 11))


@pytest.mark.parametrize("options", ["size=64k", "ro"])
@pytest.mark.slow
def test_without_shared_memory_and_with_the_dashboards_port_taken_a_run_goes_on(options: str, here: Path) -> None:
    """/dev/shm of 64 KiB or none to write in, as in some containers; port 8265 in use: the dashboard takes another."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8265))
            taken.listen()
        except OSError:
            pass  # somebody has it already, which is as good
        result = in_own_mounts(f"mount -t tmpfs -o {options} tmpfs /dev/shm", here)
    assert result.returncode == 0, result.stderr
    watch = next(line for line in result.stdout.splitlines() if line.startswith("watch"))
    assert "http://127.0.0.1:" in watch
    assert not watch.endswith(":8265")
    assert len(records(here / "runs" / "run")) == 10


def in_own_mounts(prepare: str, here: Path) -> subprocess.CompletedProcess[str]:
    """``shoal train`` where the file systems are its own and ``prepare`` has changed them."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace is not allowed here")
    inner = f'{prepare} && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", inner, "sh", *SHOAL, "train", "--recipe", "small.toml", "--name", "run"],
        cwd=here, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(here: Path) -> None:
    """``shoal train | head -1``: the run ends well, and silently."""
    process = subprocess.Popen(
        [*SHOAL, "train", "--recipe", "small.toml", "--name", "run"], cwd=here, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("run ")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(240)) == ("", 0)
    process.stderr.close()
    good, damaged = last_good(here / "runs" / "run" / "checkpoints")
    assert good is not None
    assert (good.step, damaged) == (10, [])


@pytest.mark.slow
def test_numbers_that_are_not_finite_end_the_run_at_its_last_good_checkpoint(here: Path) -> None:
    rates = ["--set", "train.learning_rate=1e30", "--set", "train.warmup=0"]
    result = shoal("train", "--recipe", "small.toml", "--name", "wild", *rates, cwd=here)
    assert result.returncode == 1, result
    assert result.stderr.startswith("error: training stopped at step ")
    assert "the output of layers.0 is not finite" in result.stderr
    assert "there is no checkpoint yet: lower train.learning_rate" in result.stderr
    assert result.stderr.count("\n") == 1
