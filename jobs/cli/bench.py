"""``shoal bench``: run a benchmark and write its results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from shoal.jobs.bench.ending import cut_in_order, report
from shoal.jobs.bench.registry import BENCHMARKS, PARTS, Settings, draw, measure, numbers_of, parts_of
from shoal.jobs.bench.result import Document, table
from shoal.jobs.cli.common import (
    RUNS_DIR,
    DataDirOption,
    Output,
    OutputOption,
    RunsDirOption,
    SetOption,
    TemperatureOption,
    complete_run,
    console,
    emit,
    grid,
)
from shoal.workers.errors import UsageError
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

_PARTS_HELP = "Only these, with commas between, where a benchmark has parts: " + "; ".join(
    f"{name} has {', '.join(parts)}" for name, parts in PARTS.items()
)


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
        data_dir: DataDirOption = Path("data"),
        plots: Annotated[Path, typer.Option(help="Folder for a picture, where one is drawn.")] = Path("benchmarks"),
        parts: Annotated[str, typer.Option(help=_PARTS_HELP)] = "",
        output: OutputOption = Output.table,
    ) -> None:
        settings = Settings(data_dir, repeats, steps, _say, parts_of(name, parts))

        def show(result: Document, path: Path) -> None:
            picture = draw(name, result, plots)
            emit(result, output, lambda: console().print(table(result)))
            _say(f"written to {path}" + (f" and {picture}" if picture else ""))

        _measured(name, settings, out, show)

    some = f"\n- `shoal bench {name} --parts {','.join(PARTS[name][-2:])}`\n" if name in PARTS else ""
    bench.__doc__ = f"{BENCHMARKS[name][1]}\n{EXAMPLES.format(name=name)}{some}"
    return bench


@app.command("serve")
def serve(
    run: Annotated[
        str | None, typer.Argument(help="A run to serve: its folder, or its name.", autocompletion=complete_run)
    ] = None,
    url: Annotated[str | None, typer.Option(help="Ask this server (http://HOST:PORT/v1) instead.")] = None,
    model: Annotated[str | None, typer.Option(help="The model to ask for; default: the server's first.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="A file with the bearer token.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, one load after another.")] = "",
    rate: Annotated[str, typer.Option(help="Requests a second, at random times (Poisson).")] = "",
    mix: Annotated[str, typer.Option(help="PROMPT:OUTPUT*WEIGHT tokens, several with commas.")] = "64:32*3,256:64*1",
    text: Annotated[Path | None, typer.Option(help="Cut prompts from this file; default: the run's text.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests of each load.")] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Seconds of each load; default: 20.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Requests before each load, not counted.")] = None,
    temperature: TemperatureOption = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same requests at the same times.")] = 0,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also measure one request at a time, plainly.")] = False,
    against: Annotated[str | None, typer.Option(help="Another run: measured in the same way, and compared.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ranks to serve on, as of shoal serve.")] = None,
    placement: Annotated[str | None, typer.Option(help="Where they are, as of shoal serve.")] = None,
    sets: SetOption = None,
    out: Annotated[Path, typer.Option(help="Folder for serve.json.")] = Path("benchmarks/results"),
    plot: Annotated[Path, typer.Option(help="The picture to draw.")] = Path("benchmarks/serve.png"),
    runs_dir: RunsDirOption = RUNS_DIR,
    output: OutputOption = Output.table,
) -> None:
    """Latencies and tokens/s of a server, under one load after another.

    Without --concurrency and --rate the loads are 1, 4, 16 and 64 requests at once.

    Examples:

    - `shoal bench serve tiny --baseline`

    - `shoal bench serve mine --against mine-full --workers 2 --placement 1A:1F`

    - `shoal bench serve --url http://127.0.0.1:8000/v1 --concurrency 1,8 --rate 2,4 --mix 512:64 --duration 60`
    """
    from shoal.jobs.bench import serve_view
    from shoal.jobs.bench.load import Limits, parse_mix
    from shoal.jobs.bench.serve import LIMITS, Level, ServeSettings

    levels = [Level(concurrency=n) for n in numbers_of(int, "--concurrency", concurrency)]
    levels += [Level(rate=n) for n in numbers_of(float, "--rate", rate)]
    settings = ServeSettings(
        say=_say, run=run, runs_dir=runs_dir, url=url, model=model, token_file=token_file, mix=parse_mix(mix),
        text=text, limits=Limits(requests, duration) if duration or requests else LIMITS, warmup=warmup,
        temperature=temperature, seed=seed, baseline=baseline, levels=tuple(levels) or ServeSettings.levels,
        against=against, options=_of_the_server(run, workers, placement, sets or ()),
    )  # fmt: skip

    def show(result: Document, path: Path) -> None:
        picture = plot.with_stem(plot.stem + result["benchmark"].removeprefix("serve"))  # of a part, another one
        serve_view.draw(result, picture)
        emit(result, output, lambda: console().print(serve_view.table(result)))
        _say(f"written to {path} and {picture}")

    _measured("serve", settings, out, show)


def _measured(name: str, settings: Settings, out: Path, show: Callable[[Document, Path], None]) -> None:
    """Measures, writes and shows; what is cut off is told with what there is."""
    _warn_when_busy()
    with cut_in_order():
        result = measure(name, settings)
        report(result, out, lambda path: show(result, path))


def _of_the_server(run: str | None, workers: int | None, placement: str | None, sets: Sequence[str]) -> tuple[str, ...]:
    """Options of ``shoal serve`` for the server that is started. Raises UsageError where none is."""
    options = [f"--{key}={value}" for key, value in (("workers", workers), ("placement", placement)) if value]
    options += [f"--set={pair}" for pair in sets]
    if options and not run:
        raise UsageError(f"{options[0]} is for a server that is started here: name the run to serve")
    return tuple(options)


for _name in BENCHMARKS:
    if _name != "serve":  # it has options of its own
        app.command(_name)(_command(_name))


def _warn_when_busy() -> None:
    load = os.getloadavg()[0]
    if load > cores():
        _say(f"warning: the load average is {load:.1f} on {cores()} cores: others slow down what is measured")


def _say(text: str) -> None:
    typer.echo(text, err=True)
