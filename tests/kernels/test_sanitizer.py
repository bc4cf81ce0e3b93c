"""compute-sanitizer finds nothing in a small case of NSA's forward and backward pass, decode and chunks of a prompt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOOL = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer, of the CUDA toolkit, is not installed")
def test_no_access_beside_a_tensor() -> None:
    assert TOOL is not None
    program = [sys.executable, str(HERE / "sanitized.py")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parents[1])
    subprocess.run(program, env=environment, check=True, timeout=140)  # compiles, which takes long beside the tool
    command = [TOOL, "--error-exitcode", "9", *program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
