"""Ports for servers that a test starts in a moment."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that kernels (from 16000 on) and Ray (from 10002 on)
    hand out: a connection of whatever else runs here would take one of those before the server does."""
    while True:
        port = random.SystemRandom().randrange(2000, 10000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def free_ports() -> tuple[int, int]:
    """Two of them."""
    first, second = free_port(), free_port()
    return (first, second) if first != second else free_ports()
