"""Text from a trained model: one answer, streamed, or a file of prompts. One process, or ranks on Ray."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.workers.checkpoint_files import MANIFEST, checkpoint_path
from shoal.workers.config import Recipe
from shoal.workers.engine.request import NOT_FINITE, Finish, Request, Sampling
from shoal.workers.errors import ClusterRefused, InvalidInput, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from shoal.jobs.batch import Summary
    from shoal.jobs.load import Trained
    from shoal.jobs.run_folder import RunFolder
    from shoal.jobs.serve.client import Client
    from shoal.workers.config import ServeTable
    from shoal.workers.engine.engine import Engine


def continue_text(trained: Trained, prompt: str, sampling: Sampling, show: Callable[[str], object]) -> tuple[str, int]:
    """The text that follows ``prompt`` and its number of tokens; ``show`` is given the prompt, then every piece.

    Raises InvalidInput when prompt and ``sampling.max_tokens`` do not fit into the model's context, ClusterRefused when
    the model's numbers are not finite.
    """
    from shoal.jobs.serve.text import TextStream

    tokenizer = trained.folder.tokenizer()
    tokens, context = tuple(tokenizer.prompt(prompt)), trained.recipe.model.context
    if len(tokens) + sampling.max_tokens > context:
        raise InvalidInput(
            f"the prompt has {len(tokens)} tokens and --tokens is {sampling.max_tokens}, together more than the "
            f"model's context of {context}: shorten the prompt, or lower --tokens"
        )
    engine = _engine(trained, trained.recipe.serve.model_copy(update={"sequences": 1}))
    engine.add(Request("text", tokens, replace(sampling, stop_tokens=(tokenizer.eos,))))
    stream, pieces, count = TextStream(tokenizer), [], 0
    show(prompt)
    while engine.busy:
        for output in engine.step():
            if output.finish is Finish.error:
                raise ClusterRefused(NOT_FINITE)
            count += len(output.tokens)
            pieces.append(stream.push(output.tokens).text)
            if output.finish:
                pieces.append(stream.end().text)
            show("".join(pieces[-2:]) if output.finish else pieces[-1])
    return "".join(pieces), count


def answer_file(
    folder: RunFolder, step: int, recipe: Recipe, source: Path, target: Path, sampling: Sampling, console: Console
) -> Summary:
    """Answers the prompts of a file with the model of a run's ``step``; see ``shoal.jobs.batch``.

    recipe: where the model runs: in this process for one rank, else on Ray.
    """
    from shoal.jobs.batch import Engine as Answering
    from shoal.jobs.batch import open_batch

    tokenizer = folder.tokenizer()
    sampling = replace(sampling, stop_tokens=(tokenizer.eos,))

    async def work() -> Summary:
        async with _client(folder, step, recipe) as client:
            engine = Answering(client.generate, tokenizer, recipe.model.context)
            many = 2 * recipe.serve.sequences * recipe.parallel.attention_ranks  # some wait, so that none is idle
            return await batch.run(engine, console, many)

    manifest = checkpoint_path(folder.path / "checkpoints", step) / MANIFEST
    weights = f"{folder.name} step {step} {hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]}"
    with open_batch(source, target, sampling, f"{weights} {recipe.model} {recipe.attention}") as batch:
        return asyncio.run(work())


@asynccontextmanager
async def _client(folder: RunFolder, step: int, recipe: Recipe) -> AsyncGenerator[Client, None]:
    if recipe.parallel.ranks > 1:
        from shoal.cluster.engines import Engines
        from shoal.cluster.local import ray_session

        with ray_session(recipe.parallel.ranks, dashboard=False) as session:
            engines = Engines(recipe, folder.checkpoints, step, session)
            await engines.start()
            try:
                yield engines
            finally:
                await engines.close()
        return
    from shoal.jobs.load import load_trained
    from shoal.jobs.serve.engines import InProcess

    process = InProcess(_engine(load_trained(folder, step, recipe), recipe.serve))
    try:
        yield process
    finally:
        await process.close()


def _engine(trained: Trained, table: ServeTable) -> Engine:
    from shoal.workers.engine.actor import limits_of
    from shoal.workers.engine.engine import Engine
    from shoal.workers.machine import free_memory

    device = next(trained.model.parameters()).device.type
    return Engine(trained.model, limits_of(table, device), int(free_memory(device) * table.memory))


def check_files(source: Path | None, target: Path | None, prompt: str, spread: bool) -> None:
    """Raises UsageError unless both files are given, or neither; a prompt does not go with files.

    spread: whether ranks or a recipe's keys are asked for, which go with files only.
    """
    if spread and not source:
        raise UsageError("--workers, --placement and --set go with --input: leave them out, or give a file of prompts")
    if (source is None) != (target is None):
        raise UsageError("--input and --output belong together: give both, or neither")
    if source and prompt:
        raise UsageError("--prompt does not go with --input, whose rows are the prompts: leave one out")
