"""``--working-dir``: which files of a folder travel with a job, and which folders are refused."""

from __future__ import annotations

import base64
import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from job_fixtures import Shell, here_fixture  # noqa: F401  # fixtures are found by their names

from shoal.jobs.kube.code import LARGEST, zip_folder
from shoal.workers.errors import InvalidInput

CPU = ("--gpus-per-node", "0", "--volume", "runs:/mnt/shoal")


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")


def names(root: Path, told: Callable[[str], None] = lambda said: None) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(zip_folder(str(root), told))).namelist()


def test_local_code_travels_in_a_config_map(tmp_path: Path, here: Shell) -> None:
    (tmp_path / "code" / "pkg").mkdir(parents=True)
    (tmp_path / "code" / "pkg" / "a.py").write_text("x = 1\n")
    (tmp_path / "code" / ".git").mkdir()
    (tmp_path / "code" / ".git" / "HEAD").write_text("no")
    (tmp_path / "code" / "loop").symlink_to(tmp_path / "code")
    arguments = ("job", "render", "train", "--recipe", "tiny", *CPU, "--name", "first", "--working-dir", "code")
    out = here(*arguments)[1]
    config, job = yaml.safe_load_all(out)
    assert config["kind"] == "ConfigMap" and config["metadata"]["name"] == "first-code"
    data = base64.b64decode(config["binaryData"]["code.zip"])
    assert zipfile.ZipFile(io.BytesIO(data)).namelist() == ["pkg/a.py"]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": "file:///etc/shoal/code/code.zip"}
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        volumes = group["template"]["spec"]["volumes"]
        assert {"name": "code", "configMap": {"name": "first-code"}} in volumes
    assert out == here(*arguments)[1], "the same code gives the same bytes"


def test_outputs_are_left_out_at_the_root_alone_and_said(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "jobs/data/corpus.py", "workers/runs/x.py", "build/lib/a.py", "data/tokens.bin", "runs/x")
    write(tmp_path, "dist/__init__.py", "jobs/__pycache__/a.py", "jobs/node_modules/x.js", ".venv/bin/python")
    said: list[str] = []
    assert names(tmp_path, said.append) == ["a.py", "dist/__init__.py", "jobs/data/corpus.py", "workers/runs/x.py"]
    assert said[0].endswith("goes without '.venv', 'build', 'data', 'runs'") and len(said) == 1


def test_the_projects_own_packages_travel_whole(tmp_path: Path, here: Shell) -> None:
    source = Path(__file__).parents[2] / "shoal"
    shutil.copytree(source, tmp_path / "code" / "shoal")
    write(tmp_path, "code/.env")
    sources = {path.relative_to(tmp_path / "code").as_posix() for path in tmp_path.rglob("*.py")}
    assert "shoal/jobs/data/__init__.py" in sources and sources <= set(names(tmp_path / "code"))
    code, _, err = here("job", "render", "train", "--recipe", "tiny", *CPU, "--working-dir", "code")
    assert (code, err) == (0, "--working-dir 'code' goes without '.env'\n")


def test_links_are_followed_within_the_folder_alone(tmp_path: Path) -> None:
    write(tmp_path, "code/pkg/a.py", "elsewhere/secret.py")
    code = tmp_path / "code"
    (code / "inside").symlink_to("pkg")
    (code / "outside").symlink_to("../elsewhere")
    (code / "file.py").symlink_to("../elsewhere/secret.py")
    (code / "itself").symlink_to("itself")
    said: list[str] = []
    assert names(code, said.append) == ["inside/a.py", "pkg/a.py"]
    assert said[0].endswith("goes without 'file.py', 'outside'")


def test_a_folder_that_is_too_large_is_refused_before_all_of_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(os.urandom(2 * LARGEST))
    (tmp_path / "b.bin").touch()
    os.truncate(tmp_path / "b.bin", 1 << 40)  # would take an hour to read
    with pytest.raises(InvalidInput, match=r"is more than 0\.9 MB zipped"):
        zip_folder(str(tmp_path))


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.py")).touch()
    with pytest.raises(InvalidInput, match=r"is not UTF-8: give it another"):
        zip_folder(str(tmp_path))
