"""shoal doctor: true on this machine, and true about what is wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from shell import shoal_here

from shoal.jobs.doctor import Check, can_train, examine

SHOAL = [sys.executable, "-m", "shoal.jobs.cli.main", "doctor"]


def test_this_machine_can_train_and_the_facts_are_right(tmp_path: Path) -> None:
    result = shoal_here("doctor", "--runs-dir", "runs", "-o", "json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["can_train"] is True
    found = {check["name"]: check for check in data["checks"]}
    assert found["torch"]["found"].startswith(version("torch"))
    assert found["ray"]["found"] == version("ray")
    assert found["runs folder"]["status"] == "ok"
    assert all(check["remedy"] for check in data["checks"] if check["status"] != "ok")
    assert {"python", "gpu", "triton", "cores", "memory", "/dev/shm", "disk", "open files"} <= set(found)
    assert {"port 6379", "port 8265", "tokenizers", "pyarrow", "megablocks", "kubectl", "helm"} <= set(found)
    assert list(tmp_path.iterdir()) == []


def test_a_megablocks_that_was_built_for_another_torch_is_no_good(tmp_path: Path) -> None:
    """A library of grouped_gemm that the loader refuses: the doctor says so, and so does whoever asks for it."""
    found = {}
    for name in ("megablocks", "grouped_gemm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for library in (False, True):
        (tmp_path / "grouped_gemm" / "backend.py").write_text("import grouped_gemm_backend" if library else "")
        (tmp_path / f"grouped_gemm_backend{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"\x7fELF, not quite")
        result = subprocess.run([*SHOAL, "-o", "json"], capture_output=True, text=True, env=env, timeout=120)
        assert "Traceback" not in result.stderr
        (found[library],) = [c for c in json.loads(result.stdout)["checks"] if c["name"] == "megablocks"]
    assert found[False] == {**found[False], "status": "ok", "found": "installed"}
    assert found[True]["status"] == "warn" and "grouped_gemm_backend" in found[True]["found"]
    assert "make megablocks" in found[True]["remedy"]
    asked = (
        "import torch; from shoal.kernels.moe.backend import experts_backend\n"
        "try: experts_backend('megablocks', torch.device('cuda'), torch.bfloat16)\n"
        "except ValueError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=env, timeout=120)
    assert re.search(r"moe\.backend='megablocks', .* cannot be loaded .*: run `make megablocks` again", result.stdout)


def test_runs_that_cannot_be_written_are_exit_code_3(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    result = shoal_here("doctor", "--runs-dir", str(file / "runs"), cwd=tmp_path, COLUMNS="300")
    assert result.returncode == 3
    assert "Not a directory" in result.stdout
    assert "training is impossible here" in result.stdout


def test_a_port_in_use_is_a_warning_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as holder:
        try:
            holder.bind(("127.0.0.1", 8265))
            holder.listen()
        except OSError:
            pass  # a Ray of this machine holds it already
        check = {check.name: check for check in examine(tmp_path)}["port 8265"]
    assert check.status == "warn"
    assert "dashboard" in check.remedy


def test_a_torch_that_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [*SHOAL, "--runs-dir", str(tmp_path), "-o", "json"], capture_output=True, text=True, env=env, timeout=120
    )
    assert result.returncode == 3
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["torch"]["status"] == "missing"
    assert "libcudart.so.13" in checks["torch"]["found"]


def test_only_what_training_needs_stands_in_its_way() -> None:
    assert can_train([Check("helm", "missing", "not found"), Check("ray", "ok", "2", required=True)])
    assert not can_train([Check("ray", "missing", "not installed", required=True)])
