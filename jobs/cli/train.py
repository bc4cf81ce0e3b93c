"""``shoal train``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from shoal.jobs.cli.common import Output, OutputOption, RunsDirOption, SetOption, complete_recipe, complete_run, emit

EXAMPLES = """
Examples:

- `shoal train --recipe tiny`

- `shoal train --recipe tiny --workers 4 --placement 2A:2F --name disaggregated`

- `shoal train --recipe my.toml --data data/books --set train.steps=2000 --set moe.top_k=6`

- `shoal train --recipe nsa-64k-small --data data/books --from nsa-8k-small`

- `shoal train --resume --name tiny`
"""


def train(
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="A built-in recipe or a TOML file; default: tiny.", autocompletion=complete_recipe
        ),
    ] = None,
    sets: SetOption = None,
    data: Annotated[str | None, typer.Option(help="Corpus: stdlib, shakespeare, or a prepared folder.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ranks (parallel.ranks).")] = None,
    placement: Annotated[str | None, typer.Option(help="colocated, or nA:mF, such as 2A:2F.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (train.steps).")] = None,
    initial: Annotated[
        str | None,
        typer.Option("--from", help="Begin with the weights of this run (train.initial).", autocompletion=complete_run),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: the recipe's, numbered.", autocompletion=complete_run)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last good checkpoint.")] = False,
    or_resume: Annotated[
        bool, typer.Option("--or-resume", help="The same where the run exists already; else begin it.")
    ] = False,
    runs_dir: RunsDirOption = Path("runs"),
    data_dir: Annotated[Path, typer.Option(help="Where prepared corpora lie.")] = Path("data"),
    output: OutputOption = Output.table,
) -> None:
    """Train a model from a recipe, or resume a run: here, or inside the Ray cluster that RAY_ADDRESS names."""
    from shoal.jobs.cli.lasting import Lasting
    from shoal.jobs.recipe import load_recipe
    from shoal.jobs.run_folder import RunFolder, check_same_recipe
    from shoal.jobs.train import train as run_training
    from shoal.workers.errors import UsageError

    overrides = {
        "data.corpus": data,
        "parallel.ranks": ranks_of(placement) if workers is None else workers,
        "parallel.placement": placement,
        "train.steps": steps,
        "train.initial": initial,
    }
    folder = None
    if resume or or_resume:
        if name is None:
            which = "--resume" if resume else "--or-resume"
            raise UsageError(f"{which} needs the run's name: add --name NAME; `shoal runs list` shows the runs")
        folder = RunFolder(runs_dir / name)
        if resume or folder.recipe_file.exists():
            folder.recipe()
        else:
            folder = None
    source = recipe or (folder.recipe_file if folder else "tiny")
    checked = load_recipe(source, sets or (), overrides)
    if folder:
        check_same_recipe(folder, checked)
    console = Lasting(stderr=output is not Output.table, markup=False)
    result = run_training(checked, runs_dir, name, folder, data_dir, console)

    def table() -> None:
        if result.sample:
            console.print(f"\nA sample after step {result.step}:", style="bold")
            console.print(result.prompt + result.sample, highlight=False)
        if not result.stopped:
            console.print(f"\n{result.run}/ holds metrics.jsonl, loss.png, checkpoints/ and TensorBoard events.")
            console.print(f"More text: shoal generate {result.run} --prompt 'class '", highlight=False)

    facts = {
        "run": str(result.run),
        "step": result.step,
        "stopped": result.stopped,
        "evaluation": result.evaluation,
        "sample": result.sample,
    }
    emit(facts, output, table)
    if result.stopped:
        raise typer.Exit(130)


def ranks_of(placement: str | None) -> int | None:
    """The number of ranks that nA:mF names; it need not be repeated by --workers."""
    match = re.fullmatch(r"(\d+)A:(\d+)F", placement or "")
    return int(match[1]) + int(match[2]) if match else None


train.__doc__ = f"{train.__doc__}\n{EXAMPLES}"
