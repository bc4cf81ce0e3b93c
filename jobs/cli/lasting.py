"""A console that outlives its reader: importing this loads rich."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class Lasting(Console):
    """A console for what takes long: when its reader goes away (``| head``), it falls silent, and the work goes on."""

    def on_broken_pipe(self) -> None:
        """Silences this console and drops what is left in the broken stream: Python would complain of it at its end."""
        self.quiet = True
        stream = sys.stderr if self.stderr else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
