"""``shoal generate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.jobs.cli.common import (
    RUNS_DIR,
    Output,
    RunArgument,
    RunsDirOption,
    SetOption,
    StepOption,
    TemperatureOption,
    emit,
    open_told,
)

if TYPE_CHECKING:
    from shoal.jobs.run_folder import RunFolder
    from shoal.workers.config import Recipe
    from shoal.workers.engine.request import Sampling


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    source: Annotated[Path | None, typer.Option("--input", help="Prompts: .jsonl or .parquet.")] = None,
    target: Annotated[Path | None, typer.Option("--output", help="Answers: .jsonl or .parquet.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: TemperatureOption = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this mass.")] = 0.95,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop less than this share of the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    step: StepOption = None,
    workers: Annotated[int | None, typer.Option(help="Ranks for --input; default: 1, without Ray.")] = None,
    placement: Annotated[str | None, typer.Option(help="Of these ranks: colocated, or nA:mF.")] = None,
    sets: SetOption = None,
    runs_dir: RunsDirOption = RUNS_DIR,
    output: Annotated[Output, typer.Option("-o", "--format", help="How to print the result.")] = Output.table,
) -> None:
    """Continue a text with a trained model, or answer a file of prompts.

    A file has a column (Parquet) or key (JSON lines) `prompt`, and if you like `id`, `max_tokens`, `temperature` and
    `seed`. A job that was interrupted goes on when it is given again.

    Examples:

    - `shoal generate tiny --prompt "class "`

    - `shoal generate runs/tiny --prompt "def main" --temperature 0 -o json`

    - `shoal generate tiny --input prompts.jsonl --output answers.parquet`
    """
    from shoal.jobs.generate import check_files
    from shoal.workers.engine.request import Sampling

    check_files(source, target, prompt, bool(workers or placement or sets))
    sampling = Sampling(tokens, temperature, top_k, top_p, min_p, seed)
    folder, chosen = open_told(run, runs_dir, step)
    if source and target:
        from shoal.jobs.load import serving_recipe

        recipe = serving_recipe(folder, sets, workers, placement)
        _answer(folder, chosen, recipe, source, target, sampling, output)
    else:
        _continue(folder, chosen, prompt, sampling, output)


def _answer(
    folder: RunFolder, step: int, recipe: Recipe, source: Path, target: Path, sampling: Sampling, output: Output
) -> None:
    """Answers a file of prompts."""
    from shoal.jobs.cli.lasting import Lasting
    from shoal.jobs.generate import answer_file

    try:
        summary = answer_file(folder, step, recipe, source, target, sampling, Lasting(stderr=True))
    except KeyboardInterrupt:
        typer.echo(f"go on with the same command: {target}.partial keeps what is answered", err=True)
        raise
    facts = {"run": folder.source or str(folder.path), "step": step, "output": str(target), **asdict(summary)}
    said = f"{target}: {summary.rows} answers, {summary.failed} of them errors, {summary.tokens} new tokens"
    said += ": what is wrong stands in their `error`" * bool(summary.failed)
    emit(facts, output, lambda: typer.echo(said))


def _continue(folder: RunFolder, step: int, prompt: str, sampling: Sampling, output: Output) -> None:
    """Continues one prompt, and shows the text as it comes."""
    from shoal.jobs.generate import continue_text
    from shoal.jobs.load import load_trained

    trained = load_trained(folder, step)

    def show(piece: str) -> None:
        if output is Output.table:
            typer.echo(piece, nl=False)

    text, count = continue_text(trained, prompt, sampling, show)
    facts = {"run": folder.source or str(folder.path), "step": step, "prompt": prompt, "text": text, "tokens": count}
    emit(facts, output, lambda: typer.echo(""))
