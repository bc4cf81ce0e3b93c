"""Where jobs are: a namespace of a Kubernetes cluster, or a Ray cluster that runs already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from shoal.workers.errors import UsageError

if TYPE_CHECKING:
    from shoal.jobs.kube.status import Status

ContextOption = Annotated[str | None, typer.Option(help="Context of the kubeconfig; default: its current one.")]
NamespaceOption = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; default: the context's.")]
RayAddressOption = Annotated[
    str | None, typer.Option(help="Address of a running Ray's dashboard, such as http://head:8265: no Kubernetes.")
]


class Place(Protocol):
    """What the verbs of ``shoal job`` do. All raise ShoalError."""

    def hint(self, command: str) -> str:
        """A ``shoal job`` command about this place, to be shown to a person."""

    def jobs(self, everything: bool) -> list[Status]:
        """Jobs that Shoal submitted, newest first. everything: those of others too."""

    def status(self, name: str) -> Status:
        """A job, with the reasons why it waits."""

    def logs(
        self,
        name: str,
        write: Callable[[bytes], object],
        follow: bool,
        tail: int | None,
        told: Callable[[str], None],
    ) -> None:
        """Writes a job's log by lines. told: is given sentences on why there is none yet."""

    def wait(self, name: str, timeout: float | None, told: Callable[[Status], None]) -> tuple[Status, int]:
        """How a job ended, and its exit code. told: is given the status whenever its phase changes."""

    def cancel(self, name: str) -> str:
        """Ends a job; returns what was done."""

    def delete(self, names: Sequence[str], said: Callable[[str], None]) -> None:
        """Removes jobs, once all are known. said: is given a sentence for each."""

    def resubmit(self, name: str, new_name: str | None, from_checkpoint: bool) -> Status:
        """Submits a job again."""


def place_of(context: str | None, namespace: str | None, ray_address: str | None) -> Place:
    """The place that the options name. Raises UsageError for options of both, and what the place itself refuses."""
    if ray_address is None:
        from shoal.jobs.kube.place import Namespace

        return Namespace(context, namespace)
    refuse_kubernetes(context, namespace)
    from shoal.jobs.ray_jobs.place import RunningRay

    return RunningRay(ray_address)


def refuse_kubernetes(context: str | None, namespace: str | None) -> None:
    """Refuses, beside ``--ray-address``, what would name a Kubernetes cluster."""
    for name, value in (("--context", context), ("--namespace", namespace)):
        if value is not None:
            raise UsageError(
                f"{name} is for Kubernetes, and --ray-address names a Ray that runs already: leave one of them out"
            )
