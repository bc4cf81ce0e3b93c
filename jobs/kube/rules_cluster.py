"""The operator's rules for the cluster in a RayJob or a RayService. See ``rules``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from shoal.jobs.kube.names import check_label, why_no_label_key, why_no_label_value
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput

Object = dict[str, Any]

FAULT_TOLERANT = "ray.io/ft-enabled"
STORAGE = "ray.io/external-storage-namespace"
AUTOSCALER_2 = "RAY_enable_autoscaler_v2"
# Fields that the operator refuses unless a feature gate of its own is on, which by default none of these is.
GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
TOKENS_SINCE, PRIORITY_SINCE = (2, 52, 0), (2, 56, 0)  # of Ray
_VERSION = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})", re.ASCII)


def cluster_problems(spec: Object, annotations: Object, where: str, owned: bool) -> Iterator[str]:
    """The rules that a cluster breaks, as sentences. owned: by a RayJob or a RayService."""
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs") or []
    for key, gate in GATED.items():
        if key in spec:
            yield f"{where}.{key} needs the operator's feature gate {gate}, which is off by default: leave it out"
    version = spec.get("rayVersion", "")
    if version and not _VERSION.fullmatch(version):
        yield f"{where}.rayVersion={quote(version)} is not a release of Ray: write, say, 2.60.0"
    for place, group in [("headGroupSpec", head), *((f"workerGroupSpecs[{i}]", g) for i, g in enumerate(groups))]:
        yield from _group_problems(group, f"{where}.{place}")
    names = [group.get("groupName") for group in groups]
    if len(set(names)) < len(names):
        yield f"{where}.workerGroupSpecs have one groupName twice: give each its own"
    if head["template"]["spec"].get("containers"):
        for group, place in zip(groups, (f"{where}.workerGroupSpecs[{i}]" for i in range(len(groups))), strict=True):
            yield from _worker_problems(spec, group, place)
        yield from _fault_tolerance_problems(spec, annotations, where)
        yield from _autoscaling_problems(spec, where)
    yield from _auth_problems(spec, where)
    if owned and (spec.get("upgradeStrategy") or {}).get("type") is not None:
        yield f"{where}.upgradeStrategy is for clusters of their own: leave it out"
    if spec.get("managedBy", "ray.io/kuberay-operator") not in ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"):
        yield f"{where}.managedBy={quote(spec['managedBy'])} is nobody: leave it out"


def _group_problems(group: Object, where: str) -> Iterator[str]:
    """The rules for the head as for every group of workers."""
    template = group["template"]
    if not template["spec"].get("containers"):
        yield f"{where}.template.spec.containers is empty: the first container is Ray's"
    start = group.get("rayStartParams") or {}
    if group.get("resources") and any(start.get(key) for key in ("num-cpus", "num-gpus", "memory", "resources")):
        yield f"{where} has resources, and rayStartParams that say the same: keep one of them"
    if "labels" in start:
        yield f"{where}.rayStartParams.labels is not taken: use {where}.labels"
    for key, value in (group.get("labels") or {}).items():
        why = why_no_label_key(key) or why_no_label_value(value)
        if why:
            yield f"{where}.labels: {quote(key)}={quote(value)} is not a label: {why}"
    for key, value in ((template.get("metadata") or {}).get("labels") or {}).items():
        try:
            check_label(key, value, f"{where}.template.metadata.labels")
        except InvalidInput as error:
            yield str(error)


def _worker_problems(spec: Object, group: Object, where: str) -> Iterator[str]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not spec.get("enableInTreeAutoscaling") and (least is None or most is None):
        yield f"{where} needs minReplicas and maxReplicas without autoscaling: set both"
    for key in ("minReplicas", "maxReplicas", "replicas"):
        if group.get(key, 0) < 0:
            yield f"{where}.{key}={group[key]} is less than nothing: set it to 0 or more"
    if least is not None and most is not None and least > most:
        yield f"{where}.minReplicas={least} is more than maxReplicas={most}: exchange them"
    if group.get("suspend") and spec.get("enableInTreeAutoscaling"):
        yield f"{where}.suspend=true does not go with autoscaling: leave it out"
    idle = group.get("idleTimeoutSeconds")
    if idle is not None and idle < 0:
        yield f"{where}.idleTimeoutSeconds={idle} is less than nothing: set it to 0 or more"
    if idle is not None and not _second_autoscaler(spec):
        yield f"{where}.idleTimeoutSeconds needs autoscalerOptions.version v2: set it, or leave this out"
    if group.get("priority"):
        version = _release(spec)
        if version is None or version < PRIORITY_SINCE:
            yield f"{where}.priority needs Ray 2.56.0 or later as rayVersion: set it, or leave priority out"
        if not _second_autoscaler(spec):
            yield f"{where}.priority needs autoscalerOptions.version v2: set it, or leave this out"


def _fault_tolerance_problems(spec: Object, annotations: Object, where: str) -> Iterator[str]:
    head, options = spec["headGroupSpec"], spec.get("gcsFaultToleranceOptions")
    env, start = _env(spec), head.get("rayStartParams") or {}
    place = f"{where}.gcsFaultToleranceOptions"
    if start.get("redis-username") or "REDIS_USERNAME" in env:
        yield f"the head's REDIS_USERNAME is set by {place}.redisUsername alone: use that"
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and annotations.get(FAULT_TOLERANT, "").lower() != "true":
            yield f"the head's RAY_REDIS_ADDRESS needs {place}: set it, or leave the variable out"
        return
    if annotations.get(FAULT_TOLERANT):
        yield f"annotation {FAULT_TOLERANT} and {place} say the same: leave the annotation out"
    if start.get("redis-password") or "REDIS_PASSWORD" in env:
        yield f"the head's redis-password is set by {place}.redisPassword alone: use that"
    if "RAY_REDIS_ADDRESS" in env:
        yield f"the head's RAY_REDIS_ADDRESS is set by {place}.redisAddress alone: use that"
    if annotations.get(STORAGE):
        yield f"annotation {STORAGE} is set by {place}.externalStorageNamespace alone: use that"
    if options.get("backend") == "rocksdb":
        yield f"{place}.backend=rocksdb needs an operator's feature gate that is off by default: use redis"
    elif "storage" in options:
        yield f"{place}.storage belongs to another backend: leave it out"


def _autoscaling_problems(spec: Object, where: str) -> Iterator[str]:
    on, options, env = spec.get("enableInTreeAutoscaling"), spec.get("autoscalerOptions") or {}, _env(spec)
    if not on and env.get(AUTOSCALER_2) in ("1", "true"):
        yield f"the head's {AUTOSCALER_2} needs {where}.enableInTreeAutoscaling=true: set it, or leave the variable out"
    if on and "version" in options and AUTOSCALER_2 in env:
        yield f"{where}.autoscalerOptions.version and the head's {AUTOSCALER_2} say the same: keep the former"
    if on and options.get("version") == "v2":
        for group in [spec["headGroupSpec"], *(spec.get("workerGroupSpecs") or [])]:
            if (group["template"]["spec"].get("restartPolicy") or "Never") != "Never":
                yield f"{where}: restartPolicy must be Never with autoscaler v2: leave it out"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield f"{where}.autoscalerOptions.idleTimeoutSeconds is less than nothing: set it to 0 or more"
    if any(each.get("name") == "KUBERAY_GEN_AUTOSCALER_START_CMD" for each in options.get("env") or []):
        yield f"{where}.autoscalerOptions.env holds a variable that KubeRay sets: leave it out"


def _auth_problems(spec: Object, where: str) -> Iterator[str]:
    options = spec.get("authOptions") or {}
    if options.get("enableK8sTokenAuth"):
        yield f"{where}.authOptions.enableK8sTokenAuth is for clusters of their own: leave it out"
    if options.get("mode") != "token":
        return
    version = _release(spec)
    if version is None or version < TOKENS_SINCE:
        yield (
            f"{where}.authOptions.mode=token needs Ray 2.52.0 or later, and rayVersion is "
            f"{quote(spec.get('rayVersion', ''))}: set it, or use --auth off"
        )


def _env(spec: Object) -> dict[str, Any]:
    """The variables of the head's first container, which is Ray's. A value from elsewhere is None."""
    box = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    return {each["name"]: each.get("value") for each in reversed(box.get("env") or [])}


def _second_autoscaler(spec: Object) -> bool:
    options = spec.get("autoscalerOptions") or {}
    return options.get("version") == "v2" or _env(spec).get(AUTOSCALER_2) in ("1", "true")


def _release(spec: Object) -> tuple[int, ...] | None:
    match = _VERSION.fullmatch(spec.get("rayVersion", ""))
    return tuple(map(int, match.groups())) if match else None
