"""``shoal evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal.jobs.cli.common import (
    RUNS_DIR,
    Output,
    OutputOption,
    RunArgument,
    RunsDirOption,
    StepOption,
    console,
    emit,
    grid,
    open_told,
)


def evaluate(
    run: RunArgument,
    tokens: Annotated[int | None, typer.Option(min=1, help="Validation tokens; default: the recipe's.")] = None,
    data: Annotated[str | None, typer.Option(help="Another corpus folder, of the same tokenizer.")] = None,
    step: StepOption = None,
    runs_dir: RunsDirOption = RUNS_DIR,
    output: OutputOption = Output.table,
) -> None:
    """Measure a trained model in bits per byte, beside unigram and gzip on the same text.

    Examples:

    - `shoal evaluate tiny`

    - `shoal evaluate runs/tiny --tokens 1000000 -o json`
    """
    from shoal.jobs.data.baselines import baselines
    from shoal.jobs.evaluate import evaluate_model
    from shoal.jobs.load import load_trained
    from shoal.workers.errors import NotFound

    folder, chosen = open_told(run, runs_dir, step)
    if data is None and folder.source and not folder.corpus().exists():
        raise NotFound(f"{run} was trained on {folder.corpus()}, which is not here: add --data with a folder of it")
    trained = load_trained(folder, chosen)
    corpus = Path(data) if data else trained.corpus
    with _progress(output) as told:
        result = evaluate_model(trained, corpus, tokens or trained.recipe.train.eval_tokens, told)
    beside = baselines(corpus, tokens or trained.recipe.train.eval_tokens)
    bits = {k: v for k, v in asdict(beside).items() if k.endswith("bits_per_byte")}
    facts = {"run": folder.source or str(folder.path), "step": chosen, **result, **bits}

    def table() -> None:
        rows = [
            ("loss", f"{result['loss']:.4f} nats a token"),
            ("bits per byte", f"{result['bits_per_byte']:.4f}"),
            ("unigram", f"{bits['unigram_bits_per_byte']:.4f} bits per byte"),
            ("gzip -9", f"{bits['gzip_bits_per_byte']:.4f} bits per byte"),
            ("text", f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, {beside.documents} documents"),
            ("checkpoint", f"step {chosen} of {folder.source or folder.path}"),
        ]
        lines = grid()
        for row in rows:
            lines.add_row(*row)
        console().print(lines)

    emit(facts, output, table)


@contextmanager
def _progress(output: Output) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere: standard output stays clean for JSON."""
    from rich.console import Console
    from rich.progress import Progress

    terminal = Console(stderr=True)
    shown = terminal.is_terminal and output is Output.table
    with Progress(console=terminal, transient=True, disable=not shown) as bar:
        task = bar.add_task("evaluate")
        yield lambda done, total: bar.update(task, completed=done, total=total)
