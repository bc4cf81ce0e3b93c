"""The service as Ray Serve deploys it from a configuration, such as a RayService's ``serveConfigV2``."""

# No `from __future__ import annotations`: Ray Serve looks at the annotation of `args`, which must be the class itself.
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from shoal.cluster.serving import Listen
from shoal.jobs.load import open_run, serving_recipe
from shoal.jobs.serve.app import serve_application
from shoal.jobs.serve.gate import Settings
from shoal.jobs.serve.service import TOKEN, read_tokens
from shoal.workers.errors import InvalidInput

ENGINES = "shoal.jobs.serve.engines:open_engines"


class Arguments(BaseModel):
    """``args`` of the configuration. run, runs_dir: as for ``shoal serve``. workers, placement: of its ranks."""

    model_config = ConfigDict(extra="forbid")

    run: str
    runs_dir: str = "runs"
    step: int | None = None
    name: str | None = None
    workers: int | None = None
    placement: str | None = None
    insecure: bool = False
    grpc_port: int = 9000


def application(args: Arguments) -> Any:
    """Ray Serve calls this with ``args``, and runs what it gives. The token is the variable SHOAL_API_TOKEN's.

    Raises ShoalError for a run that cannot be served, or a service that would be open without being meant to.
    """
    tokens = read_tokens(None)
    if tokens is None and not args.insecure:
        raise InvalidInput(f"{TOKEN} is not set: set it from a Secret, or insecure: true in args")
    folder, step, _ = open_run(args.run, Path(args.runs_dir), args.step)
    recipe = serving_recipe(folder, None, args.workers, args.placement)
    options = {
        "run": folder.place,
        "step": step,
        "name": args.name or folder.name,
        "recipe": recipe.model_dump(),
    }
    return serve_application(ENGINES, options, Listen("0.0.0.0", grpc_port=args.grpc_port), Settings(tokens=tokens))
