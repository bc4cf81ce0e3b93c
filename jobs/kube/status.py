"""Where a job stands, and why it waits when it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.jobs.kube.api import CLUSTERS, Cluster, Object, Unreachable
from shoal.jobs.kube.kueue import kueue, workloads
from shoal.jobs.kube.manifest import KIND, QUEUE, RUN
from shoal.jobs.kube.ray_api import cluster_name, clusters_of
from shoal.workers.errors import ClusterRefused, NotFound, ShoalError, last_line

CANCELLED = "shoal/cancelled"  # annotation of a job that was cancelled before it ran
ENDED = ("succeeded", "failed", "stopped", "refused", "cancelled")
_ENDS = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped"}  # Ray's word for it, and ours
STARTING = "being started"
_PULLING = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@dataclass(frozen=True)
class Status:
    """A job or a service. phase: one of queued, suspended, waiting, starting, running, retrying, or of ``ENDED``."""

    name: str
    namespace: str
    kind: str
    phase: str
    run: str
    nodes: int
    queue: str
    created: str
    message: str = ""
    cluster: str = ""
    job_id: str = ""
    started: str = ""
    ended: str = ""
    reasons: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.phase in ENDED


def summarize(each: Object) -> Status:
    """What the object itself says."""
    metadata, spec, status = each["metadata"], each["spec"], each.get("status") or {}
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or {}
    is_job = "rayClusterConfig" not in spec
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    times = status.get("rayJobInfo") or {}
    return Status(
        name=metadata["name"],
        namespace=metadata.get("namespace", ""),
        kind=labels.get(KIND, "" if is_job else "serve"),
        phase=_phase_of_job(each) if is_job else _phase_of_service(status),
        run=annotations.get(RUN, ""),
        nodes=sum(group.get("replicas") or 0 for group in cluster.get("workerGroupSpecs") or []),
        queue=labels.get(QUEUE, ""),
        created=metadata.get("creationTimestamp", ""),
        message=str(status.get("message", "")),
        cluster=cluster_name(each),
        job_id=str(status.get("jobId", "")),
        started=times.get("startTime") or "",
        ended=times.get("endTime") or status.get("endTime") or "",
    )


def _phase_of_job(each: Object) -> str:
    spec, status, metadata = each["spec"], each.get("status") or {}, each["metadata"]
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    # one that has failed may be begun again; the operator has not said so yet while it calls the job running
    undecided = job == "FAILED" and deployment == "Running" and spec.get("backoffLimit", 0) > 0
    if job in _ENDS and deployment not in ("Retrying", "Suspending", "Suspended") and not undecided:
        return _ENDS[job]
    if deployment in ("Complete", "Failed", "ValidationFailed"):
        return {"Complete": "succeeded", "Failed": "failed", "ValidationFailed": "refused"}[deployment]
    if spec.get("suspend") or deployment in ("Suspending", "Suspended"):
        if CANCELLED in (metadata.get("annotations") or {}):
            return "cancelled"
        return "queued" if QUEUE in (metadata.get("labels") or {}) else "suspended"
    phases = {"": "waiting", "Initializing": "starting", "Waiting": "starting", "Retrying": "retrying"}
    return phases.get(deployment, "running")


def _phase_of_service(status: Object) -> str:
    if status.get("serviceStatus") == "Running":
        return "running"
    for condition in status.get("conditions") or []:
        if condition.get("type") == "Ready" and condition.get("status") == "True":
            return "running"
    return "starting" if status else "waiting"


def explain(cluster: Cluster, each: Object) -> Status:
    """``summarize``, with the reasons why it waits or how it failed."""
    found = summarize(each)
    found.reasons.extend(_reasons(cluster, each, found))
    return found


def _reasons(cluster: Cluster, each: Object, found: Status) -> Iterator[str]:
    if found.phase == "queued":
        yield from _queue_reasons(cluster, each, found)
    elif found.phase == "suspended":
        yield "it is suspended: set spec.suspend to false to start it"
    elif found.phase == "waiting":
        yield f"KubeRay has not taken it up: does its operator run, and watch namespace {cluster.namespace}?"
    elif not found.over:
        yield from _service_reasons(each)
        try:
            yield from _cluster_reasons(cluster, each, found)
        except Unreachable:
            raise
        except ClusterRefused as error:  # not for this account to see; what the job itself says stands
            yield f"its pods cannot be asked ({error})"


def _queue_reasons(cluster: Cluster, each: Object, found: Status) -> Iterator[str]:
    """What Kueue says: of the workload that it made of the job, else whether the queue is there."""
    missing = "this cluster has no Kueue, which would take it from its queue"
    try:
        where = kueue(cluster)
        made = workloads(cluster, where, each)
        missing = f"there is no LocalQueue {found.queue} in {cluster}"
        if not made:
            cluster.get(f"{where}/localqueues/{found.queue}")
    except NotFound:
        yield missing
        return
    except ShoalError as error:
        yield f"it waits in queue {found.queue}, which cannot be asked ({error})"
        return
    said = [
        condition["message"]
        for workload in made
        for condition in (workload.get("status") or {}).get("conditions") or []
        if condition.get("message") and (condition.get("type"), condition.get("status"))
        in {("QuotaReserved", "False"), ("Admitted", "False"), ("Evicted", "True"), ("Preempted", "True")}
    ]  # fmt: skip
    for message in dict.fromkeys(said):
        yield f"it waits in queue {found.queue}: {message}"
    if not said:
        yield f"it waits in queue {found.queue}, and Kueue has said nothing about it yet"


def _service_reasons(each: Object) -> Iterator[str]:
    """What Ray Serve says of an application that does not run, where it serves and where it is to."""
    status = each.get("status") or {}
    for place in ("activeServiceStatus", "pendingServiceStatus"):
        for name, found in ((status.get(place) or {}).get("applicationStatuses") or {}).items():
            if found.get("status") not in ("RUNNING", "", None):
                said = f": {last_line(found['message'])}" if found.get("message") else ""
                yield f"Ray Serve's application {name} is {found['status']}{said}"


def _cluster_reasons(cluster: Cluster, each: Object, found: Status) -> Iterator[str]:
    """Pods that are not there yet and why, then how many nodes there are."""
    selectors = [f"ray.io/cluster={name}" for name in clusters_of(each)]
    if found.kind != "serve":
        selectors.append(f"job-name={found.name}")
    pods = [pod for selector in selectors for pod in cluster.items(cluster.core("pods"), labelSelector=selector)]
    reasons = {pod["metadata"]["name"]: reason for pod in pods if (reason := pod_reason(pod))}
    if STARTING in reasons.values():
        missing = _unmounted(cluster)
        reasons |= {name: missing[name] for name, reason in reasons.items() if reason == STARTING and name in missing}
    counted = Counter(reasons.values())
    for reason, count in counted.most_common():
        yield f"{count} pod{'s' * (count > 1)}: {reason}"
    if not found.cluster:
        return
    if not pods:
        yield from _events(cluster, found.cluster)
    try:
        status = cluster.get(cluster.ray(CLUSTERS, found.cluster)).get("status") or {}
    except NotFound:
        return
    there = status.get("readyWorkerReplicas", status.get("availableWorkerReplicas", 0)) or 0
    if there < found.nodes and found.phase != "running":
        yield f"{there} of {found.nodes} nodes are ready"


def pod_reason(pod: Object) -> str | None:
    """Why a pod does not run; None when it does, or has ended well."""
    status = pod.get("status") or {}
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for container in containers:
        state = container.get("state") or {}
        if waiting := state.get("waiting"):
            reason, message = waiting.get("reason", ""), " ".join(str(waiting.get("message", "")).split())
            last = (container.get("lastState") or {}).get("terminated")
            if reason in _PULLING:
                return f"image {container.get('image', '')} cannot be pulled ({message or reason})"
            if last:
                return f"ended with exit code {last.get('exitCode')} ({last.get('reason', 'no reason')}), {reason}"
            if message or reason not in ("ContainerCreating", "PodInitializing", ""):
                return f"cannot start ({reason} {message})".replace(" )", ")")
        ended = state.get("terminated")
        if ended and ended.get("exitCode"):
            return f"ended with exit code {ended['exitCode']} ({ended.get('reason', 'no reason')})"
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"no node takes it ({condition.get('message') or condition.get('reason', 'no reason given')})"
    return STARTING if status.get("phase", "Pending") == "Pending" else None


def _unmounted(cluster: Cluster) -> dict[str, str]:
    """Which Secret or claim a pod waits for, by the pod's name; only an event says so."""
    selector = "involvedObject.kind=Pod,reason=FailedMount"
    events = cluster.items(cluster.core("events"), fieldSelector=selector)
    return {
        event["involvedObject"]["name"]: f"cannot start ({event.get('message', 'FailedMount')})" for event in events
    }


def _events(cluster: Cluster, name: str) -> Iterator[str]:
    """The last warning about an object, such as a quota that is used up."""
    warnings = sorted(
        cluster.items(cluster.core("events"), fieldSelector=f"involvedObject.name={name},type=Warning"),
        key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "",
    )
    if warnings:
        yield f"no pod is there: {warnings[-1].get('message', '')}"
