"""``shoal serve`` in a process of its own, with engines that repeat the prompt, and ways to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from ports import free_ports
from serve_parrot import make_run
from shell import PATIENCE, environment

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "serve_parrot"]


def patiently(true: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Waits for a condition; not in vain for a process that has ended."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert process is None or process.poll() is None, "it has ended"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@dataclass
class Running:
    """A service that runs, and ways to it."""

    process: subprocess.Popen[str]
    run: Path
    port: int
    grpc_port: int
    scheme: str = "http"
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def file(self, name: str) -> Path:
        """A file that steers the engines."""
        return self.run / name

    def body(self, **changes: Any) -> dict[str, Any]:
        return {"model": self.run.name, "prompt": "the sea", "max_tokens": 30, **changes}

    def complete(self, **changes: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=self.body(**changes), timeout=60)

    def ready(self) -> int:
        return httpx.get(f"{self.url}/readyz", timeout=60).status_code

    def told(self) -> str:
        """What the command has printed."""
        return "\n".join(self.lines)


@contextmanager
def serving(folder: Path, *options: str, **changes: str) -> Iterator[Running]:
    """``shoal serve`` of a run in ``folder``, once it says that it serves; killed at the end if it still runs."""
    with starting(folder, *options, **changes) as it:
        patiently(lambda: "try  " in it.told(), it.process)
        yield it


@contextmanager
def starting(folder: Path, *options: str, **changes: str) -> Iterator[Running]:
    """As ``serving``, but at once."""
    run = folder / "parrot"
    if not run.exists():
        make_run(run)
    port, grpc_port = free_ports()
    process = subprocess.Popen(
        [*COMMAND, str(run), "--port", str(port), "--grpc-port", str(grpc_port), *options], cwd=folder, text=True,
        env=environment(PYTHONPATH=str(HERE), **changes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    it = Running(process, run, port, grpc_port, "https" if "--tls-cert" in options else "http")
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: it.lines.extend(line.rstrip("\n") for line in process.stdout or ()))
    reader.start()
    try:
        yield it
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()
        process.stdout.close()


def ended(it: Running, number: int) -> int:
    """The exit code after a signal."""
    it.process.send_signal(number)
    return it.process.wait(PATIENCE)


def command_of(run: Path, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """``shoal serve`` of a run, to its end."""
    return subprocess.run(
        [*COMMAND, str(run), *options], env=environment(PYTHONPATH=str(HERE), **changes), capture_output=True,
        text=True, timeout=PATIENCE,
    )  # fmt: skip
