"""``shoal`` as a shell runs it: a process of its own, with nothing of the caller's settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

SHOAL = [sys.executable, "-m", "shoal.jobs.cli.main"]
PATIENCE = 240.0  # seconds; a machine may be busy
UNSET = ("SHOAL_RUNS", "SHOAL_TRACEBACK", "RAY_ADDRESS", "OMP_NUM_THREADS")


def environment(**changes: str) -> dict[str, str]:
    """The caller's environment without what would change a command."""
    env = {key: value for key, value in os.environ.items() if key not in UNSET}
    return {**env, "PYTHONIOENCODING": "utf-8", "COLUMNS": "160", **changes}


def shoal(*arguments: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """``shoal ARGUMENTS`` in ``cwd``, to its end."""
    return subprocess.run(
        [*SHOAL, *arguments], cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=PATIENCE
    )


def shoal_here(*arguments: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """As ``shoal``, in this process: for the many mistakes that are refused before anything is started."""
    from shoal.jobs.cli.main import main

    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in UNSET:
            patch.delenv(name, raising=False)
        for name, value in {"COLUMNS": "160", **changes}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["shoal", *arguments])
        patch.chdir(cwd)
        try:
            main()
            code = 0
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            code = end.code or 0
    return subprocess.CompletedProcess(["shoal", *arguments], code, out.getvalue(), err.getvalue())


@contextmanager
def started(*arguments: str, cwd: Path, before: Sequence[str] = (), **changes: str) -> Iterator[subprocess.Popen[str]]:
    """``shoal ARGUMENTS`` as the leader of a process group, as a terminal starts it; killed at the end if need be.

    before: a command that runs it, such as ``nohup``.
    """
    process = subprocess.Popen(
        [*before, *SHOAL, *arguments], cwd=cwd, env=environment(**changes), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Tests that run in a shell's background have SIGINT ignored, and what they start would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits for a condition that a running command brings about."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def steps_done(run: Path) -> int:
    """The last step in a run's metrics.jsonl, 0 when there is none."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((r["step"] for r in map(_parsed, lines) if r.get("kind") == "train"), default=0)


def _parsed(line: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:  # a line that is being written
        return {}
    return found


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that name ``folder`` or have it as an environment variable: Ray's are."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line, env = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:  # it ended, or is another user's
            continue
        if str(folder).encode() in line + env:
            found.append(line.replace(b"\0", b" ").decode(errors="replace")[:200])
    return found
