"""A way to a server that can be cut: connections end in the middle, and new ones are refused for a while."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Way:
    """Listens on ``port`` and passes bytes to and from ``target``, a port of this machine."""

    def __init__(self, target: int) -> None:
        self._target, self._open = target, True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self.passed = 0  # bytes from the target
        self.refused = 0  # connections
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends all connections, at once, and refuses new ones."""
        self._open = False
        while self._sockets:
            each = self._sockets.pop()
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def mend(self) -> None:
        """Lets connections pass again."""
        self._open = True

    def close(self) -> None:
        """Ends it."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._open:
                self.refused += 1
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 14):
                self.passed += len(piece) * counted
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def way_to(target: int) -> Iterator[Way]:
    """A ``Way`` for the time of a ``with`` block."""
    found = Way(target)
    try:
        yield found
    finally:
        found.close()
