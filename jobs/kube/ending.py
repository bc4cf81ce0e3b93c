"""How a job ends: waited for through restarts of the API server, and told by the job's own exit code."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator

from shoal.jobs.kube.api import FIRST_PAUSE, JOBS, Cluster, Gone, Object, Unreachable
from shoal.jobs.kube.patience import Patience
from shoal.jobs.kube.ray_api import ray_job
from shoal.jobs.kube.status import Status, summarize
from shoal.workers.errors import ClusterRefused, NotFound, ShoalError, TimedOut

INTERRUPTED = 130  # of a job that was told to end, where it left no exit code of its own
WATCH = 50  # seconds that a watch is asked to last: less than a stream may be silent
_SHORTEST = 0.9  # seconds that a watch lasts at least, where the server is as it should be
EXIT_CODE = re.compile(r"failed with exit code (-?\d+)")  # as Ray's job supervisor puts it


def changes(cluster: Cluster, name: str, until: float | None = None) -> Iterator[Object]:
    """The RayJob as it is, and again each time it changes. The API server may go away meanwhile, for ``PATIENCE``.

    until: a time of ``time.monotonic`` at which it raises TimedOut. Raises NotFound once the job is deleted.
    """
    version, patience = "", Patience()
    while True:
        if until is not None and time.monotonic() >= until:
            raise TimedOut(
                f"{name} has not ended in the time given: it goes on, {cluster.hint(f'status {name}')} shows it"
            )
        try:
            if not version:
                job = cluster.get(cluster.ray(JOBS, name))
                version = job["metadata"]["resourceVersion"]
                yield job
            begun, changed = time.monotonic(), False
            for job in _watched(cluster, name, version, until):
                version, changed = job["metadata"]["resourceVersion"], True
                patience.restore()
                yield job
            if time.monotonic() - begun >= _SHORTEST:
                patience.restore()
            elif changed:
                time.sleep(FIRST_PAUSE)
            else:
                raise Unreachable(f"the API server {cluster.host} ends every watch at once: check its proxy")
        except (Gone, Unreachable) as error:
            version = ""
            patience.spend(error, until)


def _watched(cluster: Cluster, name: str, version: str, until: float | None) -> Iterator[Object]:
    """One watch, which ends when the server ends it. Raises Gone, Unreachable, NotFound."""
    import urllib3

    left = WATCH if until is None else max(1, min(WATCH, int(until - time.monotonic())))
    answer = cluster.stream(
        cluster.ray(JOBS), watch="true", fieldSelector=f"metadata.name={name}", resourceVersion=version,
        timeoutSeconds=left, allowWatchBookmarks="true",
    )  # fmt: skip
    buffer = b""
    try:
        for chunk in answer.stream(1 << 16):
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in filter(None, lines):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _watch_error(cluster, event["object"])
                if event["type"] == "DELETED":
                    raise NotFound(f"{name} was deleted while it was waited for: {cluster.hint('list')} shows the jobs")
                if event["type"] != "BOOKMARK":
                    yield event["object"]
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise Unreachable(f"the API server {cluster.host} went away ({type(error).__name__})") from None
    finally:
        answer.release_conn()
        answer.close()


def _watch_error(cluster: Cluster, status: Object) -> Gone | Unreachable:
    message = str(status.get("message") or "no reason given")
    if status.get("code") == 410:
        return Gone(message)
    return Unreachable(f"the API server {cluster.host} ended the watch ({message})")


def wait(
    cluster: Cluster, name: str, timeout: float | None = None, told: Callable[[Status], None] = lambda status: None
) -> tuple[Status, int]:
    """Waits for a job's end. Returns how it ended, and the exit code that tells it; see ``exit_code``.

    timeout: seconds. told: is given the status whenever its phase changes.

    Raises TimedOut; NotFound; ClusterRefused when the API server stays away.
    """
    until = None if timeout is None else time.monotonic() + timeout
    before, code = "", None
    with cluster.limited(timeout):
        for job in changes(cluster, name, until):
            status = summarize(job)
            if status.phase != before:
                before = status.phase
                told(status)
            if (job.get("status") or {}).get("jobStatus") not in ("FAILED", "STOPPED"):
                code = None
            elif code is None:  # at once: the cluster may be gone when KubeRay has said its last word
                code = _from_ray(cluster, job)
            if status.over:
                return status, exit_code(job) if code is None else code
    raise AssertionError("a watch goes on until it raises")


def exit_code(job: Object) -> int:
    """A job's own exit code, from what KubeRay noted down of Ray's message; else a code that says how it ended.

    0 for success, 130 for a job that was stopped or cancelled, 124 for one that ran out of time, 4 for one that the
    operator refused or whose cluster failed. A process that a signal ended has 128 and the signal's number, as in a
    shell.
    """
    status, said = summarize(job), job.get("status") or {}
    if status.phase == "succeeded":
        return 0
    found = EXIT_CODE.search(status.message) if said.get("jobStatus") == "FAILED" else None
    if found:
        return as_shell(int(found[1]))
    if status.phase in ("stopped", "cancelled"):
        return INTERRUPTED
    if str(said.get("reason", "")).endswith("DeadlineExceeded"):
        return TimedOut.exit_code
    return 1 if said.get("reason") == "AppFailed" else ClusterRefused.exit_code


def _from_ray(cluster: Cluster, job: Object) -> int | None:
    """``driver_exit_code``, None where Ray cannot be asked or does not know."""
    try:
        found = ray_job(cluster, job).get("driver_exit_code")
    except ShoalError:
        return None
    return as_shell(found) if isinstance(found, int) and found else None  # a job that failed has none of 0


def as_shell(code: int) -> int:
    """A process's exit code as a shell has it: 128 and the number of the signal that ended it."""
    return 128 - code if code < 0 else code & 0xFF
