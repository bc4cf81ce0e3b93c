"""Shoal under what the chart's pods are allowed: a root that is read-only, no rights of root, /tmp and /dev/shm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from charted import SERVICE, may_mount, pods_of, rendered
from shell import SHOAL
from small import small_corpus, small_recipe

from shoal.jobs.recipe import recipe_to_toml
from shoal.workers.config import Recipe

# the root of this process alone becomes read-only; what is mounted below it stays as it is
READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$0" "$0"
cd "$0"
mount -o remount,ro,bind /
touch "$1/probe" 2> /dev/null && { echo "the root is not read-only"; exit 1; }
shift
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """The only folder that may be written to. Short, since Ray's sockets lie in it."""
    folder = Path("/tmp", f"pod{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_a_run_writes_to_its_volumes_alone(place: Path) -> None:
    pod = pods_of(rendered(SERVICE))[1]["spec"]["containers"][0]
    assert pod["securityContext"]["readOnlyRootFilesystem"] is True
    assert {each["mountPath"] for each in pod["volumeMounts"]} == {"/mnt/shoal", "/dev/shm", "/tmp"}
    corpus = small_corpus(place)
    changes = {"train__dtype": "float32", "train__steps": 4, "checkpoint__every": 2, "parallel__ranks": 2}
    recipe = Recipe.model_validate(small_recipe(**changes, data__corpus=str(corpus)))
    (place / "small.toml").write_text(recipe_to_toml(recipe))
    command = [*SHOAL, "train", "--recipe", "small.toml", "--name", "first"]
    env = {**os.environ, "HOME": str(place), "TMPDIR": str(place), "PYTHONPATH": str(Path(__file__).parents[2])}
    env.pop("RAY_TMPDIR", None)
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", READ_ONLY, str(place), str(Path(sys.prefix)), *command],
        cwd=place, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (place / "runs" / "first" / "checkpoints" / "step-4" / "manifest.json").exists()
