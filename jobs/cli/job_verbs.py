"""The verbs of ``shoal job`` for jobs that are there: list, status, logs, wait, cancel, delete, resubmit, dashboard."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.jobs.cli.common import Output, OutputOption, console, emit, grid
from shoal.jobs.cli.job_place import (
    ContextOption,
    NamespaceOption,
    Place,
    RayAddressOption,
    place_of,
)

if TYPE_CHECKING:
    from shoal.jobs.kube.status import Status

TimeoutOption = Annotated[float | None, typer.Option(min=0, help="Seconds to wait; then exit with 124.")]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The job's name; rayjob/NAME or rayservice/NAME where there are both.")
]
DASHBOARD = 8265


def register(app: typer.Typer) -> None:
    """Adds the verbs to ``shoal job``."""
    app.command("list")(list_jobs)
    for verb in (status, logs, wait, cancel, delete, resubmit, dashboard):
        app.command(verb.__name__)(verb)


def list_jobs(
    everything: Annotated[bool, typer.Option("--all", help="Jobs of others too.")] = False,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    ray_address: RayAddressOption = None,
    output: OutputOption = Output.table,
) -> None:
    """List the jobs of a namespace, or of a Ray cluster, newest first."""
    place = place_of(context, namespace, ray_address)
    found = place.jobs(everything)

    def table() -> None:
        if not found:
            typer.echo(f"no jobs in {place}")
            return
        lines = grid("name", "kind", "phase", "nodes", "queue", "run", "created", right={3})
        for each in found:
            nodes = str(each.nodes or "")
            lines.add_row(each.name, each.kind, each.phase, nodes, each.queue, each.run, each.created)
        console().print(lines)

    emit([_facts(each) for each in found], output, table)


def status(
    name: NameArgument,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    ray_address: RayAddressOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Say where a job stands, and why it waits: for a queue, for nodes, for its image."""
    found = place_of(context, namespace, ray_address).status(name)

    def table() -> None:
        rows = {key: value for key, value in _facts(found).items() if value and key != "reasons"}
        lines = grid()
        for key, value in rows.items():
            lines.add_row(key.replace("_", " "), str(value).strip())
        for reason in found.reasons:
            lines.add_row("why", reason)
        console().print(lines)

    emit(_facts(found), output, table)


def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Begin so many lines before the end.")] = None,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    ray_address: RayAddressOption = None,
) -> None:
    """Print what a job has printed; with -f as it comes, through restarts of the server that tells it."""
    out, said = sys.stdout.buffer, set[str]()

    def write(line: bytes) -> None:
        out.write(line)
        out.flush()

    def told(reason: str) -> None:
        if reason not in said:
            said.add(reason)
            typer.echo(f"waiting: {reason}", err=True)

    place_of(context, namespace, ray_address).logs(name, write, follow, tail, told)


def wait(
    name: NameArgument,
    timeout: TimeoutOption = None,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    ray_address: RayAddressOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Wait for a job's end, and exit with its own exit code."""
    wait_for(place_of(context, namespace, ray_address), name, timeout, output)


def wait_for(place: Place, name: str, timeout: float | None, output: Output) -> None:
    """Waits, says each phase on standard error, and ends the process with the job's exit code."""

    def told(found: Status) -> None:
        typer.echo(f"{name}: {found.phase}", err=True)

    found, code = place.wait(name, timeout, told)

    def say() -> None:
        # the rest of Ray's message is the end of the log
        message = found.message.partition("\n")[0].strip()
        typer.echo(f"{name} {found.phase}, exit code {code}" + (f": {message}" if message and code else ""))

    emit({**_facts(found), "exit_code": code}, output, say)
    if code:
        raise typer.Exit(code)


def cancel(
    name: NameArgument,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    ray_address: RayAddressOption = None,
) -> None:
    """End a job: one that runs saves a checkpoint first. It stays in the list."""
    typer.echo(place_of(context, namespace, ray_address).cancel(name))


def delete(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="Jobs and services.")],
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    ray_address: RayAddressOption = None,
) -> None:
    """Remove jobs and services with their clusters; what they wrote to volumes stays."""
    place_of(context, namespace, ray_address).delete(names, typer.echo)


def resubmit(
    name: NameArgument,
    new_name: Annotated[str | None, typer.Option("--name", help="Of the new job; default: a fresh one.")] = None,
    from_checkpoint: Annotated[
        bool, typer.Option("--from-checkpoint", help="Go on with the old job's run; else begin another run.")
    ] = False,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    ray_address: RayAddressOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Submit a job again as it was, under another name."""
    found = place_of(context, namespace, ray_address).resubmit(name, new_name, from_checkpoint)
    emit(_facts(found), output, lambda: typer.echo(f"{found.name} submitted, for run {found.run}"))


def dashboard(
    name: NameArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: a free one.")] = DASHBOARD,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    ray_address: RayAddressOption = None,
) -> None:
    """Reach a job's Ray dashboard on this machine, until Ctrl-C; a running Ray's own address is only shown."""
    import threading
    import webbrowser

    if ray_address is not None:
        place_of(context, namespace, ray_address).status(name)  # there is such a job, at such an address
        print(f"dashboard  {ray_address}", flush=True)
        if browser:
            webbrowser.open(ray_address)
        return
    from shoal.jobs.kube.forward import forwarded, head_pod
    from shoal.jobs.kube.place import Namespace
    from shoal.jobs.kube.ray_api import cluster_name

    place = Namespace(context, namespace)
    cluster, job = place.cluster, place.job(name)
    said: set[str] = set()

    def told(problem: str) -> None:
        if problem not in said:
            said.add(problem)
            typer.echo(problem, err=True)

    with forwarded(cluster, head_pod(cluster, job), DASHBOARD, port, told) as local:
        address = f"http://127.0.0.1:{local}"
        spec = job["spec"].get("rayClusterSpec") or job["spec"].get("rayClusterConfig") or {}
        options = spec.get("authOptions") or {}
        print(f"dashboard  {address}", flush=True)
        if options.get("mode") == "token":
            secret = options.get("secretName") or cluster_name(job)
            where = f"-n {cluster.namespace} {secret} -o jsonpath={{.data.auth_token}}"
            where += f" --context {shlex.quote(context)}" if context else ""
            print(f"token      kubectl get secret {where} | base64 -d", flush=True)
        if browser:
            webbrowser.open(address)
        # Awake now and then: a signal that another thread was given would not end a wait.
        while not threading.Event().wait(1):
            pass


def _facts(found: Status) -> dict[str, Any]:
    return asdict(found)
