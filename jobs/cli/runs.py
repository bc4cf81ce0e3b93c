"""``shoal runs``: list runs, show how one went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.jobs.cli.common import RUNS_DIR, Output, OutputOption, RunsDirOption, complete_run, console, emit, grid

if TYPE_CHECKING:
    from shoal.jobs.runs import RunDetails, RunSummary

app = typer.Typer(
    help="List runs, and show how one went.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # Unicode braille: bit of the dot in column, row


@app.command("list")
def list_(runs_dir: RunsDirOption = RUNS_DIR, output: OutputOption = Output.table) -> None:
    """List the runs of a folder, the one that wrote last at the end.

    Examples:

    - `shoal runs list`

    - `SHOAL_RUNS=/scratch/runs shoal runs list -o json`
    """
    from shoal.jobs.runs import list_runs

    runs = list_runs(runs_dir)

    def render() -> None:
        if not runs:
            print(f"no runs in {runs_dir}: shoal train --recipe tiny starts one")
            return
        table = grid("run", "recipe", "step", "loss", "bits/byte", "checkpoint", "updated", right=range(2, 6))
        for run in runs:
            table.add_row(
                run.name, run.recipe or "?", _step(run), _figure(run.loss), _figure(run.bits_per_byte),
                str(run.checkpoints[-1]) if run.checkpoints else "-", _when(run.updated),
            )  # fmt: skip
        console().print(table)

    emit(runs, output, render)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Its folder, or its name.", autocompletion=complete_run)],
    runs_dir: RunsDirOption = RUNS_DIR,
    output: OutputOption = Output.table,
) -> None:
    """Show a run: its loss curve, validations, events, checkpoints.

    Examples:

    - `shoal runs show tiny`

    - `shoal runs show tiny -o json`
    """
    from shoal.jobs.runs import show_run

    run = show_run(runs_dir, name)
    emit(run, output, lambda: _render(run))


def plot(points: Sequence[tuple[int, float]], width: int = 64, height: int = 10) -> list[str]:
    """A curve in braille dots, two by four a character, with its range on the axes; points of a column are averaged.

    points: ``(x, y)`` with finite y, x ascending. Empty without points.
    """
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    columns: list[list[float]] = [[] for _ in range(2 * width)]
    for x, y in points:
        columns[(2 * width - 1) * (x - first) // max(1, last - first)].append(y)
    means = [(column, math.fsum(ys) / len(ys)) for column, ys in enumerate(columns) if ys]
    low, high = min(y for _, y in means), max(y for _, y in means)
    cells = [[0] * width for _ in range(height)]
    for column, y in means:
        row = round((4 * height - 1) * (high - y) / (high - low)) if high > low else 4 * height - 1
        cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
    labels = [f"{high:.3f}", *[""] * (height - 2), f"{low:.3f}"]
    margin = max(map(len, labels))
    lines = [
        f"{label:>{margin}} │" + "".join(chr(0x2800 + cell) for cell in row)
        for label, row in zip(labels, cells, strict=True)
    ]
    axis = f"{first:<{width // 2}}{last:>{width - width // 2}}"
    return [*lines, " " * margin + " └" + "─" * width, " " * margin + "  " + axis]


def _render(run: RunDetails) -> None:
    out, summary = console(), run.summary
    out.print(f"{summary.name}  recipe {summary.recipe or '?'}, step {_step(summary)}, {run.folder}", style="bold")
    for line in plot(run.curve):
        out.print(line)
    facts = [
        ("training loss", _figure(summary.loss)),
        ("tokens", f"{run.tokens:,}" if run.tokens is not None else "-"),
        ("tokens/s", f"{run.tokens_per_second:,.0f}" if run.tokens_per_second is not None else "-"),
        ("expert imbalance", _figure(run.expert_imbalance)),
        *([("dispatch", run.dispatch)] if run.dispatch else []),
        ("checkpoints", _checkpoints(summary)),
        ("plots", ", ".join(run.plots) or "-"),
        ("updated", _when(summary.updated)),
    ]
    for name, value in facts:
        out.print(f"{name:17} {value}", soft_wrap=True)
    if run.evals:
        keys = ("loss", "bits_per_byte", "unigram_bits_per_byte", "gzip_bits_per_byte")
        table = grid("validation", *(key.replace("_", " ") for key in keys), right=range(5))
        for record in run.evals[-8:]:
            table.add_row(f"step {record['step']}", *(_figure(record.get(key)) for key in keys))
        out.print(table)
    for record in run.events[-8:]:
        out.print(f"step {record['step']:<6} {record.get('event')}: {record.get('text', '')}", soft_wrap=True)
    for line in run.profile:
        out.print(line, soft_wrap=True)


def _step(run: RunSummary) -> str:
    return f"{'-' if run.step is None else run.step}{'' if run.steps is None else f'/{run.steps}'}"


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _checkpoints(run: RunSummary) -> str:
    return ", ".join(str(step) for step in run.checkpoints) or "-"


def _when(updated: str) -> str:
    return datetime.fromisoformat(updated).astimezone().strftime("%Y-%m-%d %H:%M")
