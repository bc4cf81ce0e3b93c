"""What stands between the service, HTTP and gRPC alike, and its engines: a count, and an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from shoal.jobs.serve.client import Client
from shoal.workers.engine.request import Load, Output, Request
from shoal.workers.errors import ClusterRefused


class Intake:
    """A Client that counts the requests under way, and takes no new ones once it is shut."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.running = 0
        self._shut = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """As Client's. Raises ClusterRefused once shut."""
        self._refuse()
        self.running += 1
        self._idle.clear()
        try:
            async with aclosing(self.client.generate(request)) as news:
                async for output in news:
                    yield output
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    def stopped(self, request: str) -> None:
        """As Measured's, where that is the client."""
        tell = getattr(self.client, "stopped", None)
        if tell:
            tell(request)

    async def load(self) -> Load:
        """As Client's. Raises ClusterRefused once shut: whoever asks, asks whether to send requests."""
        self._refuse()
        return await self.client.load()

    async def drain(self, seconds: float) -> int:
        """Shuts, and waits until nothing is under way, or for ``seconds``. Returns how many requests still are."""
        self._shut = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self.running

    def _refuse(self) -> None:
        if self._shut:
            raise ClusterRefused("the service is about to end: send the request again, to another one")
