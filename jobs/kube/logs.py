"""A job's log, followed through restarts of the API server without a line lost or repeated.

The log is that of a container, of which the kubelet keeps a time to the nanosecond with every line. A stream that
breaks is asked for anew from the second of the last line that was shown, and what was shown already is left out: lines
before that time, and as many of that very time as were shown. This takes a container's clock not to go backwards.

A submitter that takes the place of one that died prints the log of the same Ray job from its beginning: its lines are
left out for as long as they are those that were printed before. So whoever follows a log from near its end reads all.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from shoal.jobs.kube.api import FIRST_PAUSE, Cluster, Object, Unreachable
from shoal.jobs.kube.patience import Patience
from shoal.jobs.kube.ray_api import ray_logs
from shoal.jobs.kube.status import Status, explain, summarize
from shoal.jobs.kube.submit import find_job, is_service, look_again
from shoal.workers.errors import NotFound, ShoalError

POLL = 1.0  # seconds between two looks at what is not there yet
LAST_TRIES = 3  # of Ray's answer, once the job is over
SUBMITTER = "ray-job-submitter"
_CLIENT = re.compile(rb"\d{4}-\d\d-\d\d [\d:]{8},\d{3}\t[A-Z]+ (cli|sdk)\.py:\d+ -- ")  # what `ray job` says itself


@dataclass(frozen=True)
class Source:
    """The container that has the log."""

    pod: str
    container: str | None
    created: str  # to the second


@dataclass
class Cursor:
    """Where in a log we are: the time of the last line shown, in nanoseconds, and how many shown lines have it.

    A line without a time, which the kubelet writes when it cannot go on, has that of the line before it.
    """

    last: int = -1
    same: int = 0
    _skipped: int = 0
    _resuming: bool = False
    _before: int | None = None

    def resume(self) -> None:
        """To be called before each stream, which begins at ``since``."""
        self._skipped, self._resuming, self._before = 0, self.last >= 0, None

    def take(self, line: bytes) -> bytes | None:
        """The text of a line with its time before it; None when it was shown already."""
        stamp, _, text = line.partition(b" ")
        at = _nanoseconds(stamp)
        if at is None:
            at, text = self._before, line
            if at is None:  # the first line of a stream
                return text
        self._before = at
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


def _nanoseconds(stamp: bytes) -> int | None:
    """Of RFC 3339 with any number of digits behind the point, None for what is no time."""
    try:
        whole, rest = stamp[:19], stamp[19:]
        digits = b""
        if rest[:1] == b".":
            end = next(i for i in range(1, len(rest)) if not rest[i : i + 1].isdigit())
            digits, rest = rest[1:end], rest[end:]
        return _seconds(whole, rest) * 10**9 + int(digits.ljust(9, b"0")[:9] or b"0")
    except (ValueError, StopIteration):
        return None


def logs(
    cluster: Cluster,
    name: str,
    write: Callable[[bytes], object],
    follow: bool = False,
    tail: int | None = None,
    told: Callable[[str], None] = lambda said: None,
) -> None:
    """Writes a job's log line by line, with line ends. follow: until the job ends, waiting for it to begin.

    The API server may go away for ``PATIENCE`` while a log is followed. tail: begins that many lines before the end.
    told: is given sentences on why there is no log yet.

    Raises NotFound (no such job, or it has no log without ``follow``), ClusterRefused.
    """
    job = find_job(cluster, name)
    from_ray = not is_service(job) and job["spec"].get("submissionMode") == "HTTPMode"
    patience = Patience()
    kind = RayLog if from_ray else PodLog
    log = kind(cluster, job, write, follow, tail, told, patience)
    while True:
        try:
            if log.round():
                return
            patience.restore()
            time.sleep(POLL)
        except Unreachable as error:
            if not follow:
                raise
            patience.spend(error)


@dataclass
class _Log(ABC):
    """A log that is being written. ``round`` goes on where the one before it stopped, even where it raised."""

    cluster: Cluster
    job: Object
    write: Callable[[bytes], object]
    follow: bool
    tail: int | None
    told: Callable[[str], None]
    patience: Patience

    @property
    def name(self) -> str:
        """The job's."""
        return str(self.job["metadata"]["name"])

    def look(self) -> Object:
        """The job as it is now. Raises NotFound once it is deleted."""
        self.job = look_again(self.cluster, self.job)
        return self.job

    @abstractmethod
    def round(self) -> bool:
        """Writes what is there, and returns whether that was all. Raises Unreachable, NotFound, ClusterRefused."""

    def say_why(self, job: Object) -> None:
        """Says why there is no log yet."""
        for reason in explain(self.cluster, job).reasons or [f"{self.name} is {summarize(job).phase}"]:
            self.told(reason)


@dataclass
class Replay:
    """Lines of one Ray job that were printed, told apart from those that the next submitter prints again."""

    job_id: str = ""
    _lines: array[int] = field(default_factory=lambda: array("q"))  # their hashes
    _before: array[int] = field(default_factory=lambda: array("q"))  # the same, of the submitter before
    _at: int = 0

    def begin(self, job_id: str) -> None:
        """To be called before a container's first line. job_id: Ray's; empty where there is none."""
        same = job_id and job_id == self.job_id
        self._before, self._lines = self._lines if same else array("q"), array("q")
        self.job_id, self._at = job_id, 0

    def repeats(self, line: bytes) -> bool:
        """Whether a line was printed before."""
        if not self.job_id or _CLIENT.match(line):
            return False
        mark = hash(line)
        self._lines.append(mark)
        if self._at < len(self._before) and self._before[self._at] == mark:
            self._at += 1
            return True
        self._at = len(self._before)  # from here on it is new
        return False


@dataclass
class PodLog(_Log):
    """The log of a container, and of those that took its place."""

    shown: set[str] = field(default_factory=set)  # pods, but for the present one
    source: Source | None = None
    cursor: Cursor = field(default_factory=Cursor)
    replay: Replay = field(default_factory=Replay)

    def __post_init__(self) -> None:
        self.held: deque[bytes] = deque(maxlen=self.tail)  # the last lines, before they are the last ``tail``

    def round(self) -> bool:
        """Reads a container's log to its end, or says why there is none."""
        job = self.look()
        if self.source is None and (found := self._next(job)):
            self.source = found
            self.replay.begin(str((job.get("status") or {}).get("jobId") or ""))
        if self.source:
            self._read(self.source)
            self.shown.add(self.source.pod)
            self.source, self.cursor, self.tail = None, Cursor(), None
            job = self.look()
        if self._next(job):
            return self.round()
        status = summarize(job)
        if not self.follow or status.over:
            if not self.shown:
                raise NotFound(
                    f"{self.name} is {status.phase} and has no log: "
                    f"{self.cluster.hint(f'status {self.name}')} says more"
                )
            return True
        if not self.shown:
            self.say_why(job)
        return False

    def _next(self, job: Object) -> Source | None:
        found = _source(self.cluster, job, self.shown)
        return found if found and found.pod not in self.shown else None

    def _superseded(self, source: Source) -> bool:
        """Whether the job was begun again since, so that the log goes on elsewhere."""
        newest = _source(self.cluster, self.look(), self.shown)
        return newest is not None and newest.created > source.created

    def _read(self, source: Source) -> None:
        """Writes the log of one container, with ``follow`` to its end or until another one has taken its place."""
        while True:
            near_end = self.follow and self.tail is not None
            try:
                ended = not self.follow or _ended(self.cluster, source) or self._superseded(source)
                follow, tail = not (ended or near_end), None if near_end else self.tail
                for line in _stream(self.cluster, source, self.cursor, follow, tail, rest=ended):
                    self.patience.restore()
                    if not self.replay.repeats(line):
                        (self.held.append if near_end else self.write)(line)
            except NotFound:
                if _is_there(self.cluster, source):  # its log is not, with its node perhaps
                    raise
                ended = True  # the pod is gone, and its log with it
            self._release()
            if ended:  # what was asked for after its end holds all of it
                return
            self.patience.restore()
            time.sleep(FIRST_PAUSE)  # the stream of a container that goes on may end too

    def _release(self) -> None:
        """Writes what was held back."""
        while self.held:
            self.write(self.held.popleft())
        self.tail = None


@dataclass
class RayLog(_Log):
    """The log of a job without a submitter, which Ray gives whole each time; while its cluster lives."""

    job_id: str = ""
    lines: int = 0  # that were shown of this job
    answered: bool = False
    missed: int = 0  # times in a row that Ray did not answer once the job was over

    def round(self) -> bool:
        """Asks once."""
        job = self.look()
        status = summarize(job)
        try:
            text = ray_logs(self.cluster, job)
        except (NotFound, Unreachable) as error:
            return self._not_there(job, status, error)
        self.missed = 0
        if status.job_id != self.job_id:  # begun again
            self.job_id, self.lines = status.job_id, 0
        *lines, rest = text.split("\n")
        if rest and (status.over or not self.follow):
            lines.append(rest)
        if not self.answered and self.tail is not None:
            self.lines = max(0, len(lines) - self.tail)
        self.answered = True
        for line in lines[self.lines :]:
            self.write(line.encode(errors="replace") + b"\n")
        self.lines = max(self.lines, len(lines))
        return status.over or not self.follow

    def _not_there(self, job: Object, status: Status, error: ShoalError) -> bool:
        """Whether it will not come either: Ray is not yet there, is gone, or has no answer for a while."""
        self.missed += status.over
        if self.follow and not status.over:
            if not self.answered:
                self.say_why(job)
            return False
        if self.follow and isinstance(error, Unreachable) and self.missed < LAST_TRIES:
            return False
        if self.answered:
            return True
        raise NotFound(f"the log of {self.name} is not there ({error}): HTTPMode keeps it on the cluster") from None


def _source(cluster: Cluster, job: Object, shown: Container[str]) -> Source | None:
    """The newest container that has a log: the submitter's, which prints the driver's, else the head's.

    Of pods of one second, one that is not among ``shown``.
    """
    status = summarize(job)
    mode = job["spec"].get("submissionMode", "K8sJobMode")
    if is_service(job) or mode == "SidecarMode":
        if not status.cluster:
            return None
        selector = f"ray.io/cluster={status.cluster},ray.io/node-type=head"
    else:
        selector = f"job-name={status.name}"
    pods = list(cluster.items(cluster.core("pods"), labelSelector=selector))
    begun = [pod for pod in pods if _started(pod, _container(pod))]
    if not begun:
        return None
    metadata = [(each["metadata"].get("creationTimestamp", ""), each["metadata"]["name"], each) for each in begun]
    created, name, pod = max(metadata, key=lambda each: (each[0], each[1] not in shown))
    return Source(name, _container(pod), created)


def _container(pod: Object) -> str:
    names = [str(each["name"]) for each in pod["spec"]["containers"]]
    return SUBMITTER if SUBMITTER in names else names[0]


def _started(pod: Object, container: str) -> bool:
    """Whether a container has run: one that waits for its image has no log."""
    found = [each for each in (pod.get("status") or {}).get("containerStatuses") or [] if each["name"] == container]
    states = [state for each in found for state in (each.get("state") or {}, each.get("lastState") or {})]
    return any("running" in state or "terminated" in state for state in states)


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


def _stream(
    cluster: Cluster, source: Source, cursor: Cursor, follow: bool, tail: int | None, rest: bool
) -> Iterator[bytes]:
    """Lines of one answer that were not shown yet. rest: also what lacks its line end, as the end of a log may.

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
        if buffer and rest and (text := cursor.take(buffer)) is not None:
            yield text + b"\n"
    except urllib3.exceptions.ReadTimeoutError:
        return  # a job may be silent for long: whether the server is there shows when it is asked anew
    except urllib3.exceptions.HTTPError as error:
        raise Unreachable(f"the API server {cluster.host} went away ({type(error).__name__})") from None
    finally:
        answer.close()
