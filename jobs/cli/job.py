"""``shoal job``: training, evaluation, generation and service as jobs of KubeRay on a Kubernetes cluster."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from shoal.jobs.cli.common import Output, OutputOption, emit
from shoal.jobs.cli.job_kinds import KINDS
from shoal.jobs.cli.job_options import command
from shoal.jobs.cli.job_verbs import ContextOption, NamespaceOption, TimeoutOption, register, wait_for
from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.work import Work

EXAMPLES = """Run jobs on a Kubernetes cluster, through KubeRay (1.4 or later).

Examples:

  shoal job render train --recipe tiny --gpus-per-node 0 --volume runs:/mnt/shoal

  shoal job submit train --recipe deepseekmoe-16b --nodes 2 --gpus-per-node 8 --volume runs:/mnt/shoal --wait

  shoal job submit serve first --volume runs:/mnt/shoal --secret SHOAL_API_TOKEN=tokens:api

  shoal job list; shoal job status NAME; shoal job logs -f NAME; shoal job wait NAME

  shoal job resubmit NAME --from-checkpoint

`wait` and `submit --wait` exit with the job's own exit code.
"""

app = typer.Typer(no_args_is_help=True, help=EXAMPLES)
render = typer.Typer(no_args_is_help=True, help="Print a job's manifest, checked; no cluster is asked.")
submit = typer.Typer(no_args_is_help=True, help="Submit a job, or with --dry-run only have it checked.")
app.add_typer(render, name="render")
app.add_typer(submit, name="submit")


class Format(StrEnum):
    """How a manifest is printed."""

    yaml = "yaml"
    json = "json"


class DryRun(StrEnum):
    """Who checks a job that is not submitted."""

    client = "client"
    server = "server"


def _say(said: str) -> None:
    typer.echo(said, err=True)


def _render(
    work: Work,
    options: JobOptions,
    namespace: NamespaceOption = None,
    format: Annotated[Format, typer.Option("--format", "-o", help="How to print it.")] = Format.yaml,
) -> None:
    from shoal.jobs.kube.manifest import checked_objects, to_text

    print(to_text(checked_objects(work, options, namespace, _say), format is Format.json))


def _submit(
    work: Work,
    options: JobOptions,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    dry_run: Annotated[
        DryRun | None, typer.Option(help="client: print the manifest; server: have the API server check it as well.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and exit with the job's exit code.")] = False,
    timeout: TimeoutOption = None,
    format: OutputOption = Output.table,
) -> None:
    from shoal.jobs.kube.manifest import checked_objects, to_text
    from shoal.workers.errors import UsageError

    if wait and dry_run:
        raise UsageError("--wait waits for a job, and --dry-run submits none: leave one of them out")
    if timeout is not None and not wait:
        raise UsageError("--timeout is how long --wait waits: add --wait, or leave it out")
    if wait and work.kind == "serve":
        raise UsageError("--wait waits for an end, and a service has none: leave it out; `shoal job status` shows it")
    objects = checked_objects(work, options, namespace, _say)
    if dry_run is DryRun.client:
        print(to_text(objects, format is Output.json))
        return
    from shoal.jobs.kube.api import Cluster
    from shoal.jobs.kube.submit import submit as send

    cluster = Cluster(context, namespace)
    created = send(cluster, objects, dry=dry_run is DryRun.server)
    name, where = created["metadata"]["name"], created["metadata"]["namespace"]
    done = "would be submitted" if dry_run else "submitted"
    facts = {"name": name, "namespace": where, "kind": work.kind, "run": work.run, "dry_run": dry_run is not None}
    more = "" if dry_run else f": `shoal job status {name}`, `shoal job logs -f {name}`"

    def say() -> None:
        typer.echo(f"{name} {done} to namespace {where}{more}")

    if wait:
        if format is Output.table:
            say()
        wait_for(cluster, name, timeout, format)
        return
    emit(facts, format, say)


def _add(group: typer.Typer, finish: Any) -> None:
    for name, kind in KINDS.items():
        group.command(name)(command(kind, finish))


_add(render, _render)
_add(submit, _submit)
register(app)
