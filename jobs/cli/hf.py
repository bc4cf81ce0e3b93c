"""``shoal import`` and ``shoal export``: models as Hugging Face keeps them."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shoal.jobs.cli.common import (
    RUNS_DIR,
    Output,
    OutputOption,
    RunArgument,
    RunsDirOption,
    SetOption,
    StepOption,
    complete_recipe,
    console,
    emit,
    open_told,
)

importing = typer.Typer(
    help="Make a run of a published model.", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown"
)


class Format(StrEnum):
    """What a model is exported as."""

    hf = "hf"


@importing.command("hf")
def import_hf(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A checkpoint's folder: config.json, safetensors, tokenizer.json.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the folder's.")] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", help="What config.json does not say (training).", autocompletion=complete_recipe
        ),
    ] = "deepseekmoe-16b",
    sets: SetOption = None,
    runs_dir: RunsDirOption = RUNS_DIR,
    output: OutputOption = Output.table,
) -> None:
    """Make a run of a DeepSeekMoE checkpoint from Hugging Face, such as deepseek-ai/deepseek-moe-16b-base.

    The weights keep their bits, unless `--set train.dtype` gives them another dtype. With `--set attention.kind=nsa`
    each branch begins with the checkpoint's keys and values, and φ and gates are drawn: train it before you use it.

    Examples:

    - `shoal import hf deepseek-moe-16b-base --name deepseek`

    - `shoal import hf deepseek-moe-16b-base --name sparse --set attention.kind=nsa`
    """
    from shoal.jobs.hf.importing import import_folder

    made = import_folder(folder, runs_dir, name, recipe, sets or ())

    def table() -> None:
        what = f"{made.parameters:,} parameters, {made.dtype}, {made.bytes / 1e6:,.0f} MB"
        hint = f"use it: shoal generate {made.run} --prompt 'Attention is'"
        if made.drawn:
            hint = f"{made.drawn} tensors are not in the checkpoint and were drawn: train the model before you use it"
        console().print(f"{made.run}: {what}\n{hint}", soft_wrap=True)

    emit({**asdict(made), "run": str(made.run)}, output, table)


def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", help="The folder to make.")],
    form: Annotated[Format, typer.Option("--format", help="hf: Hugging Face's DeepseekForCausalLM.")] = Format.hf,
    step: StepOption = None,
    runs_dir: RunsDirOption = RUNS_DIR,
    output: OutputOption = Output.table,
) -> None:
    """Write a trained model as Hugging Face keeps it.

    Full attention with softmax routing has words in that format; what has none is refused. The folder appears whole or
    not at all. Its model is DeepSeek's own code on the Hub: load it with `trust_remote_code=True`.

    Example: `shoal export mine --to mine-hf`
    """
    from shoal.jobs.hf.exporting import export_run

    folder, chosen = open_told(run, runs_dir, step)
    made = export_run(folder, chosen, to)
    for note in made.notes:
        typer.echo(note, err=True)

    def table() -> None:
        what = f"{made.parameters:,} parameters, {made.dtype}, {made.bytes / 1e6:,.0f} MB in {made.files} files"
        console().print(f"{made.folder}: step {made.step} of {run}, {what}", soft_wrap=True)

    emit({**asdict(made), "folder": str(made.folder), "format": form.value}, output, table)
