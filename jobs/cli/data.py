"""``shoal data``: prepare, show and verify corpora."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.jobs.cli.common import Output, OutputOption, console, emit, grid
from shoal.workers.errors import InvalidInput, NotFound, UsageError

if TYPE_CHECKING:
    from shoal.jobs.data.prepare import Progress
    from shoal.jobs.data.readers import Source
    from shoal.workers.data.manifest import Manifest

app = typer.Typer(help="Prepare, show and verify corpora.", no_args_is_help=True, rich_markup_mode="markdown")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that shoal data prepare wrote.")]


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Text files, folders, .jsonl, .parquet; or stdlib, shakespeare."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; data/NAME of the first input if not given.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="An existing tokenizer.json; else one is trained here.")
    ] = None,
    vocab: Annotated[
        int | None, typer.Option(help="Vocabulary of the tokenizer trained here; 4096 if not given.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the documents kept for validation.")] = 0.05,
    field: Annotated[str, typer.Option(help="JSONL field or Parquet column that holds the text.")] = "text",
    separator: Annotated[str | None, typer.Option(help="Text that ends a document inside a text file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a corpus that is there already.")] = False,
    output: OutputOption = Output.table,
) -> None:
    """Tokenise INPUT to a corpus folder: Parquet files, a tokenizer and a manifest.

    The folder appears whole or not at all. Exact duplicates are dropped; binary, hidden and unreadable files in folders
    are skipped and counted. A document goes to training or validation by its hash, whatever the order of the input.

    Examples:

    - `shoal data prepare ~/src/project --out data/project`

    - `shoal data prepare books.jsonl --field body --vocab 16384`

    - `shoal data prepare stories.txt --separator '<|endoftext|>'`

    - `shoal data prepare a.parquet b.parquet --tokenizer tokenizer.json --out data/ab`
    """
    from shoal.jobs.data.prepare import PrepareOptions
    from shoal.jobs.data.prepare import prepare as run

    if tokenizer and vocab:
        raise UsageError(f"--vocab {vocab} is for a tokenizer trained here, and --tokenizer gives one: leave one out")
    target = out or Path("data") / _name(inputs[0])
    options = PrepareOptions(tokenizer=tokenizer, vocabulary=vocab or 4096, val_fraction=val_fraction)
    sources = _sources(inputs, field, separator, target)
    with _progress(output) as progress:
        manifest = run(sources, target, options, force=force, progress=progress)
    emit({"folder": str(target), **manifest.model_dump(mode="json")}, output, lambda: _print_manifest(target, manifest))


@app.command()
def show(folder: Folder, output: OutputOption = Output.table) -> None:
    """Print what a corpus holds, and the beginning of a document of it.

    Example: `shoal data show data/stdlib -o json`
    """
    from shoal.jobs.data.inspect import sample
    from shoal.workers.data.manifest import read_manifest

    manifest = read_manifest(folder)
    source, text = sample(folder)

    def render() -> None:
        _print_manifest(folder, manifest)
        console().print(f"\nA document of {source} begins:\n\n{text}", soft_wrap=True)

    data = {"folder": str(folder), **manifest.model_dump(mode="json"), "sample": {"source": source, "text": text}}
    emit(data, output, render)


@app.command()
def verify(folder: Folder, output: OutputOption = Output.table) -> None:
    """Hash every file of a corpus and compare it with the manifest; exit code 3 when one is missing or damaged.

    Example: `shoal data verify data/stdlib`
    """
    from shoal.jobs.data.inspect import check_files

    found = check_files(folder)
    bad = [name for name, state in found.items() if state != "ok"]

    def render() -> None:
        for name, state in found.items():
            console().print(f"{state:8} {name}", soft_wrap=True)

    emit({"folder": str(folder), "ok": not bad, "files": found}, output, render)
    if bad:
        raise InvalidInput(f"{folder / bad[0]} is {found[bad[0]]}: restore it or prepare the corpus again")


def _name(first: str) -> str:
    path = Path(first)
    return (path.stem if path.is_file() else path.resolve().name) or "corpus"


def _sources(inputs: list[str], field: str, separator: str | None, target: Path) -> list[Source]:
    """Paths as they are; a built-in corpus where its name is given and no such path exists."""
    from shoal.jobs.data.corpus import BUILT_IN, built_in
    from shoal.jobs.data.readers import ReadOptions, open_inputs

    options = ReadOptions(field=field, separator=separator or None, ignore=(target.resolve(),))
    sources: list[Source] = []
    for entry in inputs:
        if entry in BUILT_IN and not Path(entry).exists():
            sources += built_in(entry)
        elif not entry:
            raise NotFound("an empty INPUT names no file: give a text file, a folder, a .jsonl or a .parquet file")
        else:
            sources += open_inputs([Path(entry)], options)
    return sources


@contextmanager
def _progress(output: Output) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere: standard output stays clean for JSON."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    shown = console.is_terminal and output is Output.table
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("read")

        def update(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=max(done, total) or None)

        yield update


def _print_manifest(folder: Path, manifest: Manifest) -> None:
    table = grid("", "documents", "tokens", "bytes", right=(1, 2, 3))
    for name, totals in (*manifest.splits.items(), *manifest.sources.items()):
        table.add_row(
            name, f"{totals.documents:,}", f"{totals.tokens:,}", f"{totals.bytes:,}", end_section=name == "val"
        )
    entry = manifest.tokenizer
    left_out = {"duplicates": manifest.duplicates, **manifest.skipped}
    added = f", added {', '.join(entry.added)}" if entry.added else ""
    lines = {
        "corpus": folder,
        "hash": manifest.corpus_hash,
        "vocabulary": f"{manifest.vocabulary:,}, tokenizer {'trained here' if entry.trained else 'given'}",
        "specials": f"bos {entry.bos_token} = {entry.bos}, eos {entry.eos_token} = {entry.eos}{added}",
        "left out": ", ".join(f"{count} {why}" for why, count in left_out.items() if count) or "nothing",
    }
    out = console()
    for name, line in lines.items():
        out.print(f"{name:11} {line}", soft_wrap=True)
    out.print()
    out.print(table)
