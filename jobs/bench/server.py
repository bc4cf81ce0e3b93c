"""A ``shoal serve`` for the time of a ``with`` block."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shoal.jobs.bench.command import failure, shoal_command, started
from shoal.workers.errors import ClusterRefused

READY_SECONDS = 300.0  # until a server that was started must answer
STOP_SECONDS = 30.0  # it writes nothing when it is asked to stop


@contextmanager
def served(run: Path, options: Sequence[str] = (), seconds: float = READY_SECONDS) -> Iterator[str]:
    """The URL of a ``shoal serve RUN`` on free ports, once it is ready; it is ended with the block.

    Raises ClusterRefused when it does not come up within so many seconds.
    """
    port, rpc_port = _free_ports(2)
    command = [*shoal_command(), "serve", str(run), "--port", str(port), "--grpc-port", str(rpc_port), *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with started(command, log, STOP_SECONDS) as process:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/readyz", log, seconds)
            yield f"http://127.0.0.1:{port}/v1"


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    """Raises ClusterRefused when the server ends, or is not ready in time."""
    end = time.monotonic() + seconds
    while not _answers(url):
        if process.poll() is not None:
            raise ClusterRefused(failure(process.args, process.returncode, log.read_text(errors="replace")))  # type: ignore[arg-type]
        if time.monotonic() > end:
            raise ClusterRefused(f"{url} did not answer within {seconds:.0f} s: run shoal serve to see why")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _free_ports(count: int) -> list[int]:
    """Ports of this machine's loopback that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
