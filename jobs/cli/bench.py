"""``shoal bench``: run a benchmark and write its results."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from shoal.jobs.bench.registry import BENCHMARKS, Settings, measure
from shoal.jobs.bench.result import table, write
from shoal.jobs.cli.common import Output, OutputOption, console, emit, grid
from shoal.workers.machine import cores

app = typer.Typer(
    help="Run a benchmark and write its results.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

EXAMPLES = """
Examples:

- `shoal bench {name}`

- `shoal bench {name} --repeats 1 --out scratch -o json`
"""


@app.command("list")
def list_(output: OutputOption = Output.table) -> None:
    """List the benchmarks.

    Examples:

    - `shoal bench list -o json`
    """
    known = {name: about for name, (_, about) in BENCHMARKS.items()}

    def render() -> None:
        out = grid("benchmark", "what it measures")
        for name, about in known.items():
            out.add_row(name, about)
        console().print(out)

    emit(known, output, render)


def _command(name: str) -> Callable[..., None]:
    def bench(
        out: Annotated[Path, typer.Option(help="Folder for NAME.json.")] = Path("benchmarks/results"),
        repeats: Annotated[int | None, typer.Option(min=1, help="How often to measure; medians are reported.")] = None,
        steps: Annotated[int | None, typer.Option(min=1, help="Steps trained, where a benchmark trains.")] = None,
        data_dir: Annotated[Path, typer.Option(help="Where prepared corpora lie.")] = Path("data"),
        output: OutputOption = Output.table,
    ) -> None:
        _warn_when_busy()
        result = measure(name, Settings(data_dir, repeats, steps, _say))
        path = write(result, out)
        emit(result, output, lambda: console().print(table(result)))
        _say(f"written to {path}")

    bench.__doc__ = f"{BENCHMARKS[name][1]}\n{EXAMPLES.format(name=name)}"
    return bench


for _name in BENCHMARKS:
    app.command(_name)(_command(_name))


def _warn_when_busy() -> None:
    load = os.getloadavg()[0]
    if load > cores():
        _say(f"warning: the load average is {load:.1f} on {cores()} cores: others slow down what is measured")


def _say(text: str) -> None:
    typer.echo(text, err=True)
