"""A server of completions whose timing, statuses and breakdowns are known, over real HTTP.

It is ours because its timing is the point: what it noted when it wrote is what a load generator must find.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from shoal.jobs.bench.load import Shape, clock

MIX = (Shape(8, 4, 3.0), Shape(20, 12))
TEXT = "Between the rocks and the open sea a shoal turns as one, and no fish leads it. " * 40


@dataclass
class Seen:
    """A request as the server saw it: when its head came, and when each piece of text was handed to the socket."""

    body: dict[str, Any]
    token: str
    arrived: float
    written: list[float] = field(default_factory=list)


@dataclass
class Server:
    """Answers on a thread of its own. The fields say how, and what it saw."""

    url: str = ""
    first: float = 0.0  # seconds before the first token
    gap: float = 0.0  # seconds between pieces
    together: int = 0  # nobody gets a token before so many requests have been inside at once
    piece: int = 1  # tokens in a piece
    usage: bool = True
    blank: bool = False  # a piece without text goes ahead of the first token
    model: str = "fish"
    token: str = ""
    fail: list[int | str] = field(default_factory=list)  # of the next requests: an HTTP status, "cut", "error", …
    seen: list[Seen] = field(default_factory=list)
    inside: int = 0
    most: int = 0  # requests inside at once

    async def models(self, request: web.Request) -> web.Response:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": {"message": "who are you?"}}, status=401)
        return web.json_response({"data": [{"id": self.model}] if self.model else []})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        arrived = clock()
        seen = Seen(await request.json(), request.headers.get("Authorization", ""), arrived)
        self.seen.append(seen)
        fail = self.fail.pop(0) if self.fail else 0
        if isinstance(fail, int) and fail:
            return web.json_response({"error": {"message": "no room"}}, status=fail)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            return await self._stream(request, seen, str(fail or ""))
        finally:
            self.inside -= 1

    async def _stream(self, request: web.Request, seen: Seen, fail: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        count = seen.body["max_tokens"]
        if self.blank:
            await _event(response, {"choices": [{"text": "", "finish_reason": None}]})
        await asyncio.sleep(self.first)
        while self.most < self.together:
            await asyncio.sleep(0.005)
        for start in range(0, count, self.piece):
            if start:
                await asyncio.sleep(self.gap)
            if start and fail == "cut":
                assert request.transport is not None
                request.transport.close()
                return response
            if start and fail:
                await response.write({"error": b'data: {"error": "gone"}', "json": b"data: {oops", "end": b""}[fail])
                await response.write(b"\n\n")
                return response
            seen.written.append(clock())
            text = "ab " * min(self.piece, count - start)
            await _event(response, {"choices": [{"text": text, "finish_reason": None}]})
        await _event(response, {"choices": [{"text": "", "finish_reason": "length"}]})
        if self.usage:
            usage = {"prompt_tokens": len(seen.body["prompt"]) // 4, "completion_tokens": count}
            await _event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _event(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")


@contextmanager
def serving() -> Iterator[Server]:
    """A server that listens."""
    own, ready, loop = Server(), threading.Event(), asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", own.models)
        app.router.add_post("/v1/completions", own.completions)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        own.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        await done.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield own
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(30)
        loop.close()
