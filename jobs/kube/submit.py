"""Jobs on the API server: created, found, cancelled, deleted, begun again."""

from __future__ import annotations

import copy
import shlex
from typing import Any

from shoal.jobs.kube.api import JOBS, SERVICES, Cluster, Object
from shoal.jobs.kube.check import check_manifest
from shoal.jobs.kube.manifest import QUEUE, RUN
from shoal.jobs.kube.names import check_name, fresh_name
from shoal.jobs.kube.ray_api import stop_ray_job
from shoal.jobs.kube.status import CANCELLED, summarize
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, ShoalError

_OURS = "app.kubernetes.io/managed-by=shoal"
_PLURALS = {"RayJob": JOBS, "RayService": SERVICES, "ConfigMap": "configmaps"}


def submit(cluster: Cluster, objects: list[Object], dry: bool = False) -> Object:
    """Creates the objects, the job last; with ``dry`` the server only says what it would do. Returns the job.

    Before anything is created, the server is asked what it would make of the job: what it would drop without a word,
    because its KubeRay is older than the field, is refused. What the job needs is owned by it, and goes with it.

    Raises ShoalError.
    """
    *needs, job = objects
    path = _path(cluster, job)
    kept = cluster.post(path, job, dryRun="All")
    for dropped in _dropped(job, kept):
        raise ClusterRefused(
            f"the cluster's KubeRay does not know {dropped} and would drop it: install a newer one, or leave it out"
            + (" by --auth off" if dropped.endswith("authOptions") else "")
        )
    if dry:
        for each in needs:
            cluster.post(_path(cluster, each), each, dryRun="All")
        return kept
    made = [cluster.post(_path(cluster, each), each) for each in needs]
    try:
        created = cluster.post(path, job)
    except ShoalError:
        for each in made:
            cluster.delete(f"{_path(cluster, each)}/{each['metadata']['name']}")
        raise
    for each in made:
        owner = {key: created[key] for key in ("apiVersion", "kind")}
        owner |= {key: created["metadata"][key] for key in ("name", "uid")}
        cluster.patch(f"{_path(cluster, each)}/{each['metadata']['name']}", {"metadata": {"ownerReferences": [owner]}})
    return created


def _path(cluster: Cluster, each: Object) -> str:
    plural = _PLURALS[each["kind"]]
    return cluster.core(plural) if each["apiVersion"] == "v1" else cluster.ray(plural)


def _dropped(sent: Any, kept: Any, where: str = "") -> list[str]:
    """Paths of what was sent and is not there any more."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        found: list[str] = []
        for key, value in sent.items():
            here = f"{where}.{key}" if where else key
            found += [here] if key not in kept else _dropped(value, kept[key], here)
        return found
    if isinstance(sent, list) and isinstance(kept, list):
        return [
            path
            for index, pair in enumerate(zip(sent, kept, strict=False))
            for path in _dropped(*pair, f"{where}[{index}]")
        ]
    return []


def find_job(cluster: Cluster, name: str) -> Object:
    """A RayJob or RayService by its name. Raises NotFound."""
    for plural in (JOBS, SERVICES):
        try:
            return cluster.get(cluster.ray(plural, name))
        except NotFound:
            continue
    raise NotFound(f"there is no job {name} in namespace {cluster.namespace}: `shoal job list` shows the jobs")


def list_jobs(cluster: Cluster, everything: bool = False) -> list[Object]:
    """Jobs and services that Shoal submitted, newest first. everything: those of others too."""
    query = {} if everything else {"labelSelector": _OURS}
    found = [each for plural in (JOBS, SERVICES) for each in cluster.items(cluster.ray(plural), **query)]
    return sorted(found, key=lambda each: (each["metadata"].get("creationTimestamp", ""), each["metadata"]["name"]))[
        ::-1
    ]


def is_service(each: Object) -> bool:
    """Whether it is a RayService."""
    return "rayClusterConfig" in each["spec"]


def cancel(cluster: Cluster, job: Object) -> str:
    """Ends a job, whose object stays: one that runs is told to save and to end, another one never starts.

    Returns what was done. Raises InvalidInput for a service, ClusterRefused when Ray cannot be reached.
    """
    name = job["metadata"]["name"]
    if is_service(job):
        raise InvalidInput(f"{name} is a service, which has no end to come to: `shoal job delete {name}` removes it")
    status = summarize(job)
    if status.over:
        return f"{name} has ended already: {status.phase}"
    if (job.get("status") or {}).get("jobStatus") in ("PENDING", "RUNNING"):
        try:
            stop_ray_job(cluster, job)
        except ShoalError as error:
            raise ClusterRefused(
                f"the job's Ray cannot be told to end it ({error}): `shoal job delete {name}` removes it, unsaved"
            ) from None
        return f"{name} was told to end: it saves a checkpoint first"
    if QUEUE in (job["metadata"].get("labels") or {}):
        _deactivate(cluster, job)
    change = {"metadata": {"annotations": {CANCELLED: "true"}}, "spec": {"suspend": True}}
    cluster.patch(cluster.ray(JOBS, name), change)
    return f"{name} will not start"


def _deactivate(cluster: Cluster, job: Object) -> None:
    """Takes the job's workload out of Kueue's queue; Kueue would start a job again that is merely suspended."""
    where = cluster.path("/apis/kueue.x-k8s.io/v1beta1/namespaces/{}/workloads")
    uid = job["metadata"].get("uid", "")
    try:
        for workload in cluster.items(where, labelSelector=f"kueue.x-k8s.io/job-uid={uid}"):
            cluster.patch(f"{where}/{workload['metadata']['name']}", {"spec": {"active": False}})
    except NotFound:  # no Kueue here: nobody will start it
        return


def delete(cluster: Cluster, job: Object) -> None:
    """Removes a job or a service with all that belongs to it. Raises ShoalError."""
    plural = SERVICES if is_service(job) else JOBS
    cluster.delete(cluster.ray(plural, job["metadata"]["name"]), propagationPolicy="Background")


def resubmit(cluster: Cluster, job: Object, name: str | None, from_checkpoint: bool) -> Object:
    """The same job again, under a new name. Returns it.

    from_checkpoint: it goes on with the run of the old one, which must have ended; else a training job begins a run of
    its own.

    Raises InvalidInput, ClusterRefused.
    """
    old = job["metadata"]["name"]
    status = summarize(job)
    if is_service(job):
        raise InvalidInput(f"{old} is a service: change it by submitting it again, or delete it first")
    if from_checkpoint and not (status.over or status.phase in ("queued", "suspended")):
        raise ClusterRefused(f"{old} is {status.phase}, and two jobs must not write one run: cancel it first")
    again = copy.deepcopy({key: job[key] for key in ("apiVersion", "kind", "spec")})
    labels = dict(job["metadata"].get("labels") or {})
    fresh = name or fresh_name(_stem(old))
    check_name(fresh)
    run = status.run
    for key in ("suspend", "jobId"):
        again["spec"].pop(key, None)
    if not from_checkpoint and status.kind == "train":
        run = fresh
        words = shlex.split(again["spec"]["entrypoint"])
        words[words.index("--name") + 1] = run
        again["spec"]["entrypoint"] = shlex.join(words)
    if again["spec"].get("metadata"):
        again["spec"]["metadata"]["run"] = run
    again["metadata"] = {"name": fresh, "labels": labels, "annotations": {RUN: run, "shoal/resubmits": old}}
    needs = _code_of(cluster, again, old, fresh)
    check_manifest(again)
    return submit(cluster, [*needs, again])


def _stem(name: str) -> str:
    """A name without the random end that ``fresh_name`` gave it."""
    stem, _, end = name.rpartition("-")
    return stem if len(end) == 5 and stem and all(c in "0123456789abcdef" for c in end) else name


def _code_of(cluster: Cluster, job: Object, old: str, fresh: str) -> list[Object]:
    """A copy of the ConfigMap with the old job's code, since it goes with its owner; the new job is made to use it."""
    found = []
    spec = job["spec"].get("rayClusterSpec") or {}
    for group in [spec.get("headGroupSpec") or {}, *(spec.get("workerGroupSpecs") or [])]:
        for volume in group.get("template", {}).get("spec", {}).get("volumes") or []:
            if (volume.get("configMap") or {}).get("name") == f"{old}-code":
                volume["configMap"]["name"] = f"{fresh}-code"
                found.append(volume)
    if not found:
        return []
    data = cluster.get(cluster.core("configmaps", f"{old}-code")).get("binaryData")
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{fresh}-code"}, "binaryData": data}]
