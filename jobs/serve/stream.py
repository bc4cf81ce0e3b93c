"""Server-sent events, to a client that may read slowly, or go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.jobs.serve.refusal import problem
from shoal.workers.errors import ShoalError

_log = logging.getLogger(__name__)
T = TypeVar("T")
Emit = Callable[[Sequence[str]], Awaitable[None]]


class SlowReader(Exception):
    """The client did not take in what was sent to it, for too long."""


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, T], *beside: Coroutine[Any, Any, None]
) -> T | None:
    """The result of ``work``; None when the client went away first, or one of ``beside`` ended, and ``work`` was
    cancelled for it. ``receive`` has given the whole body already."""
    first = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [first, *map(asyncio.create_task, (_gone(receive), *beside))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return first.result() if first.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Whatever ``events`` emits, each text an event, then ``[DONE]``.

    The status is sent with the first event, so that an error before it is an error answer as for any call; an error
    after it becomes the last event. Nothing is buffered here: while the client's connection is full, ``events`` waits,
    and after ``patience`` seconds the stream is given up. A comment is sent every ``heartbeat`` seconds: whoever stands
    between, and gives up silent connections, then waits too.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Callable[[Emit], Awaitable[None]], patience: float, heartbeat: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._patience, self._heartbeat = events, patience, heartbeat
        self._started = False
        self._turn = asyncio.Lock()  # one sends at a time: several answers and the heartbeat share the stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._run(send), self._beat(send))

    async def _run(self, send: Send) -> None:
        async def emit(events: Sequence[str]) -> None:
            await self._send(send, "".join(f"data: {event}\n\n" for event in events))

        try:
            await self._events(emit)
        except SlowReader:
            return
        except Exception as error:
            if not self._started:
                raise
            if not isinstance(error, ShoalError):
                _log.exception("a stream failed")
            await emit([problem(error).body()])
        await emit(["[DONE]"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beat(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._heartbeat)
            await self._send(send, ": waiting\n\n")

    async def _send(self, send: Send, text: str) -> None:
        try:
            async with self._turn, asyncio.timeout(self._patience):
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except TimeoutError:
            raise SlowReader from None
