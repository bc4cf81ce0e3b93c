"""What every call passes before anything is computed for it: its token, how many there are, the size of its body."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.jobs.serve.refusal import UNAUTHORISED, Problem, busy

OPEN = ("/healthz", "/readyz")  # whoever starts and stops servers asks these, without a token


@dataclass(frozen=True)
class Settings:
    """What the HTTP service takes on.

    tokens: the bearer tokens that are let in, None for everyone. largest_body: bytes. most_answers: of one call, ``n``
    times its prompts. most_calls: at once; more are told to come back. slow_sender_seconds: for a body to arrive.
    slow_reader_seconds: for a client to take in what is sent to it. heartbeat_seconds: between signs of life in a
    stream.
    """

    tokens: Sequence[str] | None = field(default=None, repr=False)
    largest_body: int = 4 << 20
    most_answers: int = 64
    most_calls: int = 1024
    slow_sender_seconds: float = 60.0
    slow_reader_seconds: float = 60.0
    heartbeat_seconds: float = 15.0


class Gate:
    """ASGI middleware around the whole service. Nothing of a call is read before its token is known."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._calls = 0
        self._tokens = None if settings.tokens is None else [token.encode() for token in settings.tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused:
            await refused.response()(scope, receive, send)
        elif scope["method"] == "POST":
            self._calls += 1
            try:
                await self._app(scope, _Body(scope, receive, self._settings), send)
            finally:
                self._calls -= 1
        else:
            await self._app(scope, receive, send)

    def _refused(self, scope: Scope) -> Problem | None:
        if not self._let_in(_header(scope, b"authorization")):
            return UNAUTHORISED
        if scope["method"] == "POST" and self._calls >= self._settings.most_calls:
            return busy(f"{self._calls} calls are in flight, as many as are taken: send this one again later")
        return None

    def _let_in(self, header: bytes) -> bool:
        if self._tokens is None:
            return True
        scheme, _, given = header.partition(b" ")
        # All are compared, each in constant time, so that the time taken tells nothing about any token.
        same = [hmac.compare_digest(given.strip(), token) for token in self._tokens]
        return scheme.lower() == b"bearer" and any(same)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


class _Body:
    """``receive`` of a call, which gives its body in good time and of good size, or raises HTTPException."""

    def __init__(self, scope: Scope, receive: Receive, settings: Settings) -> None:
        self._receive, self._settings = receive, settings
        length = _header(scope, b"content-length")
        self._length = int(length) if length.isdigit() else 0
        self._asks_first = b"100-continue" in _header(scope, b"expect").lower()
        self._read = 0
        self._whole = False
        self._deadline: float | None = None

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is that the client goes away
            return await self._receive()
        if self._length <= self._settings.largest_body:
            message = await self._part()
            if self._read <= self._settings.largest_body:
                return message
        elif self._asks_first:
            raise self._too_large()
        # A client that is still sending would not see an answer, so its body is read on for a while, and dropped.
        while not self._whole and self._read < 16 * self._settings.largest_body:
            await self._part()
        raise self._too_large()

    async def _part(self) -> Message:
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._settings.slow_sender_seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            seconds = self._settings.slow_sender_seconds
            late = f"the body did not arrive within {seconds:g} s: send it faster, or a smaller one"
            raise HTTPException(408, late, {"Connection": "close"}) from None
        self._read += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        return message

    def _too_large(self) -> HTTPException:
        sentence = f"the body is larger than {self._settings.largest_body} bytes: send a smaller one, or several calls"
        return HTTPException(413, sentence, {"Connection": "close"})
