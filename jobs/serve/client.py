"""What the service needs of the engines behind it, wherever they run."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from shoal.workers.engine.request import Load, Output, Request


@dataclass(frozen=True)
class ModelInfo:
    """The served model. name: as clients call it. context: longest prompt and answer together, in tokens. created:
    time of its checkpoint, Unix seconds."""

    name: str
    context: int
    vocab: int
    step: int
    parameters: int
    created: int


class Client(Protocol):
    """Engines, seen from the service. All calls are made from one event loop."""

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """News of a request until ``finish``. Closing the generator cancels the request and frees its pages.

        Raises InvalidInput for a request that can never be computed (too long), Busy when the queue is full,
        ClusterRefused when the engines are gone for good. Engines that die and come back are not noticed here: the
        stream goes on where it was.
        """
        ...

    async def load(self) -> Load:
        """How busy the engines are, all together."""
        ...
