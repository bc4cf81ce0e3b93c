"""What KubeRay's operator refuses once a manifest is there, refused before it is: a refused job would hold its quota.

Each rule is a condition and a sentence. They follow what the operator of KubeRay 1.4 to 1.7 and its master of August
2026 checks; where versions differ, the stricter one holds. ``schema.check_spec`` has been called before, so that keys
and types are known to be right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import yaml

from shoal.jobs.kube.names import check_label, check_name
from shoal.jobs.kube.rules_cluster import cluster_problems
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput

MODES = ("K8sJobMode", "HTTPMode", "SidecarMode")
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
QUEUE = "kueue.x-k8s.io/queue-name"
MOST_GROUPS = 7  # worker groups that Kueue takes: a workload has eight pod sets, and the head is one
_DELETED_FIRST = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_DURATION = re.compile(r"\+?(\d+(\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)

Object = dict[str, Any]


def check_rules(manifest: Object) -> None:
    """Raises InvalidInput for the first rule that a RayJob or a RayService breaks."""
    metadata, spec = manifest["metadata"], manifest["spec"]
    check_name(metadata["name"], "metadata.name")
    for key, value in (metadata.get("labels") or {}).items():
        check_label(key, value, "metadata.labels")
    problems = _job_problems if manifest["kind"] == "RayJob" else _service_problems
    for problem in problems(metadata, spec):
        raise InvalidInput(problem)


def _job_problems(metadata: Object, spec: Object) -> Iterator[str]:
    yield from _life_problems(spec)
    yield from _selector_problems(spec)
    yield from _mode_problems(spec)
    if "deletionStrategy" in spec:
        yield from _deletion_problems(spec, spec["deletionStrategy"])
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"spec.{key}={spec[key]} is no time: set it to 1 or more, or leave it out"
    if spec.get("managedBy", MANAGERS[0]) not in MANAGERS:
        yield f"spec.managedBy={quote(spec['managedBy'])} is nobody: use {' or '.join(MANAGERS)}"
    yield from _yaml_problems(spec.get("runtimeEnvYAML", ""), "spec.runtimeEnvYAML")
    yield from _resource_problems(spec)
    cluster = spec.get("rayClusterSpec")
    if cluster is not None:
        annotations = metadata.get("annotations") or {}
        yield from cluster_problems(cluster, annotations, "spec.rayClusterSpec", owned=True)
        if spec.get("metadata") and not cluster.get("rayVersion"):
            yield "spec.metadata needs spec.rayClusterSpec.rayVersion to be known: set it"
    if QUEUE in (metadata.get("labels") or {}):
        yield from _queue_problems(spec)


def _life_problems(spec: Object) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    ttl, retries = spec.get("ttlSecondsAfterFinished", 0), spec.get("backoffLimit", 0)
    if spec.get("suspend") and not shutdown:
        yield "spec.suspend=true needs spec.shutdownAfterJobFinishes=true: set it, or do not suspend the job"
    if ttl < 0:
        yield f"spec.ttlSecondsAfterFinished={ttl} is less than nothing: set it to 0 or more"
    if ttl > 0 and not shutdown:
        yield f"spec.ttlSecondsAfterFinished={ttl} needs spec.shutdownAfterJobFinishes=true: set it, or leave it out"
    if retries < 0:
        yield f"spec.backoffLimit={retries} is less than nothing: set it to 0 or more"
    if (spec.get("submitterConfig") or {}).get("backoffLimit", 0) < 0:
        yield "spec.submitterConfig.backoffLimit is less than nothing: set it to 0 or more"


def _selector_problems(spec: Object) -> Iterator[str]:
    selector = spec.get("clusterSelector") or {}
    if not selector:
        if spec.get("rayClusterSpec") is None:
            yield "spec.rayClusterSpec is missing, and spec.clusterSelector too: set one of them"
        return
    if not selector.get("ray.io/cluster"):
        yield "spec.clusterSelector names no cluster: set its key ray.io/cluster"
    if spec.get("suspend"):
        yield "spec.suspend=true suspends nothing with spec.clusterSelector: leave one of them out"
    if spec.get("submissionMode") == "SidecarMode":
        yield "spec.submissionMode=SidecarMode needs a cluster of its own: leave spec.clusterSelector out"
    if spec.get("backoffLimit", 0) > 0:
        yield "spec.backoffLimit makes new clusters, and spec.clusterSelector names one: leave one of them out"


def _mode_problems(spec: Object) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in MODES:
        more = " (InteractiveMode waits for somebody to hand the job to Ray)" if mode == "InteractiveMode" else ""
        yield f"spec.submissionMode={quote(mode)} cannot be used{more}: set it to {', '.join(MODES)}"
    if not spec.get("entrypoint", "").strip():
        yield "spec.entrypoint is empty: set the command that the job runs"
    if mode == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig"):
            if key in spec:
                yield f"spec.{key} has no pod to be used for with spec.submissionMode=SidecarMode: leave it out"
        head = (spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {}
        restart = head.get("template", {}).get("spec", {}).get("restartPolicy") or "Never"
        if restart != "Never":
            yield f"restartPolicy={restart} of the head's pod does not go with SidecarMode: set it to Never"


def _deletion_problems(spec: Object, strategy: Object) -> Iterator[str]:
    where, rules = "spec.deletionStrategy", strategy.get("deletionRules") or []
    legacy = [key for key in ("onSuccess", "onFailure") if key in strategy]
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield f"{where}.deletionRules and spec.shutdownAfterJobFinishes=true exclude each other: unset the latter"
    if "deletionRules" in strategy and legacy:
        yield f"{where} has deletionRules and {legacy[0]}, which exclude each other: keep deletionRules"
    if not rules and len(legacy) < 2:
        yield f"{where} needs deletionRules, or both onSuccess and onFailure: write what is missing"
    autoscaling = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    selector = spec.get("clusterSelector")
    policies = [(f"deletionRules[{index}]", rule.get("policy")) for index, rule in enumerate(rules)]
    policies += [(key, strategy[key].get("policy")) for key in legacy]
    for place, policy in policies:
        if policy is None:
            yield f"{where}.{place}.policy is missing: set it"
        if selector and policy in ("DeleteCluster", "DeleteWorkers"):
            yield f"{where}.{place}.policy={policy} would delete a cluster that is not the job's: use DeleteSelf"
        if autoscaling and policy == "DeleteWorkers":
            yield f"{where}.{place}.policy=DeleteWorkers does not go with autoscaling: use DeleteCluster"
        if place in legacy and policy == "DeleteNone" and spec.get("shutdownAfterJobFinishes"):
            yield f"{where}.{place}.policy=DeleteNone contradicts spec.shutdownAfterJobFinishes=true: change one"
    yield from _rule_problems(rules, f"{where}.deletionRules")


def _rule_problems(rules: list[Object], where: str) -> Iterator[str]:
    """Each rule has one condition, no pair of condition and policy comes twice, and what is inside goes first."""
    seen: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition, policy = rule["condition"], rule["policy"]
        keys = [key for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        if len(keys) != 1:
            yield f"{where}[{index}].condition needs one of jobStatus and jobDeploymentStatus: it has {len(keys)}"
            return
        ttl = condition.get("ttlSeconds", 0)
        if ttl < 0:
            yield f"{where}[{index}].condition.ttlSeconds={ttl} is less than nothing: set it to 0 or more"
        times = seen.setdefault((keys[0], condition[keys[0]]), {})
        if policy in times:
            yield f"{where}[{index}] repeats {policy} for {condition[keys[0]]}: leave one of them out"
        times[policy] = ttl
    for (_, status), times in seen.items():
        ordered = [(policy, times[policy]) for policy in _DELETED_FIRST if policy in times]
        for (first, sooner), (then, later) in pairwise(ordered):
            if later < sooner:
                yield f"{where}: after {status}, {then} ({later} s) comes before {first} ({sooner} s): change the times"


def _resource_problems(spec: Object) -> Iterator[str]:
    for key in ("entrypointNumCpus", "entrypointNumGpus"):
        if spec.get(key, 0) < 0:
            yield f"spec.{key}={spec[key]} is less than nothing: set it to 0 or more"
    if text := spec.get("entrypointResources"):
        try:
            good = isinstance(json.loads(text), dict)
        except ValueError:
            good = False
        if not good:
            yield f"spec.entrypointResources={quote(text)} is not JSON of a table: write, say, '{{\"custom\": 1}}'"


def _queue_problems(spec: Object) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec") or {}
    if not spec.get("shutdownAfterJobFinishes"):
        yield "a job in a queue must give its cluster back: set spec.shutdownAfterJobFinishes=true"
    if spec.get("clusterSelector"):
        yield "a job in a queue must bring its own cluster: leave spec.clusterSelector out"
    if cluster.get("enableInTreeAutoscaling"):
        yield "a job in a queue must not change its size: leave enableInTreeAutoscaling out"
    if len(cluster.get("workerGroupSpecs") or []) > MOST_GROUPS:
        yield f"a job in a queue may have {MOST_GROUPS} worker groups: use fewer"


def _service_problems(metadata: Object, spec: Object) -> Iterator[str]:
    annotations = metadata.get("annotations") or {}
    timeout = annotations.get("ray.io/initializing-timeout", "")
    if timeout and not _is_duration(timeout):
        yield f"annotation ray.io/initializing-timeout={quote(timeout)} is no time: write, say, 30m"
    if spec.get("managedBy", MANAGERS[0]) not in MANAGERS:
        yield f"spec.managedBy={quote(spec['managedBy'])} is nobody: use {' or '.join(MANAGERS)}"
    if not spec.get("serveConfigV2", "").strip():
        yield "spec.serveConfigV2 is empty: write the configuration of Ray Serve to it"
    yield from _yaml_problems(spec.get("serveConfigV2", ""), "spec.serveConfigV2")
    cluster, where = spec["rayClusterConfig"], "spec.rayClusterConfig"
    yield from cluster_problems(cluster, annotations, where, owned=True)
    service = cluster["headGroupSpec"].get("headService") or {}
    if (service.get("metadata") or {}).get("name"):
        yield f"{where}.headGroupSpec.headService.metadata.name is KubeRay's to choose: leave it out"
    strategy = spec.get("upgradeStrategy") or {}
    if strategy.get("type", "None") not in ("None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"spec.upgradeStrategy.type={quote(strategy['type'])} is not known: use None or NewCluster"
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        yield from _upgrade_problems(cluster, strategy.get("clusterUpgradeOptions"))


def _upgrade_problems(cluster: Object, options: Object | None) -> Iterator[str]:
    where = "spec.upgradeStrategy.clusterUpgradeOptions"
    if not cluster.get("enableInTreeAutoscaling"):
        yield "spec.upgradeStrategy.type=NewClusterWithIncrementalUpgrade needs autoscaling: use NewCluster"
    if options is None:
        yield f"{where} is missing: set it, or use NewCluster"
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not 0 <= step <= surge <= 100:
        yield f"{where}: stepSizePercent={step} and maxSurgePercent={surge} must be 0 to 100, the former not larger"
    if options.get("intervalSeconds", 0) <= 0 or not options.get("gatewayClassName"):
        yield f"{where} needs intervalSeconds of 1 or more, and gatewayClassName: set them"


def _yaml_problems(text: str, where: str) -> Iterator[str]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        yield f"{where} is not valid YAML ({' '.join(str(error).split())[:120]}): correct it"
        return
    if found is not None and not isinstance(found, dict):
        yield f"{where}={quote(text)} is not a table of keys: write keys and values to it"


def _is_duration(text: str) -> bool:
    """Whether the operator reads it as a time above zero: Go's notation (1h30m), or whole seconds."""
    if re.fullmatch(r"\+?\d{1,18}", text, re.ASCII):
        return int(text) > 0
    rest, total = text, 0.0
    while rest:
        match = _DURATION.match(rest)
        if not match or (rest is not text and rest[0] == "+"):
            return False
        total, rest = total + float(match[1]), rest[match.end() :]
    return total > 0
