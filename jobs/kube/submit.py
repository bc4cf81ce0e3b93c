"""Jobs on the API server: created, found, cancelled, deleted, begun again."""

from __future__ import annotations

import contextlib
import copy
import shlex
import time
from typing import Any

from shoal.jobs.kube.api import FIRST_PAUSE, JOBS, SERVICES, TRIES, Cluster, Conflict, Object, Unreachable
from shoal.jobs.kube.check import check_manifest
from shoal.jobs.kube.kueue import kueue, workloads
from shoal.jobs.kube.manifest import QUEUE, RUN
from shoal.jobs.kube.names import check_name, fresh_name
from shoal.jobs.kube.ray_api import stop_ray_job
from shoal.jobs.kube.status import CANCELLED, summarize
from shoal.jobs.kube.work import TRAIN
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, ShoalError

WORKLOAD_SECONDS = 5.0  # that Kueue has to make a workload of a new job
_OURS = "app.kubernetes.io/managed-by=shoal"
_KINDS = {"rayjob": JOBS, "rayservice": SERVICES}
_PLURALS = {"RayJob": JOBS, "RayService": SERVICES, "ConfigMap": "configmaps"}


def submit(cluster: Cluster, objects: list[Object], dry: bool = False) -> Object:
    """Creates the objects, the job last; with ``dry`` the server only says what it would do. Returns the job.

    Before anything is created, the server is asked what it would make of the job: what it would drop without a word,
    because its KubeRay is older than the field, is refused. What the job needs is created after it, since its pods wait
    for that; it is owned by the job, and goes with it. Where creating it fails, the job is removed.

    Raises ShoalError.
    """
    *needs, job = objects
    path = _path(cluster, job)
    _check_free(cluster, job)
    kept = cluster.post(path, job, dryRun="All")
    for dropped in _dropped(job, kept):
        raise ClusterRefused(
            f"the cluster's KubeRay does not know {dropped} and would drop it: install a newer one, or leave it out"
            + (" by --auth off" if dropped.endswith("authOptions") else "")
        )
    for each in needs:
        cluster.post(_path(cluster, each), each, dryRun="All")
    if dry:
        return kept
    created: Object | None = None
    try:
        created = _created(cluster, job)
        owner = {key: created[key] for key in ("apiVersion", "kind")}
        owner |= {key: created["metadata"][key] for key in ("name", "uid")}
        for each in needs:
            metadata = {**each["metadata"], "ownerReferences": [owner]}
            _created(cluster, {**each, "metadata": metadata})
    except BaseException as error:
        refused = created is None and isinstance(error, ShoalError) and not isinstance(error, Unreachable)
        if needs and not refused:  # a job without its code would wait for it for ever; what it owns goes with it
            with contextlib.suppress(ShoalError):
                delete(cluster, job)
        raise
    return created


def _check_free(cluster: Cluster, job: Object) -> None:
    """Refuses a job of a service's name, or a service of a job's: commands by name could mean either."""
    name, other = job["metadata"]["name"], JOBS if job["kind"] == "RayService" else SERVICES
    with contextlib.suppress(NotFound):
        try:
            cluster.get(cluster.ray(other, name))
        except ClusterRefused as error:
            if isinstance(error, Unreachable):
                raise
            return  # not for this account to see
        raise Conflict(f"{cluster} has a {other.removesuffix('s')} {name}: choose another --name, or delete that first")


def _created(cluster: Cluster, each: Object) -> Object:
    """What was created; where the answer was lost, what is there. Raises ShoalError."""
    path = _path(cluster, each)
    try:
        return cluster.post(path, each)
    except Unreachable as error:
        try:
            return cluster.get(f"{path}/{each['metadata']['name']}")
        except ShoalError:
            raise error from None


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
    """A RayJob or RayService by its name; ``rayjob/NAME`` or ``rayservice/NAME`` where there are both.

    Raises NotFound, InvalidInput when there are both.
    """
    kind, slash, rest = name.partition("/")
    plurals = [_KINDS[kind]] if slash and kind in _KINDS else [JOBS, SERVICES]
    wanted = rest if len(plurals) == 1 else name
    if not wanted:  # the path of a list
        raise InvalidInput(f"NAME {quote(name)} names no job: {cluster.hint('list')} shows the jobs")
    found, refused = list[Object](), list[ShoalError]()
    for plural in plurals:
        try:
            found.append(cluster.get(cluster.ray(plural, wanted)))
        except NotFound:
            continue
        except ClusterRefused as error:  # one of the two may be no business of this account
            if isinstance(error, Unreachable):
                raise
            refused.append(error)
    if len(found) > 1:
        raise InvalidInput(
            f"{cluster} has a job and a service named {name}: say which, by rayjob/{name} or rayservice/{name}"
        )
    if found:
        return found[0]
    if refused:
        raise refused[0]
    raise NotFound(f"there is no job {name} in {cluster}: {cluster.hint('list')} shows the jobs")


def look_again(cluster: Cluster, job: Object) -> Object:
    """The same object as it is now. Raises NotFound."""
    return cluster.get(cluster.ray(SERVICES if is_service(job) else JOBS, job["metadata"]["name"]))


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

    A job that changes meanwhile, since its queue or its operator starts it, is looked at again.

    Returns what was done. Raises InvalidInput for a service, ClusterRefused when Ray cannot be reached.
    """
    name = job["metadata"]["name"]
    if is_service(job):
        raise InvalidInput(
            f"{name} is a service, which has no end to come to: {cluster.hint(f'delete {name}')} removes it"
        )
    for _ in range(TRIES):
        status = summarize(job)
        if status.over:
            return f"{name} has ended already: {status.phase}"
        if (job.get("status") or {}).get("jobStatus") in ("PENDING", "RUNNING"):
            _stop(cluster, job)
            return f"{name} was told to end: it saves a checkpoint first"
        # the version makes the server refuse this if it was changed since it was looked at
        version = {key: job["metadata"][key] for key in ("resourceVersion",) if key in job["metadata"]}
        change = {"metadata": {"annotations": {CANCELLED: "true"}, **version}, "spec": {"suspend": True}}
        try:
            cluster.patch(cluster.ray(JOBS, name), change)
        except Conflict:
            job = look_again(cluster, job)
            continue
        if QUEUE in (job["metadata"].get("labels") or {}) and not _deactivate(cluster, job):
            raise ClusterRefused(
                f"{name} is suspended, but Kueue has made no workload of it yet, and may start it when it does: say "
                f"{cluster.hint(f'cancel {name}')} again"
            )
        return f"{name} will not start"
    raise ClusterRefused(f"{name} changes all the time: say {cluster.hint(f'cancel {name}')} again")


def _stop(cluster: Cluster, job: Object) -> None:
    """Tells the job's Ray to end it. Raises ClusterRefused."""
    name = job["metadata"]["name"]
    try:
        stop_ray_job(cluster, job)
    except ShoalError as error:
        raise ClusterRefused(
            f"the job's Ray cannot be told to end it ({error}): {cluster.hint(f'delete {name}')} removes it, unsaved"
        ) from None


def _deactivate(cluster: Cluster, job: Object) -> bool:
    """Takes the job's workload out of Kueue's queue; Kueue would start a job again that is merely suspended.

    Whether that was done, or needs not be: Kueue makes the workload of a new job a moment after it.
    """
    until = time.monotonic() + WORKLOAD_SECONDS
    try:
        where = kueue(cluster)
        while not (found := workloads(cluster, where, job)):
            if time.monotonic() > until:
                return False
            time.sleep(FIRST_PAUSE)
    except NotFound:  # no Kueue here: nobody will start it
        return True
    for workload in found:
        with contextlib.suppress(NotFound):  # Kueue may remove it meanwhile
            cluster.patch(f"{where}/workloads/{workload['metadata']['name']}", {"spec": {"active": False}})
    return True


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
    if from_checkpoint and not status.over:
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
        again["spec"]["entrypoint"] = _renamed(again["spec"]["entrypoint"], old, run)
    if again["spec"].get("metadata"):
        again["spec"]["metadata"]["run"] = run
    annotations = {
        key: value
        for key, value in (job["metadata"].get("annotations") or {}).items()
        if key != CANCELLED and "kubectl.kubernetes.io/" not in key
    }
    annotations |= {RUN: run, "shoal/resubmits": old}
    again["metadata"] = {"name": fresh, "labels": labels, "annotations": annotations}
    needs = _code_of(cluster, again, old, fresh)
    check_manifest(again)
    return submit(cluster, [*needs, again])


def _renamed(entrypoint: str, job: str, run: str) -> str:
    """The command of a training job with another run's name. Raises InvalidInput for a command of another form."""
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        words = []
    if words[:5] != [*TRAIN, "--name"] or words[6:7] != ["--or-resume"]:
        raise InvalidInput(
            f"the entrypoint {quote(entrypoint)} of {job} was not written by Shoal, so its run cannot be named anew: "
            f"submit the job again, or add --from-checkpoint to go on with its run"
        )
    words[5] = run
    return shlex.join(words)


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
    try:
        data = cluster.get(cluster.core("configmaps", f"{old}-code")).get("binaryData")
    except NotFound:
        raise NotFound(
            f"the local code of {old} is gone, its ConfigMap {old}-code: submit the job again, with --working-dir"
        ) from None
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{fresh}-code"}, "binaryData": data}]
