"""``shoal doctor``."""

from __future__ import annotations

import typer

from shoal.jobs.cli.common import RUNS_DIR, Output, OutputOption, RunsDirOption, console, emit, grid

COLORS = {"ok": "green", "warn": "yellow", "missing": "red"}
CANNOT_TRAIN = 3


def doctor(runs_dir: RunsDirOption = RUNS_DIR, output: OutputOption = Output.table) -> None:
    """Say what this machine can do, what is missing, how to get it; exit code 3 if it cannot train.

    Examples:

    - `shoal doctor`

    - `shoal doctor --runs-dir /scratch/runs -o json`
    """
    from rich.text import Text

    from shoal.jobs.doctor import can_train, examine

    checks = examine(runs_dir)
    able = can_train(checks)

    def render() -> None:
        table = grid("", "", "found", "remedy")
        for check in checks:
            table.add_row(Text(check.status, style=COLORS[check.status]), check.name, check.found, check.remedy)
        console().print(table)
        print("training works here" if able else "training is impossible here until what is missing is there")

    emit({"can_train": able, "checks": checks}, output, render)
    if not able:
        raise typer.Exit(CANNOT_TRAIN)
