"""A small source of tokens whose order and failures a test decides, and jobs over files with it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from shoal.jobs.batch import Batch, Engine, Summary, open_batch
from shoal.jobs.data.tokenizer import train_tokenizer
from shoal.workers.engine.request import Busy, Finish, Output, Request, Sampling, Token
from shoal.workers.errors import ClusterRefused, InvalidInput

CONTEXT = 64
PATIENCE = 60.0  # seconds; a machine may be busy
TOKENIZER = train_tokenizer(["a shoal of fish turns as one, and the net comes up empty. " * 20], 300)
SAMPLING = Sampling(max_tokens=6, temperature=0.5, seed=3, stop_tokens=(TOKENIZER.eos,))


@dataclass
class Source:
    """Answers with tokens that a prompt and its sampling decide. busy, broken: raised for prompts that are named."""

    asked: list[Request] = field(default_factory=list)
    inside: int = 0
    most: int = 0
    busy: dict[str, int] = field(default_factory=dict)
    broken: str = ""
    hold: int = 0  # requests that must be there before any is answered, the last first
    closed: int = 0
    here: list[asyncio.Event] = field(default_factory=list)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        text = TOKENIZER.decode(request.prompt)
        if self.busy.get(text, 0):
            self.busy[text] -= 1
            raise Busy("the queue is full: ask a little later")
        if text == self.broken:
            raise ClusterRefused("the engine is gone: start it again")
        if text == "refused by the engine":
            raise InvalidInput("this prompt cannot be computed: shorten it")
        self.asked.append(request)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self._turn()
            tokens = answer(request)
            yield Output(request.id)  # a prompt that is computed in chunks has no news at first
            for token in tokens[:-1]:
                yield Output(request.id, (Token(token),))
            yield Output(request.id, (Token(tokens[-1]),), Finish.length)
        except GeneratorExit:
            self.closed += 1
            raise
        finally:
            self.inside -= 1

    async def _turn(self) -> None:
        """Waits until ``hold`` requests are there; then the newest goes first, and each lets the one before it go."""
        if not self.hold:
            await asyncio.sleep(0)
            return
        own = asyncio.Event()
        self.here.append(own)
        place = len(self.here) - 1
        if place == self.hold - 1:
            own.set()
        await own.wait()
        if place:
            self.here[place - 1].set()

    @property
    def engine(self) -> Engine:
        return Engine(self.generate, TOKENIZER, CONTEXT)


def answer(request: Request) -> list[int]:
    """The tokens of a request, ``max_tokens`` of them."""
    s = request.sampling
    drawn = Random(f"{request.prompt} {s.temperature} {s.seed}")
    return [drawn.randrange(TOKENIZER.eos + 1, TOKENIZER.size) for _ in range(s.max_tokens)]


def expected(prompt: str, **own: Any) -> str:
    """The text for a prompt."""
    ids = tuple(TOKENIZER.prompt(prompt))
    sampling = Sampling(**{"max_tokens": 6, "temperature": 0.5} | own)
    return TOKENIZER.decode(answer(Request("", ids, sampling)))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return found
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def job(source: Path, target: Path, sampling: Sampling = SAMPLING) -> AbstractContextManager[Batch]:
    return open_batch(source, target, sampling, "runs/first step 100")


def done(source: Path, target: Path, tokens: Source, concurrency: int = 4, sampling: Sampling = SAMPLING) -> Summary:
    with job(source, target, sampling) as batch:
        return asyncio.run(batch.run(tokens.engine, quiet(), concurrency))


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"fish {i}"} for i in range(count)]
