"""``shoal job``: training, evaluation, generation and service as jobs on Kubernetes, or on a Ray that runs already."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.jobs.cli.common import Output, emit
from shoal.jobs.cli.job_kinds import KINDS
from shoal.jobs.cli.job_options import command
from shoal.jobs.cli.job_place import ContextOption, NamespaceOption, Place, refuse_kubernetes
from shoal.jobs.cli.job_verbs import TimeoutOption, register, wait_for
from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.work import Work

if TYPE_CHECKING:
    from shoal.jobs.kube.status import Status

EXAMPLES = """Run jobs on a Kubernetes cluster, or on a Ray cluster that runs already.

Kubernetes needs KubeRay, 1.4 or later.

Examples:

- `shoal job render train --recipe tiny --gpus-per-node 0 --volume runs:/mnt/shoal`

- `shoal job submit train --recipe deepseekmoe-2b --nodes 2 --gpus-per-node 8 --volume runs:/mnt/shoal --wait`

- `shoal job submit serve first --volume runs:/mnt/shoal --secret SHOAL_API_TOKEN=tokens:api`

- `shoal job list; shoal job status NAME; shoal job logs -f NAME; shoal job wait NAME`

- `shoal job resubmit NAME --from-checkpoint`

- `shoal job submit train --recipe tiny --gpus-per-node 0 --ray-address http://head:8265 --runs-dir /mnt/runs`

`wait` and `submit --wait` exit with the job's own exit code.
"""

app = typer.Typer(no_args_is_help=True, help=EXAMPLES, rich_markup_mode="markdown")
render = typer.Typer(no_args_is_help=True, help="Print a job's manifest, checked; no cluster is asked.")
submit = typer.Typer(no_args_is_help=True, help="Submit a job, or have it checked only (`--dry-run=server`).")
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
    from shoal.workers.errors import UsageError

    if options.ray_address is not None:
        raise UsageError(
            "render writes manifests for Kubernetes, and a Ray cluster takes none: leave --ray-address out, or submit"
        )
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
    format: Annotated[Output, typer.Option("--format", "-o", help="How to print the result.")] = Output.table,
) -> None:
    _check_usage(work, options, dry_run, wait, timeout)
    if dry_run is DryRun.client:
        from shoal.jobs.kube.manifest import checked_objects, to_text

        print(to_text(checked_objects(work, options, namespace, _say), format is Output.json))
        return
    place, found = _submitted(work, options, context, namespace, dry_run)
    name = found.name
    facts = {
        "name": name, "namespace": found.namespace, "kind": work.kind, "run": work.run, "dry_run": dry_run is not None
    }  # fmt: skip

    def say() -> None:
        where = f"namespace {found.namespace}" if found.namespace else str(place)
        if dry_run:
            typer.echo(f"{name} would be submitted to {where}")
        else:
            typer.echo(f"{name} submitted to {where}: {place.hint(f'status {name}')}, {place.hint(f'logs -f {name}')}")

    if wait:
        if format is Output.table:
            say()
        wait_for(place, name, timeout, format)
        return
    emit(facts, format, say)


def _check_usage(work: Work, options: JobOptions, dry_run: DryRun | None, wait: bool, timeout: float | None) -> None:
    """Refuses options that do not go together. Raises UsageError."""
    from shoal.workers.errors import UsageError

    if wait and dry_run:
        raise UsageError("--wait waits for a job, and --dry-run submits none: leave one of them out")
    if timeout is not None and not wait:
        raise UsageError("--timeout is how long --wait waits: add --wait, or leave it out")
    if wait and work.kind == "serve":
        raise UsageError("--wait waits for an end, and a service has none: leave it out; `shoal job status` shows it")
    if options.ray_address is not None and dry_run:
        raise UsageError("--dry-run is for Kubernetes, and Ray's job API has none: leave it or --ray-address out")


def _submitted(
    work: Work, options: JobOptions, context: str | None, namespace: str | None, dry_run: DryRun | None
) -> tuple[Place, Status]:
    if options.ray_address is not None:
        refuse_kubernetes(context, namespace)
        from shoal.jobs.ray_jobs.place import RunningRay

        running = RunningRay(options.ray_address)
        return running, running.submit(work, options, _say)
    from shoal.jobs.kube.place import Namespace

    cluster = Namespace(context, namespace)
    return cluster, cluster.submit(work, options, _say, dry=dry_run is DryRun.server)


def _add(group: typer.Typer, finish: Any) -> None:
    for name, kind in KINDS.items():
        group.command(name)(command(kind, finish))


_add(render, _render)
_add(submit, _submit)
register(app)
