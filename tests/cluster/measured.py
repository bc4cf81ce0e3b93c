"""Clients of a measured service: what they ask, and engines that do as a test tells them."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from small import VOCAB

from shoal.cluster.serve_metrics import ServeMetrics
from shoal.jobs.serve.measured import Measured
from shoal.workers.engine.engine import Engine
from shoal.workers.engine.request import Finish, Load, Output, Request, Sampling, Token, Turn


async def tokens_of(client: Measured, request: Request, most: float = math.inf) -> list[int]:
    """The tokens of an answer; the stream is closed after ``most`` of them."""
    tokens: list[int] = []
    async with aclosing(client.generate(request)) as news:
        async for output in news:
            tokens += [token.id for token in output.tokens]
            if len(tokens) >= most:
                break
    return tokens


def ask(name: str, prompt: int = 5, **sampling: Any) -> Request:
    """A request with a prompt of so many tokens, another one for each name."""
    start = int.from_bytes(name.encode()) % VOCAB
    options = {"max_tokens": 8, "temperature": 0.0} | sampling
    return Request(name, tuple((start + i) % VOCAB for i in range(prompt)), Sampling(**options))


class Timetable:
    """A Client whose answers come when a timetable says, by a clock of its own.

    table: of each request its news, as (seconds after the last, tokens, finish); an Exception is raised instead.
    """

    def __init__(self, table: dict[str, list[tuple[float, int, Finish | None] | Exception]]) -> None:
        self.table, self.now = table, 0.0

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        for entry in self.table[request.id]:
            if isinstance(entry, Exception):
                raise entry
            seconds, tokens, finish = entry
            self.now += seconds
            yield Output(request.id, (Token(1),) * tokens, finish)

    async def load(self) -> Load:
        return Load()


class Stepwise(Engine):
    """An engine that waits before each step until it is let go on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps = threading.Semaphore(0)
        self.free = False

    def step(self, turn: Turn | None = None) -> list[Output]:
        if not self.free:
            self.steps.acquire()
        return super().step(turn)

    def let_go(self) -> None:
        """Lets all further steps happen."""
        self.free = True
        self.steps.release()


class Restarted(Timetable):
    """Engines that are started again: a test says how often, and what they did since."""

    def __init__(self, restarts: int, load: Load) -> None:
        super().__init__({})
        self.restarts, self.now_load = restarts, load

    async def load(self) -> Load:
        return self.now_load


async def looked_at(engines: Restarted, metrics: ServeMetrics) -> None:
    """One look at the engines' load."""
    await Measured(engines, metrics).close()  # at once: only the last look is left
