"""``shoal train``."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.jobs.cli.common import (
    DataDirOption,
    Output,
    OutputOption,
    PlacementOption,
    RunsDirOption,
    SetOption,
    WorkersOption,
    complete_recipe,
    complete_run,
    emit,
)
from shoal.workers.errors import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from shoal.jobs.run_folder import RunFolder
    from shoal.jobs.train import TrainResult

EXAMPLES = """
Examples:

- `shoal train --recipe tiny`

- `shoal train --recipe tiny --workers 4 --placement 2A:2F --name disaggregated`

- `shoal train --recipe my.toml --data data/books --set train.steps=2000 --set moe.top_k=6`

- `shoal train --recipe nsa-64k-small --data data/books --from nsa-8k-small`

- `shoal train --resume --name tiny`
"""


RecipeOrTinyOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", help="A built-in recipe or a TOML file; default: tiny.", autocompletion=complete_recipe
    ),
]
InitialOption = Annotated[
    str | None,
    typer.Option("--from", help="Begin with the weights of this run (train.initial).", autocompletion=complete_run),
]
NameOption = Annotated[
    str | None, typer.Option(help="Name of the run; default: the recipe's, numbered.", autocompletion=complete_run)
]
ENDING = 120.0
"""Seconds that an attempt which is asked to end may take to save, while the next one waits."""

ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run's last good checkpoint.")]
OrResumeOption = Annotated[
    bool,
    typer.Option(
        "--or-resume",
        help="The same where the run exists already, once no other process trains it; else begin it.",
    ),
]


def train(
    recipe: RecipeOrTinyOption = None,
    sets: SetOption = None,
    data: Annotated[str | None, typer.Option(help="Corpus: stdlib, shakespeare, or a prepared folder.")] = None,
    workers: WorkersOption = None,
    placement: PlacementOption = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (train.steps).")] = None,
    initial: InitialOption = None,
    name: NameOption = None,
    resume: ResumeOption = False,
    or_resume: OrResumeOption = False,
    runs_dir: RunsDirOption = Path("runs"),
    data_dir: DataDirOption = Path("data"),
    output: OutputOption = Output.table,
) -> None:
    """Train a model from a recipe, or resume a run: here, or inside the Ray cluster that RAY_ADDRESS names."""
    from shoal.jobs.cli.lasting import Lasting
    from shoal.jobs.recipe import load_recipe
    from shoal.jobs.run_folder import check_same_recipe
    from shoal.jobs.train import train as run_training

    overrides = {
        "data.corpus": data,
        "parallel.ranks": ranks_of(placement) if workers is None else workers,
        "parallel.placement": placement,
        "train.steps": steps,
        "train.initial": initial,
    }
    folder = _begun(runs_dir, name, resume, or_resume)
    checked = load_recipe(recipe or (folder.recipe_file if folder else "tiny"), sets or (), overrides)
    if folder:
        check_same_recipe(folder, checked)
    console = Lasting(stderr=output is not Output.table, markup=False)
    result = run_training(checked, runs_dir, name, folder, data_dir, console)
    facts = {key: value for key, value in asdict(result).items() if key != "prompt"}
    emit(facts, output, lambda: _tell(result, console))
    if result.stopped:
        raise typer.Exit(INTERRUPTED)


def _begun(runs_dir: Path, name: str | None, resume: bool, or_resume: bool) -> RunFolder | None:
    """The run to go on with; None for a new one. Raises UsageError, NotFound and InvalidInput."""
    from shoal.jobs.run_folder import RunFolder
    from shoal.workers.errors import UsageError

    if not (resume or or_resume):
        return None
    if name is None:
        which = "--resume" if resume else "--or-resume"
        raise UsageError(f"{which} needs the run's name: add --name NAME; `shoal runs list` shows the runs")
    folder = RunFolder(runs_dir / name)
    if not resume and not folder.recipe_file.exists():
        return None
    folder.recipe()  # refused here if it cannot be gone on with
    if not resume:
        folder.wait_until_free(ENDING, lambda text: typer.echo(text, err=True))
    return folder


def _tell(result: TrainResult, console: Console) -> None:
    """Shows what a run came to."""
    if result.sample:
        console.print(f"\nA sample after step {result.step}:", style="bold")
        console.print(result.prompt + result.sample, highlight=False)
    if not result.stopped:
        console.print(f"\n{result.run}/ holds metrics.jsonl, loss.png, checkpoints/ and TensorBoard events.")
        console.print(f"More text: shoal generate {result.run} --prompt 'class '", highlight=False)


def ranks_of(placement: str | None) -> int | None:
    """The number of ranks that nA:mF names; it need not be repeated by --workers."""
    match = re.fullmatch(r"(\d+)A:(\d+)F", placement or "")
    return int(match[1]) + int(match[2]) if match else None


train.__doc__ = f"{train.__doc__}\n{EXAMPLES}"
