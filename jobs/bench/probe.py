"""``shoal`` with timers around its larger parts: ``python -m shoal.jobs.bench.probe FILE ARGUMENTS…``.

Appends a JSON line ``{"part", "start", "end"}`` (seconds since 1970) to FILE whenever a part ends; a driver that does
several things at once gives parts that overlap.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from shoal.jobs.bench import leave

# (what a person would call it, module, attribute); what is a context manager is timed until it is entered
PARTS = (
    ("unigram and gzip baselines", "shoal.jobs.train", "baselines"),
    ("import ray, start Ray", "shoal.cluster.local", "ray_session"),
    ("place the ranks", "shoal.cluster.group", "RankGroup.__init__"),
    ("start the actors, import torch, join", "shoal.cluster.group", "RankGroup.connect"),
    ("build model, optimizer, loader", "shoal.cluster.group", "RankGroup.build"),
)


def main(file: str, *arguments: str) -> None:
    """Runs the command line with the timers in place."""
    for part, module, attribute in PARTS:
        _time(Path(file), part, module, attribute)
    from shoal.jobs.cli.main import main as shoal_main

    sys.argv = ["shoal", *arguments]
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what it runs saves, and ends Ray, before it ends
    shoal_main()


def owner_of(module: str, attribute: str) -> tuple[Any, str]:
    """The object that holds an attribute such as ``RankGroup.build``, and the attribute's last name."""
    *path, last = attribute.split(".")
    return reduce(getattr, path, import_module(module)), last


def _time(file: Path, part: str, module: str, attribute: str) -> None:
    owner, name = owner_of(module, attribute)
    original: Callable[..., Any] = getattr(owner, name)

    def say(start: float) -> None:
        with file.open("a") as out:
            out.write(json.dumps({"part": part, "start": start, "end": time.time()}) + "\n")

    @wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.time()
        result = original(*args, **kwargs)
        if hasattr(result, "__enter__"):
            return _entered(result, lambda: say(start))
        say(start)
        return result

    setattr(owner, name, timed)


@contextmanager
def _entered(inner: Any, after: Callable[[], None]) -> Iterator[Any]:
    with inner as value:
        after()
        yield value


if __name__ == "__main__":
    main(*sys.argv[1:])
