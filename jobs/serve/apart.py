"""Large bodies are read in a process of their own: megabytes of JSON would hold up the event loop for seconds.

Not in a thread, since parsing JSON keeps the interpreter's lock: a body of a million empty lists stops every thread.
``python -m shoal.jobs.serve.apart`` is that process. Frames of pickle go to its standard input and come from its
standard output; both ends are ours. It ends when its input does, so it never outlives who started it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import shoal
from shoal.jobs.serve.reading import Kind, Read, Reader
from shoal.jobs.serve.refusal import Problem, problem
from shoal.workers.errors import ClusterRefused

LARGE = 1 << 15  # bytes of a body that is read apart; a smaller one takes some ten milliseconds at worst
_LENGTH = struct.Struct("<Q")


class Refused(Exception):
    """A call that the other process refused."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class ReaderApart:
    """Reader.body in another process, one body at a time. The process is started when it is first needed."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = ThreadPoolExecutor(max_workers=1, thread_name_prefix="large-bodies")

    async def body(self, kind: Kind, body: bytes) -> Read:
        """Raises Refused as ``Reader.body`` refuses, ClusterRefused when the process was lost."""
        found = await asyncio.get_running_loop().run_in_executor(self._turn, self._ask, kind, body)
        if isinstance(found, Problem):
            raise Refused(found)
        return found

    def start(self) -> None:
        """Starts the process in the background, so that the first large body need not wait for it."""
        self._turn.submit(self._running)

    def close(self) -> None:
        """Ends the process once it has read what it was given."""
        self._turn.submit(self._stop)
        self._turn.shutdown(wait=False)

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return self._process.pid if self._process else None

    def _ask(self, kind: Kind, body: bytes) -> Read | Problem:
        process = self._running()
        assert process.stdin and process.stdout
        try:
            _send(process.stdin, (kind, body))
            found: Read | Problem = _receive(process.stdout)
        except (OSError, EOFError):
            self._stop()
            raise ClusterRefused("the process that reads large bodies ended: send the request again") from None
        return found

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            root = str(Path(shoal.__file__).resolve().parents[1])
            paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": paths},
            )
            assert self._process.stdin
            _send(self._process.stdin, self._reader)
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()


def _send(file: IO[bytes], thing: Any) -> None:
    data = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
    file.write(_LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def _receive(file: IO[bytes]) -> Any:
    """Raises EOFError at the end."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    """Reads bodies until the input ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what anybody prints is no frame
    reader: Reader = _receive(sys.stdin.buffer)
    gc.freeze()
    gc.set_threshold(1_000_000)  # a million lists of one body are no garbage, and looking for some takes seconds
    while True:
        try:
            kind, body = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            found: Read | Problem = reader.body(kind, body)
        except Exception as error:
            found = problem(error)
        _send(answers, found)


if __name__ == "__main__":
    main()
