"""``shoal job``: training, evaluation, generation and service as jobs of KubeRay on a Kubernetes cluster."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from shoal.jobs.cli.job_kinds import KINDS
from shoal.jobs.cli.job_options import command
from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.work import Work

app = typer.Typer(no_args_is_help=True, help="Run jobs on a Kubernetes cluster, through KubeRay.")
render = typer.Typer(no_args_is_help=True, help="Print a job's manifest, checked; no cluster is asked.")
app.add_typer(render, name="render")


class Format(StrEnum):
    """How a manifest is printed."""

    yaml = "yaml"
    json = "json"


NamespaceOption = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; default: the context's.")]


def _render(
    work: Work,
    options: JobOptions,
    namespace: NamespaceOption = None,
    format: Annotated[Format, typer.Option("--format", "-o", help="How to print it.")] = Format.yaml,
) -> None:
    from shoal.jobs.kube.manifest import checked_objects, to_text

    print(to_text(checked_objects(work, options, namespace), format is Format.json))


for _name, _kind in KINDS.items():
    render.command(_name)(command(_kind, _render))
