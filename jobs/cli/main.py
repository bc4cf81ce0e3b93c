"""``shoal``: the command line's entry. A command's module is imported when the command is called, not before."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core

import shoal
from shoal.jobs.cli.common import exit_codes

TRAIN, CLUSTER, PREPARE, LOOK = "Train and use a model", "Use a cluster", "Prepare", "Look"


@dataclass(frozen=True)
class Lazy:
    """A command that is not imported yet: ``target`` is ``module:attribute``, a Typer app or a function."""

    target: str
    help: str
    panel: str

    def load(self, name: str) -> Any:
        """Import the module and build the command."""
        module, attribute = self.target.split(":")
        found = getattr(import_module(f"shoal.jobs.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            command: Any = typer.main.get_group(found)
        else:
            single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
            single.command(name)(found)
            command = typer.main.get_command(single)
        command.name = name
        return command


COMMANDS = {
    "train": Lazy("train:train", "Train a model from a recipe, or resume a run.", TRAIN),
    "generate": Lazy("generate:generate", "Continue a text with a trained model.", TRAIN),
    "serve": Lazy("serve:serve", "Serve a trained model over HTTP and gRPC.", TRAIN),
    "evaluate": Lazy("evaluate:evaluate", "Measure a trained model in bits per byte.", TRAIN),
    "import": Lazy("hf:importing", "Make a run of a published model.", TRAIN),
    "export": Lazy("hf:export", "Write a trained model as Hugging Face keeps it.", TRAIN),
    "job": Lazy("job:app", "Run jobs on a Kubernetes cluster, or on a Ray cluster.", CLUSTER),
    "data": Lazy("data:app", "Prepare, show and verify corpora.", PREPARE),
    "config": Lazy("config:app", "Show and check recipes, with what they cost.", PREPARE),
    "doctor": Lazy("doctor:doctor", "Say what this machine can do, what is missing, how to get it.", PREPARE),
    "runs": Lazy("runs:app", "List runs, and show how one went.", LOOK),
    "bench": Lazy("bench:app", "Run a benchmark and write its results.", LOOK),
}


class LazyGroup(typer.core.TyperGroup):
    """Lists all commands from their one line of help; imports only the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The called command, imported; nothing that goes wrong in its module is hidden."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, COMMANDS[name].load(name) if name in COMMANDS else command, rest


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"shoal {shoal.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train and serve DeepSeekMoE language models with Native Sparse Attention, as one Ray application.

    Examples:

    - `shoal doctor` says whether this machine can train

    - `shoal config show nsa-27b` prints a recipe and what it costs

    - `shoal train --recipe tiny --name first` trains on this machine

    - `shoal train --recipe tiny --workers 4 --set train.steps=1000`

    - `shoal generate first --prompt "def main("` continues a text

    - `shoal import hf deepseek-moe-16b-base --name deepseek` makes a run of a checkpoint from Hugging Face

    - `shoal serve first` answers over HTTP, as OpenAI's API, and gRPC

    - `shoal job submit train --recipe deepseekmoe-2b --gpus-per-node 8 --volume runs:/mnt/shoal`

    - `shoal runs show first -o json` prints how the run went

    Exit codes: 0 ok, 1 failed, 2 usage, 3 invalid input, 4 refused by the cluster, 5 not found, 124 timed out,
    130 interrupted.
    """


def _stub() -> None:
    """Stands for a command in the list of commands."""


for _name, _lazy in COMMANDS.items():
    app.command(_name, help=_lazy.help, rich_help_panel=_lazy.panel)(_stub)


def main() -> None:
    """The entry point of the ``shoal`` script."""
    with exit_codes():
        app(prog_name="shoal")


if __name__ == "__main__":
    main()
