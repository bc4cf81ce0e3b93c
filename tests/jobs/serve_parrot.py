"""``shoal serve`` with engines that repeat the prompt, held up or spoiled by files in the run's folder.

The service runs in processes of its own, so files are what tests steer it by, and see what became of a request by.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import typer
from serve_source import small_tokenizer

from shoal.cluster import serving
from shoal.jobs.cli import serve
from shoal.jobs.cli.common import exit_codes
from shoal.jobs.recipe import load_recipe, recipe_to_toml
from shoal.jobs.serve.app import Served
from shoal.jobs.serve.client import ModelInfo
from shoal.workers.checkpoint_files import STATE, Manifest, draft, publish, write_json
from shoal.workers.engine.request import Busy, Finish, Load, Output, Request, Token
from shoal.workers.errors import InvalidInput

CONTEXT = 100_000
BEFORE_HOLD = 2  # tokens of an answer that come although it is held up


class Parrot:
    """Repeats the prompt's tokens, but for its bos.

    While there is a file ``hold``, answers stop after their first tokens; while there is ``busy``, new requests are
    refused. ``log`` gets a word for whatever becomes of a request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        if (self.folder / "busy").exists():
            raise Busy("the queue is full: try again a little later")
        self.note("began")
        end = "cancelled"
        try:
            words, most = request.prompt[1:], request.sampling.max_tokens
            for i in range(most):
                while i >= BEFORE_HOLD and (self.folder / "hold").exists():
                    await asyncio.sleep(0.01)
                last = i + 1 == most
                end = "done" if last else end
                yield Output(request.id, (Token(words[i % len(words)]),), Finish.length if last else None)
        finally:
            self.note(end)

    async def load(self) -> Load:
        return Load(capacity=4)

    def note(self, word: str) -> None:
        with (self.folder / "log").open("a") as log:
            log.write(f"{word}\n")


def noted(folder: Path) -> list[str]:
    """What became of the requests, in order; ``opened`` and ``closed`` for the engines."""
    log = folder / "log"
    return log.read_text().split() if log.exists() else []


async def open_parrot(run: str, step: int, name: str, recipe: dict[str, Any]) -> Served:
    """A Factory.

    It refuses with the sentence in a file ``refusal``, leaves its process's id in ``pid``, and waits while there is a
    file ``slow``.
    """
    folder = Path(run)
    if (folder / "refusal").exists():
        raise InvalidInput((folder / "refusal").read_text())
    (folder / "pid").write_text(str(os.getpid()))
    while (folder / "slow").exists():
        await asyncio.sleep(0.01)
    parrot, tokenizer = Parrot(folder), small_tokenizer()
    parrot.note("opened")

    async def close() -> None:
        parrot.note("closed")

    info = ModelInfo(name, CONTEXT, tokenizer.size, step, parameters=12, created=1_700_000_000)
    return Served(parrot, info, tokenizer, close)


def make_run(folder: Path) -> Path:
    """A run's folder, with a recipe and a checkpoint of step 5 that holds no weights."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe_to_toml(load_recipe("tiny", ["parallel.ranks=1"])))
    with draft(checkpoints, 5) as drafted:
        files = {STATE: write_json(drafted / STATE, '{"step": 5}')}
        publish(drafted, Manifest(step=5, time="2026-01-01T00:00:00Z", world=1, software={}, files=files))
    return folder


if __name__ == "__main__":
    serve.ENGINES = "serve_parrot:open_parrot"
    serving.GIVE_UP = float(os.environ.get("GIVE_UP", serving.GIVE_UP))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(serve.serve)
    with exit_codes():
        app(prog_name="shoal serve")
