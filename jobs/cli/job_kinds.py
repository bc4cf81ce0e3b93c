"""The kinds of jobs with their own arguments: ``train``, ``evaluate``, ``generate``, ``serve``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from shoal.jobs.cli.common import PlacementOption, RecipeOption, SetOption
from shoal.jobs.kube import work
from shoal.jobs.kube.options import JobOptions

RunArgument = Annotated[str, typer.Argument(help="The run's name, its path on a volume, or its URL (s3://…).")]
RunsOption = Annotated[
    str | None, typer.Option("--runs-dir", help="Folder of the runs; default: runs/ on the first volume.")
]
StepOption = Annotated[int | None, typer.Option(min=0, help="Checkpoint; default: the newest whole one.")]


def train(
    options: JobOptions,
    recipe: RecipeOption = None,
    sets: SetOption = None,
    data: Annotated[str | None, typer.Option(help="Corpus: stdlib, one in --data-dir, or a path on a volume.")] = None,
    placement: PlacementOption = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (train.steps).")] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; default: the job's --name, else its own.")] = None,
    runs_dir: RunsOption = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of prepared corpora; default: data/ on the first volume.")
    ] = None,
) -> work.Work:
    """Train a model from a recipe: a rank a GPU, on nodes beside a head that hosts none.

    The job goes on with its run when it is begun again, by --retries, by a queue that had suspended it, or by
    `shoal job resubmit --from-checkpoint`.
    """
    overrides = {"data.corpus": data, "parallel.placement": placement, "train.steps": steps}
    return work.train(options, recipe or "tiny", sets or (), overrides, run, runs_dir, data_dir)


def evaluate(
    options: JobOptions,
    run: RunArgument,
    tokens: Annotated[int | None, typer.Option(min=1, help="Validation tokens; default: the recipe's.")] = None,
    data: Annotated[str | None, typer.Option(help="Another corpus folder, on a volume.")] = None,
    step: StepOption = None,
    runs_dir: RunsOption = None,
) -> work.Work:
    """Measure a trained model in bits per byte, on one GPU (or one core) of a node."""
    arguments = _flags({"--tokens": tokens, "--data": data, "--step": step})
    return work.evaluate(options, run, runs_dir, [*arguments, "-o", "json"])


def generate(
    options: JobOptions,
    run: RunArgument,
    source: Annotated[str, typer.Option("--input", help="Prompts on a volume: .jsonl or .parquet.")],
    target: Annotated[str, typer.Option("--output", help="Answers on a volume: .jsonl or .parquet.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="New tokens at most.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: always the likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")] = None,
    step: StepOption = None,
    runs_dir: RunsOption = None,
) -> work.Work:
    """Answer a file of prompts with a trained model; begun again, it goes on where it was."""
    arguments = _flags({"--tokens": tokens, "--temperature": temperature, "--seed": seed, "--step": step})
    return work.generate(options, run, source, target, runs_dir, arguments)


def serve(
    options: JobOptions,
    run: RunArgument,
    step: StepOption = None,
    model: Annotated[str | None, typer.Option(help="Model name that clients use; default: the run's.")] = None,
    placement: PlacementOption = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Open to the cluster without a token.")] = False,
    runs_dir: RunsOption = None,
) -> work.Work:
    """Serve a trained model over HTTP and gRPC, as a RayService."""
    return work.serve(options, run, runs_dir, step, model, placement, insecure)


def _flags(values: dict[str, object]) -> list[str]:
    return [part for key, value in values.items() if value is not None for part in (key, str(value))]


KINDS: dict[str, Callable[..., work.Work]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "serve": serve,
}
