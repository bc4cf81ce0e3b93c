"""Starts the engines of a run, for the service's replica and for jobs over files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.jobs.run_folder import RunFolder
from shoal.jobs.serve.client import ModelInfo
from shoal.workers.checkpoint_files import checkpoint_path
from shoal.workers.config import Recipe
from shoal.workers.engine.request import NOT_FINITE, EngineEnded, Finish, Load, Output, Request
from shoal.workers.errors import ClusterRefused, InvalidInput, ShoalError
from shoal.workers.run_store import checkpoints_here, is_url

if TYPE_CHECKING:
    from shoal.jobs.serve.app import Served
    from shoal.workers.engine.engine import Engine

T = TypeVar("T")


async def open_engines(run: str, step: int, name: str, recipe: dict[str, Any]) -> Served:
    """The ranks of a run's model in the Ray cluster that this process belongs to. A ``Factory`` of the service.

    run: the run's folder, or its URL. recipe: of the run, with the placement to serve it in.
    """
    from shoal.cluster.engines import Engines
    from shoal.cluster.local import describe
    from shoal.jobs.serve.app import Served

    path = (await asyncio.to_thread(checkpoints_here, run, step)).parent if is_url(run) else Path(run)
    folder, checked = RunFolder(path, run if is_url(run) else None), Recipe.model_validate(recipe)
    tokenizer = folder.tokenizer()
    engines = Engines(checked, folder.checkpoints, step, describe(None, local=False))
    await engines.start()
    return Served(engines, model_info(folder, step, name, checked), tokenizer, engines.close)


def model_info(folder: RunFolder, step: int, name: str, recipe: Recipe) -> ModelInfo:
    """What clients may know of a run's model."""
    from shoal.jobs.estimate import estimate

    path = checkpoint_path(folder.path / "checkpoints", step)
    return ModelInfo(
        name=name,
        context=recipe.model.context,
        vocab=recipe.model.vocab,
        step=step,
        parameters=estimate(recipe).parameters.total,
        created=int(path.stat().st_mtime),
    )


class InProcess:
    """The Client of an engine in this process: no Ray, one rank."""

    def __init__(self, engine: Engine) -> None:
        from shoal.workers.engine.loop import EngineLoop

        self.loop = EngineLoop(engine)
        self._news: dict[str, asyncio.Queue[Output | ShoalError]] = {}
        self._pump: asyncio.Task[None] | None = None

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See Client."""
        if request.id in self._news:
            raise InvalidInput(f"request id {request.id!r} is in use: give each request its own")
        queue: asyncio.Queue[Output | ShoalError] = asyncio.Queue()
        self._news[request.id] = queue
        ended = False
        try:
            await self._call(self.loop.submit, request)
            self._pump = self._pump or asyncio.create_task(self._deliver())
            while not ended:
                output = await queue.get()
                if isinstance(output, ShoalError):
                    ended = True
                    raise output
                ended = output.finish is not None
                if output.finish is Finish.error:
                    raise ClusterRefused(NOT_FINITE)
                yield output
        finally:
            self._news.pop(request.id, None)
            if not ended:
                with suppress(ClusterRefused):
                    await self._call(self.loop.cancel, request.id)

    async def load(self) -> Load:
        """See Client."""
        return await self._call(self.loop.load)

    async def close(self) -> None:
        """Ends the engine, and every stream."""
        self.loop.stop()
        if self._pump:
            await self._pump
        with suppress(EngineEnded):
            await asyncio.to_thread(self.loop.wait)

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.to_thread(function, *arguments)
        except EngineEnded as error:
            raise ClusterRefused(f"{error}: start it again") from None

    async def _deliver(self) -> None:
        """Hands the news to the streams, until the engine ends."""
        while True:
            try:
                outputs = await asyncio.to_thread(self.loop.take, 1.0)
            except EngineEnded as error:
                for queue in self._news.values():
                    queue.put_nowait(ClusterRefused(f"{error}: start it again"))
                return
            for output in outputs:
                if output.request in self._news:
                    self._news[output.request].put_nowait(output)
