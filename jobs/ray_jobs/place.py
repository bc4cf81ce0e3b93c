"""Jobs of a Ray cluster that runs already, as ``shoal job`` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.status import Status
from shoal.jobs.kube.work import Work
from shoal.jobs.ray_jobs.api import RayCluster
from shoal.jobs.ray_jobs.status import summarize
from shoal.jobs.ray_jobs.submit import cancel, delete, list_jobs, submit
from shoal.jobs.ray_jobs.watch import logs, wait
from shoal.workers.errors import UsageError


class RunningRay:
    """A ``Place`` of jobs; see ``shoal.jobs.cli.job_place``."""

    def __init__(self, address: str) -> None:
        """Makes no request. Raises InvalidInput."""
        self.ray = RayCluster(address)

    def __str__(self) -> str:
        return str(self.ray)

    def hint(self, command: str) -> str:
        """See Place."""
        return self.ray.hint(command)

    def submit(self, work: Work, options: JobOptions, said: Callable[[str], None]) -> Status:
        """See Place."""
        return summarize(submit(self.ray, work, options, said))

    def jobs(self, everything: bool) -> list[Status]:
        """See Place."""
        return [summarize(job) for job in list_jobs(self.ray, everything)]

    def status(self, name: str) -> Status:
        """See Place."""
        return summarize(self.ray.job(name))

    def logs(
        self,
        name: str,
        write: Callable[[bytes], object],
        follow: bool,
        tail: int | None,
        told: Callable[[str], None],
    ) -> None:
        """See Place."""
        logs(self.ray, name, write, follow, tail, told)

    def wait(self, name: str, timeout: float | None, told: Callable[[Status], None]) -> tuple[Status, int]:
        """See Place."""
        return wait(self.ray, name, timeout, told)

    def cancel(self, name: str) -> str:
        """See Place."""
        return cancel(self.ray, name)

    def delete(self, names: Sequence[str], said: Callable[[str], None]) -> None:
        """See Place."""
        for name in names:
            self.ray.job(name)
        for name in names:
            delete(self.ray, name)
            said(f"{name} deleted")

    def resubmit(self, name: str, new_name: str | None, from_checkpoint: bool) -> Status:
        """Refused: Ray does not keep the folder that a job was given."""
        run = summarize(self.ray.job(name)).run
        raise UsageError(
            f"Ray keeps no job to be submitted again: submit it as it was with another --name, and with "
            f"--run {run or 'RUN'} to go on with its run"
        )
