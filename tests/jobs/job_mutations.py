"""Random changes of a valid manifest, aimed at what KubeRay's operator looks at; and that operator, asked for real."""

from __future__ import annotations

import copy
import json
import subprocess
from typing import Any

from hypothesis import strategies as st

Edit = tuple[str, Any]  # a path with dots, and the value set there; REMOVED takes the key away
REMOVED = "<removed>"

TEXTS = [
    "",
    "x",
    "token",
    "v2",
    "Never",
    "OnFailure",
    "rocksdb",
    "redis",
    "None",
    "1",
    "true",
    "False",
    "A b",
    "é",
    "-a",
]
NUMBERS = [-1, 0, 1, 2, 5, 101, 2**31 - 1]
SWITCHES = [True, False, REMOVED]
ENV = ["RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2", "HARMLESS"]
POLICIES = ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]
MODES = ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode", "HttpMode", ""]
VERSIONS = ["2.60.0", "2.52.0", "2.51.9", "2.9", "v2.60.0", "two", "", REMOVED, "2.60.0rc1"]
NAMES = ["a", "a" * 47, "a" * 48, "a" * 64, "A", "1a", "a-", "-a", "a.b", "a_b", ""]
TIMES = ["5m", "1h30m", "0", "-1s", "10", "0s", "abc", "1.5h", "5 m", ""]

_condition = st.fixed_dictionaries(
    {},
    optional={
        "jobStatus": st.sampled_from(["SUCCEEDED", "FAILED"]),
        "jobDeploymentStatus": st.just("Failed"),
        "ttlSeconds": st.sampled_from([-1, 0, 10, 20]),
    },
)
_rule = st.fixed_dictionaries({"policy": st.sampled_from(POLICIES), "condition": _condition})
_policy: st.SearchStrategy[dict[str, str]] = st.one_of(
    st.just({}), st.sampled_from([{"policy": each} for each in POLICIES])
)
_strategy = st.one_of(
    st.fixed_dictionaries({"deletionRules": st.lists(_rule, max_size=4)}),
    st.fixed_dictionaries(
        {}, optional={"onSuccess": _policy, "onFailure": _policy, "deletionRules": st.lists(_rule, max_size=2)}
    ),
)
_env = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(ENV), "value": st.sampled_from(["1", "true", "x", ""])}), max_size=2
)
_fault = st.fixed_dictionaries(
    {},
    optional={
        "redisAddress": st.just("redis:6379"),
        "backend": st.sampled_from(["redis", "rocksdb"]),
        "storage": st.just({"claimName": "c"}),
    },
)
_network = st.fixed_dictionaries({"mode": st.sampled_from(["DenyAll", "DenyAllEgress"])})


def _pick(path: str, *values: Any) -> st.SearchStrategy[Edit]:
    return st.tuples(st.just(path), st.sampled_from(values))


def _draw(path: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Edit]:
    return st.tuples(st.just(path), values)


def _cluster_edits(at: str) -> list[st.SearchStrategy[Edit]]:
    head, group = f"{at}.headGroupSpec", f"{at}.workerGroupSpecs.0"
    start = _draw(
        f"{head}.rayStartParams",
        st.dictionaries(
            st.sampled_from(["num-cpus", "memory", "labels", "redis-password", "redis-username", "block"]),
            st.sampled_from(["1", "", "x"]),
            max_size=2,
        ),
    )
    return [
        _pick(f"{at}.rayVersion", *VERSIONS),
        _pick(f"{at}.enableInTreeAutoscaling", *SWITCHES),
        _pick(f"{at}.autoscalerOptions", {}, {"version": "v1"}, {"version": "v2"}, {"idleTimeoutSeconds": -1}),
        _pick(f"{at}.autoscalerOptions", {"env": [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": "x"}]}),
        _pick(
            f"{at}.authOptions", {"mode": "token"}, {"mode": "disabled"}, {"mode": "token", "secretName": "s"}, REMOVED
        ),
        _pick(f"{at}.authOptions", {"enableK8sTokenAuth": True}, {"mode": "token", "enableK8sTokenAuth": True}),
        _pick(f"{at}.upgradeStrategy", {"type": "Recreate"}, {"type": "None"}, {"type": "x"}, {}),
        _pick(f"{at}.tlsOptions", {"enabled": True}, {}),
        _draw(f"{at}.networkPolicy", _network),
        _pick(f"{at}.historyServerOptions", {}, {"collectorOptions": {"image": "x"}}),
        _draw(f"{at}.gcsFaultToleranceOptions", _fault),
        start,
        _pick(f"{head}.resources", {}, {"CPU": "1"}),
        _pick(f"{head}.labels", {"a": "b"}, {"a b": "c"}, {"a": "-"}, {"x/y": ""}, {"/y": ""}),
        _draw(f"{head}.template.spec.containers.0.env", _env),
        _pick(f"{head}.template.spec.containers", []),
        _pick(f"{head}.template.spec.restartPolicy", "Never", "Always", "OnFailure"),
        _pick(f"{group}.template.spec.restartPolicy", "Never", "Always"),
        _pick(f"{group}.template.spec.containers", []),
        _pick(f"{group}.resources", {}, {"CPU": "1"}),
        _pick(f"{group}.rayStartParams", {}, {"labels": "a=b"}, {"num-gpus": "1"}),
        _pick(f"{group}.labels", {"a": "b"}, {"a": "b c"}),
        _pick(f"{group}.minReplicas", *NUMBERS, REMOVED),
        _pick(f"{group}.maxReplicas", *NUMBERS, REMOVED),
        _pick(f"{group}.suspend", *SWITCHES),
        _pick(f"{group}.idleTimeoutSeconds", -1, 0, 30),
        _pick(f"{group}.priority", 0, 1, -3),
    ]


_BOTH = [
    _pick("metadata.name", *NAMES),
    _pick("metadata.annotations", {"ray.io/ft-enabled": "true"}, {"ray.io/ft-enabled": "x"}, {}),
    _pick("metadata.annotations", {"ray.io/external-storage-namespace": "x"}),
]
_JOB = [
    *_BOTH,
    *_cluster_edits("spec.rayClusterSpec"),
    _pick("spec.submissionMode", *MODES, REMOVED),
    _pick("spec.submitterPodTemplate", REMOVED),
    _pick("spec.submitterConfig", REMOVED, {"backoffLimit": -1}, {}),
    _pick("spec.suspend", *SWITCHES),
    _pick("spec.shutdownAfterJobFinishes", *SWITCHES),
    _pick("spec.ttlSecondsAfterFinished", *NUMBERS, REMOVED),
    _pick("spec.backoffLimit", *NUMBERS, REMOVED),
    _pick("spec.activeDeadlineSeconds", *NUMBERS),
    _pick("spec.preRunningDeadlineSeconds", *NUMBERS),
    _pick("spec.clusterSelector", {}, {"ray.io/cluster": "c"}, {"ray.io/cluster": ""}, {"app": "x"}),
    _pick("spec.rayClusterSpec", REMOVED),
    _pick("spec.runtimeEnvYAML", "", "a: 1", "- a", "text", "a: [", "a: 1\na: 2", "'", "{}"),
    _pick("spec.managedBy", "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue", "me"),
    _draw("spec.deletionStrategy", _strategy),
    _draw("spec.deletionStrategy", _strategy),
]
_SERVICE = [
    *_BOTH,
    *_cluster_edits("spec.rayClusterConfig"),
    _draw("metadata.annotations", st.fixed_dictionaries({"ray.io/initializing-timeout": st.sampled_from(TIMES)})),
    _pick("spec.rayClusterConfig.headGroupSpec.headService", {}, {"metadata": {"name": "x"}}, {"metadata": {}}),
    _pick("spec.rayClusterDeletionDelaySeconds", *NUMBERS),
    _pick("spec.upgradeStrategy", {"type": "None"}, {"type": "NewCluster"}, {"type": "Recreate"}, {}),
    _draw(
        "spec.upgradeStrategy",
        st.fixed_dictionaries(
            {"type": st.just("NewClusterWithIncrementalUpgrade")},
            optional={
                "clusterUpgradeOptions": st.fixed_dictionaries(
                    {
                        "stepSizePercent": st.sampled_from([-1, 5, 101]),
                        "intervalSeconds": st.sampled_from([0, 10]),
                        "gatewayClassName": st.sampled_from(["", "gw"]),
                        "maxSurgePercent": st.sampled_from([1, 100, 101]),
                    }
                )
            },
        ),
    ),
]

job_edits = st.lists(st.one_of(_JOB), min_size=1, max_size=4)
service_edits = st.lists(st.one_of(_SERVICE), min_size=1, max_size=4)


def edited(manifest: dict[str, Any], edits: list[Edit]) -> dict[str, Any]:
    """A copy of the manifest with the edits made in turn; one whose place an earlier edit took away makes nothing."""
    changed = copy.deepcopy(manifest)
    for path, value in edits:
        place: Any = changed
        *above, last = path.split(".")
        for part in above:
            try:
                place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
            except IndexError:
                break
        else:
            if value == REMOVED:
                place.pop(last, None)
            else:
                place[last] = copy.deepcopy(value)
    return changed


class Operator:
    """KubeRay's own validation: the program that ``kuberay/validate.go`` makes."""

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def refusal(self, manifest: dict[str, Any]) -> str:
        """Why the operator refuses a manifest; empty when it does not."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(manifest) + "\n")
        self._process.stdin.flush()
        return str(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the program."""
        self._process.communicate()
