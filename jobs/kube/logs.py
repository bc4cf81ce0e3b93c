"""A job's log, followed through restarts of the API server without a line lost or repeated.

The log is that of a container, of which the kubelet keeps a time to the nanosecond with every line. A stream that
breaks is asked for anew from the second of the last line that was shown, and what was shown already is left out: lines
before that time, and as many of that very time as were shown. This takes a container's clock not to go backwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

from shoal.jobs.kube.api import FIRST_PAUSE, Cluster, Object, Unreachable
from shoal.jobs.kube.patience import PATIENCE
from shoal.jobs.kube.ray_api import ray_logs
from shoal.jobs.kube.status import explain, summarize
from shoal.jobs.kube.submit import find_job, is_service
from shoal.workers.errors import ClusterRefused, NotFound, ShoalError

POLL = 1.0  # seconds between two looks at what is not there yet
_SLOWEST = 5.0
SUBMITTER = "ray-job-submitter"


@dataclass(frozen=True)
class Source:
    """The container that has the log."""

    pod: str
    container: str | None


@dataclass
class Cursor:
    """Where in a log we are: the time of the last line shown, in nanoseconds, and how many shown lines have it."""

    last: int = -1
    same: int = 0
    _skipped: int = 0
    _resuming: bool = False

    def resume(self) -> None:
        """To be called before each stream, which begins at ``since``."""
        self._skipped, self._resuming = 0, self.last >= 0

    def take(self, line: bytes) -> bytes | None:
        """The text of a line with its time before it; None when it was shown already."""
        stamp, _, text = line.partition(b" ")
        at = _nanoseconds(stamp)
        if self._resuming:
            if at < self.last:
                return None
            if at == self.last and self._skipped < self.same:
                self._skipped += 1
                return None
            self._resuming = False
        self.same = self.same + 1 if at == self.last else 1
        self.last = at
        return text

    @property
    def since(self) -> str | None:
        """The second of ``last`` as the API takes it, None at the beginning."""
        if self.last < 0:
            return None
        return datetime.fromtimestamp(self.last // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache(maxsize=64)
def _seconds(text: bytes, zone: bytes) -> int:
    return int(datetime.fromisoformat((text + (b"+00:00" if zone == b"Z" else zone)).decode()).timestamp())


def _nanoseconds(stamp: bytes) -> int:
    """Of RFC 3339 with any number of digits behind the point. Raises ClusterRefused."""
    try:
        whole, rest = stamp[:19], stamp[19:]
        digits = b""
        if rest[:1] == b".":
            end = next(i for i in range(1, len(rest)) if not rest[i : i + 1].isdigit())
            digits, rest = rest[1:end], rest[end:]
        return _seconds(whole, rest) * 10**9 + int(digits.ljust(9, b"0")[:9] or b"0")
    except (ValueError, StopIteration):
        raise ClusterRefused(f"the log has a line without its time ({stamp[:40]!r}): try again") from None


def logs(
    cluster: Cluster,
    name: str,
    write: Callable[[bytes], object],
    follow: bool = False,
    tail: int | None = None,
    told: Callable[[str], None] = lambda said: None,
) -> None:
    """Writes a job's log line by line, with line ends. follow: until the job ends, waiting for it to begin.

    tail: begins that many lines before the end. told: is given sentences on why there is no log yet.

    Raises NotFound (no such job, or it has no log without ``follow``), ClusterRefused.
    """
    job = find_job(cluster, name)
    if not is_service(job) and job["spec"].get("submissionMode") == "HTTPMode":
        _from_ray(cluster, name, write, follow, tail)
        return
    shown: set[str] = set()
    while True:
        source = _source(cluster, job)
        if source and source.pod not in shown:
            shown.add(source.pod)
            _read(cluster, source, write, follow, tail, partial(_superseded, cluster, name, source))
            tail = None
        job = find_job(cluster, name)
        status = summarize(job)
        again = _source(cluster, job)
        if again and again.pod not in shown:
            continue
        if not follow or status.over:
            if not shown:
                raise NotFound(f"{name} is {status.phase} and has no log: `shoal job status {name}` says more")
            return
        if not shown:
            for reason in explain(cluster, job).reasons or [f"{name} is {status.phase}"]:
                told(reason)
        time.sleep(POLL)


def _source(cluster: Cluster, job: Object) -> Source | None:
    """The newest container that has a log: the submitter's, which prints the driver's, else the head's."""
    status = summarize(job)
    mode = job["spec"].get("submissionMode", "K8sJobMode")
    if is_service(job) or mode == "SidecarMode":
        if not status.cluster:
            return None
        selector = f"ray.io/cluster={status.cluster},ray.io/node-type=head"
    else:
        selector = f"job-name={status.name}"
    pods = list(cluster.items(cluster.core("pods"), labelSelector=selector))
    begun = [pod for pod in pods if _started(pod)]
    if not begun:
        return None
    pod = max(begun, key=lambda each: each["metadata"].get("creationTimestamp", ""))
    names = [each["name"] for each in pod["spec"]["containers"]]
    return Source(pod["metadata"]["name"], SUBMITTER if SUBMITTER in names else names[0])


def _superseded(cluster: Cluster, name: str, source: Source) -> bool:
    """Whether the job was begun again since, so that the log goes on elsewhere."""
    newest = _source(cluster, find_job(cluster, name))
    return newest is not None and newest.pod != source.pod


def _started(pod: Object) -> bool:
    """Whether one of its containers has run: a pod that waits for its image has no log."""
    states = [each.get("state") or {} for each in (pod.get("status") or {}).get("containerStatuses") or []]
    return any("running" in state or "terminated" in state for state in states)


def _read(
    cluster: Cluster,
    source: Source,
    write: Callable[[bytes], object],
    follow: bool,
    tail: int | None,
    superseded: Callable[[], bool],
) -> None:
    """Writes the log of one container, with ``follow`` to its end or until another one has taken its place."""
    cursor, away, pause = Cursor(), None, FIRST_PAUSE
    while True:
        try:
            ended = not follow or _ended(cluster, source) or superseded()
            for line in _stream(cluster, source, cursor, follow and not ended, tail):
                away, pause = None, FIRST_PAUSE
                write(line)
            if ended:  # what was asked for after its end holds all of it
                return
            away = None
            time.sleep(FIRST_PAUSE)  # the stream of a container that goes on may end too
        except NotFound:
            if _is_there(cluster, source):  # its log is not, with its node perhaps
                raise
            return  # the pod is gone, and its log with it
        except Unreachable as error:
            away = away or time.monotonic()
            if time.monotonic() - away > PATIENCE:
                raise ClusterRefused(f"{error} (it was away for {PATIENCE:.0f} s)") from None
            time.sleep(pause)
            pause = min(2 * pause, _SLOWEST)


def _is_there(cluster: Cluster, source: Source) -> bool:
    try:
        cluster.get(cluster.core("pods", source.pod))
    except NotFound:
        return False
    return True


def _ended(cluster: Cluster, source: Source) -> bool:
    pod = cluster.get(cluster.core("pods", source.pod))
    for each in (pod.get("status") or {}).get("containerStatuses") or []:
        if each["name"] == source.container:
            return "terminated" in (each.get("state") or {})
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _stream(cluster: Cluster, source: Source, cursor: Cursor, follow: bool, tail: int | None) -> Iterator[bytes]:
    """Lines of one answer that were not shown yet. The end of a log may lack its line end; a broken stream's may not.

    Raises NotFound, Unreachable.
    """
    import urllib3

    query: dict[str, Any] = {"container": source.container, "timestamps": "true", "follow": "true" if follow else None}
    query |= {"sinceTime": cursor.since} if cursor.since else {"tailLines": tail}
    cursor.resume()
    answer = cluster.stream(cluster.core("pods", source.pod) + "/log", **query)
    buffer = b""
    try:
        for chunk in answer.stream(1 << 16):
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                if (text := cursor.take(line)) is not None:
                    yield text + b"\n"
        if buffer and not follow and (text := cursor.take(buffer)) is not None:
            yield text + b"\n"
    except urllib3.exceptions.HTTPError as error:
        raise Unreachable(f"the API server {cluster.host} went away ({type(error).__name__})") from None
    finally:
        answer.close()


def _from_ray(cluster: Cluster, name: str, write: Callable[[bytes], object], follow: bool, tail: int | None) -> None:
    """The log of a job without a submitter, which Ray gives whole each time; while its cluster lives."""
    shown = 0
    while True:
        job = find_job(cluster, name)
        over = summarize(job).over
        try:
            text = ray_logs(cluster, job)
        except ShoalError as error:
            if not follow or over:
                if shown:
                    return
                raise NotFound(f"the log of {name} is not there ({error}): HTTPMode keeps it on the cluster") from None
            text = ""
        whole = text.splitlines(keepends=True)
        if whole and not whole[-1].endswith("\n") and not over:
            whole.pop()
        if shown == 0 and tail is not None:
            shown = max(0, len(whole) - tail)
        for line in whole[shown:]:
            write(line.rstrip("\n").encode() + b"\n")
        shown = max(shown, len(whole))
        if not follow or over:
            return
        time.sleep(POLL)
