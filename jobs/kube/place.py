"""Jobs of one namespace of a Kubernetes cluster, as ``shoal job`` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.jobs.kube.api import Cluster, Object
from shoal.jobs.kube.ending import wait
from shoal.jobs.kube.logs import logs
from shoal.jobs.kube.manifest import checked_objects
from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.status import Status, explain, summarize
from shoal.jobs.kube.submit import cancel, delete, find_job, is_service, list_jobs, resubmit, submit
from shoal.jobs.kube.work import Work
from shoal.workers.errors import InvalidInput


class Namespace:
    """A ``Place`` of jobs; see ``shoal.jobs.cli.job_place``."""

    def __init__(self, context: str | None, namespace: str | None) -> None:
        """Reads the kubeconfig. Raises InvalidInput, NotFound."""
        self.cluster, self._told = Cluster(context, namespace), namespace

    def __str__(self) -> str:
        return str(self.cluster)

    def hint(self, command: str) -> str:
        """See Place."""
        return self.cluster.hint(command)

    def submit(self, work: Work, options: JobOptions, said: Callable[[str], None], dry: bool = False) -> Status:
        """See Place. dry: the API server only says what it would do."""
        return summarize(submit(self.cluster, checked_objects(work, options, self._told, said), dry))

    def jobs(self, everything: bool) -> list[Status]:
        """See Place."""
        return [summarize(each) for each in list_jobs(self.cluster, everything)]

    def job(self, name: str) -> Object:
        """The RayJob or RayService itself."""
        return find_job(self.cluster, name)

    def status(self, name: str) -> Status:
        """See Place."""
        return explain(self.cluster, self.job(name))

    def logs(
        self,
        name: str,
        write: Callable[[bytes], object],
        follow: bool,
        tail: int | None,
        told: Callable[[str], None],
    ) -> None:
        """See Place."""
        logs(self.cluster, name, write, follow, tail, told)

    def wait(self, name: str, timeout: float | None, told: Callable[[Status], None]) -> tuple[Status, int]:
        """See Place."""
        with self.cluster.limited(timeout):
            job = self.job(name)
        if is_service(job):
            raise InvalidInput(
                f"{name} is a service, which has no end to wait for: {self.hint(f'status {name}')} shows it"
            )
        return wait(self.cluster, job["metadata"]["name"], timeout, told)

    def cancel(self, name: str) -> str:
        """See Place."""
        return cancel(self.cluster, self.job(name))

    def delete(self, names: Sequence[str], said: Callable[[str], None]) -> None:
        """See Place."""
        for job in [self.job(name) for name in names]:
            delete(self.cluster, job)
            said(f"{job['metadata']['name']} deleted")

    def resubmit(self, name: str, new_name: str | None, from_checkpoint: bool) -> Status:
        """See Place."""
        return summarize(resubmit(self.cluster, self.job(name), new_name, from_checkpoint))
