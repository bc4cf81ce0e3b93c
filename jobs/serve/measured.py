"""Measures what passes between the service and its engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Protocol, runtime_checkable

from shoal.cluster.serve_metrics import ServeMetrics
from shoal.jobs.serve.client import Client
from shoal.workers.engine.request import Busy, Finish, Load, Output, Request
from shoal.workers.errors import InvalidInput

ANSWERED = (Finish.stop, Finish.length)
EVERY = 2.0  # seconds between two looks at the engines
LAST_LOOK = 1.0  # seconds that the look at the end may take


@runtime_checkable
class Restarting(Protocol):
    """A Client that starts engines again when they die. restarts: how often it did."""

    restarts: int


class Measured:
    """A Client that measures another one, and passes everything through as it is.

    Durations are those between the service's call and its taking the news. A client that reads so slowly that its
    stream is held up makes them longer.
    """

    def __init__(self, client: Client, metrics: ServeMetrics, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begins to look at the load of ``client``, every two seconds until ``close``; an event loop must run."""
        self.client, self.metrics = client, metrics
        self._clock = clock
        self._stopped: set[str] = set()
        self._looking = asyncio.create_task(self._look_on())

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """As Client's."""
        metrics, clock = self.metrics, self._clock
        began, last = clock(), None
        ended = "cancelled"  # unless something else is known: the stream was closed, or its task cancelled
        try:
            async with aclosing(self.client.generate(request)) as news:
                async for output in news:
                    now = clock()
                    if output.tokens:
                        if last is None:
                            metrics.first.observe(now - began)
                        else:
                            metrics.each.observe((now - last) / len(output.tokens), len(output.tokens))
                        last = now
                    if output.finish:
                        ended = output.finish.value
                        if output.finish in ANSWERED:
                            metrics.whole.observe(now - began)
                    yield output
        except (InvalidInput, Busy):
            ended = "refused"
            raise
        except Exception:
            ended = "error"
            raise
        finally:
            if ended == "cancelled" and request.id in self._stopped:
                ended = "stop"
                metrics.whole.observe(clock() - began)
            self._stopped.discard(request.id)
            metrics.ended(ended)

    def stopped(self, request: str) -> None:
        """Says that the stream of a request is about to be closed because its text has ended, at a stop string."""
        self._stopped.add(request)

    async def load(self) -> Load:
        """As Client's."""
        return await self.client.load()

    async def close(self) -> None:
        """Looks a last time, and no more. The engines go on."""
        self._looking.cancel()
        await asyncio.wait([self._looking])
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_LOOK):
                await self._look()

    async def _look_on(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(EVERY)

    async def _look(self) -> None:
        self.metrics.flush()
        restarts = self._restarts
        try:
            load = await self.client.load()
        except Exception:  # they are gone, for good perhaps: requests say why
            self.metrics.show(Load())
            return
        self.metrics.show(load)
        if restarts == self._restarts:  # else one cannot tell whose totals these are
            self.metrics.count(load, restarts)

    @property
    def _restarts(self) -> int:
        return self.client.restarts if isinstance(self.client, Restarting) else 0
