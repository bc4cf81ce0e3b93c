"""What all commands share: options, printing as a table, JSON or YAML, and errors that become exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Container, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from shoal.workers.errors import INTERRUPTED, InvalidInput, ShoalError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shoal.jobs.run_folder import RunFolder

RUNS_DIR = Path("runs")
_LOCKED_OR_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Output(StrEnum):
    """How a command prints its result."""

    table = "table"
    json = "json"
    yaml = "yaml"


def complete_recipe(incomplete: str) -> list[str]:
    """Built-in recipes that begin like this, for shell completion."""
    from shoal.jobs.recipe import builtin_recipes

    return [name for name in builtin_recipes() if name.startswith(incomplete)]


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of runs that begin like this, for shell completion."""
    from shoal.jobs.runs import list_runs

    return [run.name for run in list_runs(ctx.params.get("runs_dir") or RUNS_DIR) if run.name.startswith(incomplete)]


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="A built-in recipe or a TOML file.", autocompletion=complete_recipe)
]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A built-in recipe or a TOML file.", autocompletion=complete_recipe)
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated.")
]
RunArgument = Annotated[
    str, typer.Argument(help="A run's folder, its name, or its URL (s3://…).", autocompletion=complete_run)
]
StepOption = Annotated[int | None, typer.Option(help="Checkpoint; default: the newest whole one.")]
WorkersOption = Annotated[int | None, typer.Option(help="Ranks (parallel.ranks).")]
PlacementOption = Annotated[str | None, typer.Option(help="colocated, or nA:mF, such as 2A:2F.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")]
DataDirOption = Annotated[Path, typer.Option(help="Where prepared corpora lie.")]
RunsDirOption = Annotated[Path, typer.Option("--runs-dir", envvar="SHOAL_RUNS", help="The folder that holds the runs.")]


def open_told(run: str, runs_dir: Path, step: int | None) -> tuple[RunFolder, int]:
    """A run and the checkpoint of it to use, as ``jobs.load.open_run`` has them; says on standard error what is fetched
    and which newer checkpoints are damaged."""
    from shoal.jobs.load import open_run

    folder, chosen, damaged = open_run(run, runs_dir, step, lambda said: typer.echo(said, err=True))
    for sentence in damaged:
        typer.echo(sentence, err=True)
    return folder, chosen


def emit(data: Any, output: Output, render: Callable[[], object]) -> None:
    """Print ``data`` as JSON or YAML, or call ``render``, which prints the same for people.

    Data may hold dataclasses, paths and floats that are not finite; the latter become null, as JSON has none.
    """
    if output is Output.json:
        import json

        print(json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False))
    elif output is Output.yaml:
        import yaml

        print(yaml.safe_dump(_plain(data), sort_keys=False, allow_unicode=True), end="")
    else:
        render()
    sys.stdout.flush()  # a reader that went away is noticed here, not when the interpreter ends


def console() -> Console:
    """A rich console for standard output that takes text literally and, in a pipe, does not cut lines at 80."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(markup=False, highlight=False, emoji=False, width=160 if piped else None)


def grid(*headings: str, right: Container[int] = ()) -> Table:
    """An empty table with these columns; ``right``: indices of those that hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(headings))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    return table


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """End the process with one line on standard error and the exit code of the error.

    ``SHOAL_TRACEBACK=1`` lets an unexpected error through with its traceback.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ShoalError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in _LOCKED_OR_FULL:
            _unexpected(error)
        what = f"{error.filename or 'standard output'} cannot be used ({error.strerror})"
        _say(f"error: {what}: free or unlock its disk, or name another place")
        sys.exit(InvalidInput.exit_code)
    except Exception as error:
        _unexpected(error)


def _unexpected(error: Exception) -> NoReturn:
    """A mistake of the program, not of its user."""
    if os.environ.get("SHOAL_TRACEBACK"):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split())
    _say(f"error: unexpected {what} (SHOAL_TRACEBACK=1 shows where)")
    sys.exit(1)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """``value`` in types that JSON has."""
    import dataclasses
    import math

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
