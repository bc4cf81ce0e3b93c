"""A source of tokens to serve from: a Markov chain, whose time the tests hold in their hands.

It stands where the engines stand (``Client``), so that a test can say when a token comes, how full the queue is and
what is in flight, to the token; the service over real engines has tests of its own.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from shoal.jobs.data.tokenizer import CorpusTokenizer, train_tokenizer
from shoal.jobs.serve.apart import ReaderApart
from shoal.jobs.serve.client import ModelInfo
from shoal.jobs.serve.http import Settings, make_app
from shoal.workers.engine.request import Busy, Finish, Load, Output, Request, Token
from shoal.workers.errors import ClusterRefused, InvalidInput

PATIENCE = 30.0  # seconds; a machine may be busy
SMOOTHING = 1e-4  # of a token that never followed: some answers hold broken characters

TEXTS = (
    "A shoal of fish swims in the deep blue sea. The tide turns, the nets are empty, and the shoal swims on.",
    "Ein Fischschwarm schwimmt im tiefen Meer; über ihm kreisen Möwen, und für 3 € gibt es Brötchen.",
    "魚の群れは深い海を泳ぐ。潮が変わり、網は空のまま、群れは泳ぎ続ける。",
    "user: what swims? 🐟🐠🐡\nassistant: a shoal of fish.\nuser: where? 🌊\nassistant: in the deep blue sea 🌊🐟.",
)


@cache
def small_tokenizer() -> CorpusTokenizer:
    """Byte-level BPE in which many characters are several tokens."""
    return train_tokenizer(TEXTS, 320)


class Source:
    """Tokens of an order-2 Markov chain over TEXTS. All calls from one event loop.

    pause_after: tokens of a request after which it waits for ``resume``; None for never. batch: tokens of one news.
    closed: refuse everything, as engines do that shut down.
    """

    def __init__(self, tokenizer: CorpusTokenizer, *, context: int = 128, sequences: int = 4, waiting: int = 8) -> None:
        self.info = ModelInfo("shoal-test", context, tokenizer.size, step=7, parameters=1000, created=1_700_000_000)
        self.sequences, self.waiting = sequences, waiting
        self.pause_after: int | None = None
        self.batch = 1
        self.closed = False
        self.limit = context
        self.asked: list[Request] = []
        self.told: Counter[str] = Counter()  # tokens taken from the source, by request
        self.running: set[str] = set()
        self.cancelled: list[str] = []
        self.refused = 0  # for want of room
        self._eos = tokenizer.eos
        self._resume, self._changed = asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(sequences)
        self._seen: set[tuple[int, ...]] = set()
        self._follows: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for tokens in tokenizer.encode(TEXTS):
            ids = [int(token) for token in tokens]
            for i in range(1, len(ids)):
                self._follows[tuple(ids[max(0, i - 2) : i])][ids[i]] += 1
                self._follows[(ids[i - 1],)][ids[i]] += 1

    def resume(self) -> None:
        """Lets paused requests go on to their end."""
        self._resume.set()

    async def until(self, true: Callable[[], bool]) -> None:
        """Waits for a condition that requests bring about."""
        async with asyncio.timeout(PATIENCE):
            while not true():
                self._changed.clear()
                await self._changed.wait()

    async def load(self) -> Load:
        self._refuse()
        return Load(running=len(self.running), capacity=self.sequences)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        self._refuse()
        if len(request.prompt) + request.sampling.max_tokens > self.limit:
            raise InvalidInput("the request is longer than the context: shorten it")
        if len(self.running) >= self.sequences + self.waiting:
            self.refused += 1
            self._changed.set()
            raise Busy(f"{self.waiting} requests wait already: try again a little later")
        self.asked.append(request)
        self.running.add(request.id)
        self._changed.set()
        ended = False
        try:
            async with self._slots:
                async for output in self._outputs(request):
                    ended = output.finish is not None
                    yield output
        finally:
            self.running.discard(request.id)
            if not ended:
                self.cancelled.append(request.id)
            self._changed.set()

    async def _outputs(self, request: Request) -> AsyncIterator[Output]:
        sampling, context = request.sampling, list(request.prompt)
        cached = len(request.prompt) - 1 if request.prompt in self._seen else 0
        self._seen.add(request.prompt)
        news: list[Token] = []
        for i in range(sampling.max_tokens):
            await self._turn(i)
            token = self.choose(request, context, i)
            if token.id in sampling.stop_tokens:
                yield Output(request.id, tuple(news), Finish.stop, cached)
                return
            context.append(token.id)
            news.append(token)
            self.told[request.id] += 1
            self._changed.set()
            last = i + 1 == sampling.max_tokens
            if last or len(news) == self.batch:
                yield Output(request.id, tuple(news), Finish.length if last else None, cached)
                news = []

    async def _turn(self, done: int) -> None:
        await asyncio.sleep(0)
        if self.pause_after is not None and done >= self.pause_after:
            await self._resume.wait()
        self._refuse()

    def _refuse(self) -> None:
        if self.closed:
            raise ClusterRefused("the engines shut down: ask again elsewhere")

    def choose(self, request: Request, context: list[int], place: int) -> Token:
        sampling = request.sampling
        counts = self._follows.get(tuple(context[-2:])) or self._follows.get((context[-1],)) or Counter()
        weights = [counts[token] + SMOOTHING for token in range(self.info.vocab)]
        total = math.fsum(weights)
        likeliest = sorted(range(len(weights)), key=lambda token: -weights[token])
        if sampling.temperature == 0:
            chosen = likeliest[0]
        else:
            kept = likeliest[: sampling.top_k or None]
            tempered = [(weights[token] / weights[kept[0]]) ** (1 / sampling.temperature) for token in kept]
            chosen = random.Random(f"{sampling.seed} {place}").choices(kept, tempered)[0]
        if sampling.logprobs is None:
            return Token(chosen)
        logs = {token: math.log(weights[token] / total) for token in [chosen, *likeliest[: sampling.logprobs]]}
        return Token(chosen, logs[chosen], tuple((token, logs[token]) for token in likeliest[: sampling.logprobs]))


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes a test of a coroutine function."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 2 * PATIENCE))

    return run


@dataclass
class Stand:
    """A service that runs, what it takes its tokens from, a client of it, and what reads its large bodies."""

    source: Source
    port: int
    http: httpx.AsyncClient
    apart: ReaderApart

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def complete(self, prompt: Any = "A shoal", **keys: Any) -> httpx.Response:
        """POST /v1/completions; the likeliest tokens unless told otherwise."""
        body = {"model": "shoal-test", "prompt": prompt, "temperature": 0, **keys}
        return await self.http.post("/v1/completions", json=body)

    async def chat(self, *messages: dict[str, Any], **keys: Any) -> httpx.Response:
        """POST /v1/chat/completions; the likeliest tokens unless told otherwise."""
        body = {"model": "shoal-test", "messages": list(messages), "temperature": 0, **keys}
        return await self.http.post("/v1/chat/completions", json=body)


@asynccontextmanager
async def stand(
    settings: Settings | None = None,
    *,
    source: type[Source] = Source,
    headers: dict[str, str] | None = None,
    **sizes: int,
) -> AsyncIterator[Stand]:
    """A service over a source of these sizes."""
    tokenizer = small_tokenizer()
    tokens = source(tokenizer, **sizes)
    app = make_app(tokens, tokens.info, tokenizer, settings or Settings())
    try:
        async with served(app) as port:
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE) as http:
                yield Stand(tokens, port, http, app.state.service.apart)
    finally:
        app.state.service.apart.close()


def events(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream, of which [DONE] must be the last."""
    found = [line.removeprefix("data: ") for line in text.strip().split("\n\n") if not line.startswith(":")]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[int]:
    """The app behind a real HTTP server on a free port of this machine: the port."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=5)
    )
    started = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(PATIENCE):
            while not server.started:
                assert not started.done(), "the server did not start"
                await asyncio.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await started
