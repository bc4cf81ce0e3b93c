"""Asks an OpenAI-compatible server for completions, so many at once or so many a second, and times its answers.

The times are what vLLM's and NVIDIA's tools call by these names, so that figures can be compared:
TTFT, from sending a request to the first text of its answer; TPOT, from there to the last text, divided by the tokens
after the first; the request's time, from sending it to the last text. Tokens are the server's own count (``usage``).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp
import numpy as np

from shoal.workers.errors import InvalidInput, UsageError

PAUSE = 0.1  # seconds that a client of the closed loop waits after a failure, lest it do nothing but fail
CHARACTERS = 4  # of a token, about, where no tokenizer is known
SHAPE = re.compile(r"(\d+):(\d+)(?:\*(\d+(?:\.\d+)?))?")
clock = time.perf_counter


@dataclass(frozen=True)
class Shape:
    """A kind of request: tokens of its prompt, most tokens of its answer, how often it comes beside other kinds."""

    prompt: int
    output: int
    weight: float = 1.0


def parse_mix(text: str) -> tuple[Shape, ...]:
    """``PROMPT:OUTPUT*WEIGHT,…``; a weight is 1 where it is not given. Raises UsageError."""
    shapes = []
    for part in text.split(","):
        match = SHAPE.fullmatch(part.strip())
        shape = Shape(int(match[1]), int(match[2]), float(match[3] or 1)) if match else None
        if shape is None or not (shape.prompt and shape.output and shape.weight):
            raise UsageError(f"--mix {part.strip()!r} is not PROMPT:OUTPUT*WEIGHT: write it like 128:32*3,512:64*1")
        shapes.append(shape)
    return tuple(shapes)


@dataclass(frozen=True)
class Text:
    """Text to cut prompts from. ``starts``: the character at which each token begins, and at last the text's length."""

    text: str
    starts: Sequence[int]

    @classmethod
    def of(cls, text: str, starts: Sequence[int] | None = None) -> Text:
        """starts: where tokens begin; without them every four characters are taken for a token."""
        begins = range(0, len(text), CHARACTERS) if starts is None else starts
        return cls(text, [*begins, len(text)])

    @property
    def tokens(self) -> int:
        return len(self.starts) - 1

    def cut(self, first: int, count: int) -> str:
        """Tokens ``[first, first + count)``."""
        return self.text[self.starts[first] : self.starts[first + count]]


@dataclass(frozen=True)
class Prompt:
    """A request to be made: its text, most tokens of the answer, the seed of its sampling."""

    text: str
    output: int
    seed: int


class Prompts:
    """Prompts without end: pieces of a text, of shapes drawn from a mix. The same seed gives the same ones.

    Raises InvalidInput when the text is shorter than a prompt.
    """

    def __init__(self, text: Text, mix: Sequence[Shape], seed: str) -> None:
        longest = max(shape.prompt for shape in mix)
        if text.tokens < longest:
            raise InvalidInput(
                f"--mix asks for prompts of {longest} tokens, and the text has {text.tokens}: give a longer --text"
            )
        self._text, self._mix, self._random = text, mix, Random(seed)

    def next(self) -> Prompt:
        (shape,) = self._random.choices(self._mix, [shape.weight for shape in self._mix])
        first = self._random.randrange(self._text.tokens - shape.prompt + 1)
        return Prompt(self._text.cut(first, shape.prompt), shape.output, self._random.getrandbits(31))


@dataclass(frozen=True)
class Target:
    """A server. url: with its ``/v1``. token: sent as a bearer token. timeout: seconds that a request may take."""

    url: str
    model: str
    token: str | None = None
    temperature: float = 0.8
    timeout: float = 600.0

    def connect(self) -> aiohttp.ClientSession:
        """Connections to it, as many as there are requests in flight."""
        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.token}"} if self.token else {},
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=1 << 20,  # the longest line of an answer, in bytes
        )


@dataclass(frozen=True)
class Answer:
    """How a request went; times in seconds of ``clock``.

    due: when it should have been sent. first, last: when its first and last text came. tokens: new ones, by the
    server's count, or else chunks. chunks: pieces with text. error: empty, or the HTTP status, ``timeout``,
    ``connection``, or ``broken`` for a stream that ended early. said: the server's words about the error.
    """

    due: float
    sent: float
    end: float
    first: float = 0.0
    last: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    chunks: int = 0
    error: str = ""
    said: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for an answer of one token."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def seconds(self) -> float:
        """Seconds to the last text."""
        return self.last - self.sent


@dataclass
class _Stream:
    """An answer as it comes in, line by line."""

    first: float = 0.0
    last: float = 0.0
    chunks: int = 0
    finished: bool = False
    said: str = ""
    usage: dict[str, int] = field(default_factory=dict)

    def take(self, line: bytes) -> None:
        """Reads a line of server-sent events; raises ValueError for what is not JSON."""
        if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
            return
        now, chunk = clock(), json.loads(data)
        if not isinstance(chunk, dict):
            raise ValueError(f"{data[:80]!r} is no piece of an answer")
        self.said = str(chunk["error"]) if chunk.get("error") else self.said
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            text, finish = choice.get("text"), choice.get("finish_reason")
            self.chunks += bool(text)
            self.finished = self.finished or bool(finish)
            if text or finish:  # a chunk without either holds no token yet
                self.first, self.last = self.first or now, now


async def ask(session: aiohttp.ClientSession, target: Target, prompt: Prompt, due: float) -> Answer:
    """Sends a request and reads its answer to the end. What goes wrong is in the answer, not raised."""
    body = {
        "model": target.model, "prompt": prompt.text, "max_tokens": prompt.output, "seed": prompt.seed,
        "temperature": target.temperature, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent, stream = clock(), _Stream()
    try:
        async with session.post(f"{target.url}/completions", json=body) as response:
            if response.status != 200:
                return Answer(due, sent, clock(), error=str(response.status), said=await response.text())
            async for line in response.content:
                stream.take(line)
    except TimeoutError:
        return Answer(due, sent, clock(), error="timeout", said=f"no end after {target.timeout:g} s")
    except aiohttp.ClientError as error:
        return Answer(due, sent, clock(), error="connection", said=str(error) or type(error).__name__)
    except ValueError as error:
        return Answer(due, sent, clock(), error="broken", said=str(error))
    if not stream.finished:
        return Answer(due, sent, clock(), error="broken", said=stream.said or "it ended without a finish_reason")
    return Answer(
        due, sent, clock(), stream.first, stream.last, stream.usage.get("prompt_tokens", 0),
        stream.usage.get("completion_tokens", stream.chunks), stream.chunks,
    )  # fmt: skip


Send = Callable[[float], Awaitable[Answer]]  # sends the next request, due at this time


@dataclass(frozen=True)
class Limits:
    """How much is sent: so many requests, or as many as fit into so many seconds, whichever ends first."""

    requests: int | None = None
    seconds: float | None = None

    def allow(self, sent: int, elapsed: float) -> bool:
        """Whether one more may be sent, after ``sent`` others and ``elapsed`` seconds."""
        return (self.requests is None or sent < self.requests) and (self.seconds is None or elapsed < self.seconds)


async def closed_loop(send: Send, clients: int, limits: Limits) -> list[Answer]:
    """So many clients, each of which sends its next request when it has the answer to the one before."""
    begin, sent = clock(), itertools.count()
    answers: list[Answer] = []

    async def client() -> None:
        while limits.allow(next(sent), clock() - begin):
            answers.append(await send(clock()))
            if answers[-1].error:
                await asyncio.sleep(PAUSE)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return answers


async def open_loop(send: Send, rate: float, limits: Limits, random: Random) -> list[Answer]:
    """Requests come at ``rate`` a second whatever becomes of them, with exponential gaps: a Poisson process."""
    begin, due = clock(), 0.0
    tasks: list[asyncio.Task[Answer]] = []
    async with asyncio.TaskGroup() as group:
        while limits.allow(len(tasks), due := due + random.expovariate(rate)):
            await asyncio.sleep(begin + due - clock())
            tasks.append(group.create_task(_sent(send, begin + due)))
    return [task.result() for task in tasks]


async def _sent(send: Send, due: float) -> Answer:
    return await send(due)


def figures(answers: Sequence[Answer], begin: float) -> dict[str, Any]:
    """What the answers to a load come to; rates are over the time from ``begin`` to the last answer's end.

    Latencies and tokens are those of requests that were answered in full. late_ms: how much later than due requests
    were sent, which is the generator's own fault.
    """
    good = [answer for answer in answers if not answer.error]
    seconds = max((answer.end for answer in answers), default=begin) - begin
    tokens = sum(answer.tokens for answer in good)
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": dict(sorted(Counter(answer.error for answer in answers if answer.error).items())),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds if good else 0.0,
        "output_tokens_per_second": tokens / seconds if good else 0.0,
        "mean_prompt_tokens": _mean([answer.prompt_tokens for answer in good]),
        "mean_output_tokens": _mean([answer.tokens for answer in good]),
        "mean_output_chunks": _mean([answer.chunks for answer in good]),
        "ttft_ms": spread([answer.ttft for answer in good]),
        "tpot_ms": spread([tpot for answer in good if (tpot := answer.tpot) is not None]),
        "request_ms": spread([answer.seconds for answer in good]),
        "late_ms": spread([answer.sent - answer.due for answer in answers]),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds, interpolated linearly between values; nothing of nothing."""
    if not seconds:
        return {}
    ms = np.array(seconds) * 1e3
    return {"mean": float(ms.mean())} | {f"p{p}": float(np.percentile(ms, p)) for p in (50, 90, 99)}


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
