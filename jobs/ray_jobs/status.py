"""Where a job of Ray's job API stands, in the words of ``shoal job``, and how it ended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from shoal.jobs.kube.ending import EXIT_CODE, INTERRUPTED, as_shell
from shoal.jobs.kube.status import Status
from shoal.jobs.ray_jobs.api import Object
from shoal.workers.errors import ClusterRefused

KIND, RUN = "shoal", "run"  # keys of a job's metadata, as KubeRay's jobs have them
_PHASES = {
    "PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped"
}  # fmt: skip


def summarize(job: Object) -> Status:
    """What Ray says of a job."""
    metadata = job.get("metadata") or {}
    phase = _PHASES.get(job["status"], str(job["status"]).lower())
    message = str(job.get("message") or "")
    return Status(
        name=str(job.get("submission_id") or job.get("job_id") or ""),
        namespace="",
        kind=str(metadata.get(KIND, "")),
        phase=phase,
        run=str(metadata.get(RUN, "")),
        nodes=0,
        queue="",
        created=_time(job.get("start_time")),
        message=message if phase in ("failed", "stopped") else "",
        job_id=str(job.get("job_id") or ""),
        ended=_time(job.get("end_time")),
        reasons=[" ".join(message.split())] if phase == "waiting" and message else [],
    )


def exit_code(job: Object) -> int:
    """The job's own exit code; where it has none, 130 for one that was stopped, and 4 for one that Ray lost."""
    status, code = job["status"], job.get("driver_exit_code")
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return INTERRUPTED
    if isinstance(code, int) and code:
        return as_shell(code)
    found = EXIT_CODE.search(str(job.get("message") or ""))
    if found and int(found[1]):
        return as_shell(int(found[1]))
    return ClusterRefused.exit_code


def _time(milliseconds: Any) -> str:
    if not isinstance(milliseconds, int) or milliseconds <= 0:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
