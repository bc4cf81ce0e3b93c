"""``shoal serve``."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.jobs.cli.common import (
    RUNS_DIR,
    PlacementOption,
    RunArgument,
    RunsDirOption,
    SetOption,
    StepOption,
    WorkersOption,
    open_told,
)
from shoal.workers.errors import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from shoal.cluster.serving import Listen
    from shoal.jobs.serve.client import ModelInfo

# What starts the engines, as ``module:function``; see jobs/serve/app.py.
ENGINES = "shoal.jobs.serve.engines:open_engines"
NEEDS = ("fastapi", "uvicorn", "grpc", "grpc_health", "grpc_reflection")

HostOption = Annotated[str, typer.Option(help="Address to listen on; all but loopback want a token and TLS.")]
TokensOption = Annotated[
    Path | None, typer.Option(help="A file of bearer tokens, one a line; default: SHOAL_API_TOKEN, else none.")
]

EXAMPLES = """
Examples:

- `shoal serve tiny`

- `shoal serve runs/tiny --step 200 --port 8080 --grpc-port 9090`

- `shoal serve tiny --host 0.0.0.0 --token-file token.txt --tls-cert cert.pem --tls-key key.pem`
"""


def serve(
    run: RunArgument,
    step: StepOption = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="gRPC.")] = 9000,
    token_file: TokensOption = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM, no passphrase).")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Open to others without a token or TLS.")] = False,
    name: Annotated[str | None, typer.Option(help="Model name that clients use; default: the run's.")] = None,
    workers: WorkersOption = None,
    placement: PlacementOption = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that requests have to end when stopped.")] = 30.0,
    sets: SetOption = None,
    runs_dir: RunsDirOption = RUNS_DIR,
) -> None:
    """Serve a trained model over HTTP and gRPC: here, or in the Ray cluster that RAY_ADDRESS names.

    HTTP is OpenAI's API; gRPC describes itself. SIGTERM and Ctrl-C let requests under way end; a second one does not.
    """
    _check_installed()
    from shoal.cluster.serving import Listen
    from shoal.jobs.cli.lasting import Lasting
    from shoal.jobs.load import serving_recipe
    from shoal.jobs.serve.gate import Settings
    from shoal.jobs.serve.service import read_tokens, run_service

    tokens = read_tokens(token_file)
    listen = Listen(host, port, grpc_port, *(path and path.resolve() for path in (tls_cert, tls_key)))
    listen.check(bool(tokens), insecure)
    folder, chosen = open_told(run, runs_dir, step)
    recipe = serving_recipe(folder, sets, workers, placement)
    console = Lasting(markup=False, highlight=False, soft_wrap=True)
    options = {"run": folder.place, "step": chosen, "name": name or folder.name, "recipe": recipe.model_dump()}
    console.print(f"loading  {options['name']}: step {chosen}")
    ended = run_service(
        ENGINES, options, listen, Settings(tokens=tokens), ranks=recipe.parallel.ranks,
        ready=partial(_tell, console, listen, bool(tokens)), told=console.print, drain=drain,
    )  # fmt: skip
    if ended == signal.SIGINT:
        raise typer.Exit(INTERRUPTED)


def _tell(console: Console, listen: Listen, token: bool, model: ModelInfo) -> None:
    """Says that the service answers, where, and how to ask. token: whether it wants one."""
    from shoal.jobs.serve.service import examples

    console.print(
        f"serving  {model.name}: step {model.step}, {model.parameters:,} parameters, context {model.context:,}"
    )
    console.print(f"http     {listen.url}/v1\ngrpc     {listen.grpc}")
    console.print("try      {}\n         {}".format(*examples(listen, model.name, token)))


def _check_installed() -> None:
    from importlib.util import find_spec

    from shoal.workers.errors import InvalidInput

    missing = [package for package in NEEDS if find_spec(package) is None]
    if missing:
        raise InvalidInput(f"shoal serve needs {', '.join(missing)}, not installed here: pip install 'shoal[serve]'")


serve.__doc__ = f"{serve.__doc__}\n{EXAMPLES}"
