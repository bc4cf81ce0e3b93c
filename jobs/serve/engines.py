"""Starts the engines of a run, for the service's replica and for jobs over files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.jobs.run_folder import RunFolder
from shoal.jobs.serve.client import ModelInfo
from shoal.workers.checkpoint_files import checkpoint_path
from shoal.workers.config import Recipe
from shoal.workers.engine.request import Load, Output, Request

if TYPE_CHECKING:
    from shoal.jobs.serve.app import Served
    from shoal.workers.engine.engine import Engine


async def open_engines(run: str, step: int, name: str, recipe: dict[str, Any]) -> Served:
    """The ranks of a run's model in the Ray cluster that this process belongs to. A ``Factory`` of the service.

    run: the run's folder. recipe: of the run, with the placement to serve it in.
    """
    import ray

    from shoal.cluster.engines import Engines
    from shoal.cluster.local import RaySession
    from shoal.jobs.serve.app import Served

    folder, checked = RunFolder(Path(run)), Recipe.model_validate(recipe)
    tokenizer = folder.tokenizer()
    resources = ray.cluster_resources()
    session = RaySession(None, False, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
    engines = Engines(checked, str(folder.path / "checkpoints"), step, session)
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
        self._news: dict[str, asyncio.Queue[Output | Exception]] = {}
        self._pump: asyncio.Task[None] | None = None

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See Client."""
        queue: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._news[request.id] = queue
        ended = False
        try:
            await asyncio.to_thread(self.loop.submit, request)
            self._pump = self._pump or asyncio.create_task(self._deliver())
            while not ended:
                output = await queue.get()
                if isinstance(output, Exception):
                    raise output
                ended = output.finish is not None
                yield output
        finally:
            del self._news[request.id]
            if not ended:
                await asyncio.to_thread(self.loop.cancel, request.id)

    async def load(self) -> Load:
        """See Client."""
        return await asyncio.to_thread(self.loop.load)

    async def close(self) -> None:
        """Ends the engine."""
        self.loop.stop()
        await asyncio.to_thread(self.loop.wait)
        if self._pump:
            self._pump.cancel()

    async def _deliver(self) -> None:
        try:
            while True:
                for output in await asyncio.to_thread(self.loop.take, 1.0):
                    if output.request in self._news:
                        self._news[output.request].put_nowait(output)
        except RuntimeError as error:
            for queue in self._news.values():
                queue.put_nowait(error)
