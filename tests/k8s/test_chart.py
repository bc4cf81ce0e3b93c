"""The Helm chart: linted, rendered for current Kubernetes, and checked as Kubernetes and KubeRay would check it."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from charted import (
    CHART,
    CLUSTER,
    JOBS,
    SERVICE,
    VALUES,
    WATCHED,
    helm,
    matches,
    one,
    pods_of,
    ray_of,
    refusal,
    rendered,
    templates_of,
)
from job_request import job_manifest
from ports import free_port
from shell import shoal

from shoal.jobs.kube.check import check_manifest

RELEASES = ("1.28", "1.37")

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")
with_values = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)


@with_values
def test_the_chart_is_clean_and_kuberay_takes_what_it_renders(values: Path) -> None:
    result = helm("lint", str(CHART), "--strict", "-f", str(values))
    assert result.returncode == 0, result.stdout
    for ray in rendered(values):
        if ray["apiVersion"] != "ray.io/v1":
            continue
        if ray["kind"] == "RayCluster":  # what is checked of it is what is checked of a job's cluster
            labels = {key: value for key, value in ray["metadata"]["labels"].items() if "kueue" not in key}
            spec = {"entrypoint": "true", "rayClusterSpec": ray["spec"]}
            ray = {
                "apiVersion": "ray.io/v1",
                "kind": "RayJob",
                "metadata": {"name": "x", "labels": labels},
                "spec": spec,
            }
        check_manifest(ray)


@pytest.mark.parametrize("release", RELEASES)
@with_values
def test_current_kubernetes_knows_every_key(values: Path, release: str) -> None:
    known = pytest.importorskip("kubernetes_validate", reason="needs pip install -e '.[deploy]'")
    result = helm("template", "rel", str(CHART), "-f", str(values), "--kube-version", f"{release}.0")
    assert result.returncode == 0, result.stderr
    unknown = set()
    for each in filter(None, yaml.safe_load_all(result.stdout)):
        try:
            known.validate(each, release, strict=True)
        except known.SchemaNotFoundError:
            unknown.add(each["kind"])
    operators = {"RayService", "RayCluster", "LocalQueue", "PodMonitor", "PrometheusRule", "Certificate", "Issuer"}
    assert unknown <= operators, "objects of Kubernetes itself are of versions that it serves"


def test_the_readme_is_what_the_comments_say() -> None:
    scope = runpy.run_path(str(CHART.parent / "chart_readme.py"))
    assert (CHART / "README.md").read_text() == scope["readme"](), "run python k8s/chart_readme.py"
    told = set(scope["commented"]((CHART / "values.yaml").read_text()))
    tops = set(yaml.safe_load((CHART / "values.yaml").read_text()))
    assert tops == {key.partition(".")[0] for key in told}, "every value is described"


def test_a_disruption_budget_has_the_version_that_the_cluster_serves_and_lets_a_pod_go() -> None:
    budget = one(rendered(SERVICE, "workers.replicas=3"), "PodDisruptionBudget")
    assert budget["apiVersion"] == "policy/v1"
    # maxUnavailable needs a scale subresource, and without one the eviction API refuses everything
    blocks = re.findall(r"^    subresources:\n((?:      .*\n)+)", _crd("rayclusters"), re.MULTILINE)
    assert blocks and not any("scale" in block for block in blocks)
    assert budget["spec"].keys() == {"minAvailable", "selector"} and budget["spec"]["minAvailable"] == 3, (
        "4 pods, one may go"
    )
    old = helm("template", "rel", str(CHART), "-f", str(SERVICE), "--kube-version", "1.20.0")
    assert old.returncode == 0, old.stderr


def _crd(plural: str) -> str:
    from kube_server import KUBE, missing

    if why := missing():
        pytest.skip(why)
    return (KUBE / "crds" / f"ray.io_{plural}.yaml").read_text()


@with_values
def test_no_pod_is_root_or_has_a_token_or_rights_that_it_need_not(values: Path) -> None:
    objects = rendered(values)
    for template in templates_of(objects):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for box in [*pod["containers"], *pod.get("initContainers", [])]:
            security = box["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["capabilities"]["drop"] == ["ALL"]
            assert set(security["capabilities"].get("add", [])) <= {"IPC_LOCK"}
            assert security["readOnlyRootFilesystem"] is (values.stem != "open-cpu-values")
            assert box["resources"].keys() == {"requests", "limits"}
    for account in (each for each in objects if each["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@with_values
def test_every_object_says_whose_it_is(values: Path) -> None:
    for each in rendered(values):
        if each["metadata"]["name"] == "rel-extra":
            continue  # a person's own
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "shoal" and labels["app.kubernetes.io/instance"] == "rel"
        assert each["metadata"]["namespace"] == "team"


def test_selectors_take_the_pods_that_they_are_for_and_no_others() -> None:
    objects = rendered(WATCHED)
    ray = [pod["metadata"]["labels"] for pod in pods_of(objects)]
    proxy = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    test = one(objects, "Pod")["metadata"]["labels"]
    for kind, name, key in (
        ("PodDisruptionBudget", "rel-shoal", "selector"),
        ("NetworkPolicy", "rel-shoal", "podSelector"),
        ("PodMonitor", "rel-shoal", "selector"),
    ):
        selector = one(objects, kind, name)["spec"][key]
        assert all(matches(selector, labels) for labels in ray)
        assert not matches(selector, proxy) and not matches(selector, test)
    assert matches(one(objects, "NetworkPolicy", "rel-shoal-tls")["spec"]["podSelector"], proxy)
    assert matches({"matchLabels": one(objects, "Service")["spec"]["selector"]}, proxy)
    assert matches(one(objects, "Deployment")["spec"]["selector"], proxy)


def test_the_policy_of_jobs_and_their_monitor_take_the_pods_of_jobs() -> None:
    objects, job = rendered(JOBS), job_manifest(name="first")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        labels = group["template"]["metadata"]["labels"]
        assert matches(one(objects, "PodMonitor")["spec"]["selector"], labels)
        assert matches(one(objects, "NetworkPolicy")["spec"]["podSelector"], labels)
    submitter = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert ports_open_to(objects, "team", submitter, "team") is None, "the pod that hands the job to Ray is one of it"


def ports_open_to(objects: list[Any], namespace: str, labels: dict[str, str], own: str) -> set[int] | None:
    """The ports of Ray's pods, in the namespace ``own``, that a pod may reach; None for all of them."""
    found: set[int] = set()
    for rule in one(objects, "NetworkPolicy", "rel-shoal")["spec"]["ingress"]:
        for peer in rule.get("from", [{"namespaceSelector": {}}]):
            there = {"kubernetes.io/metadata.name": namespace}
            if "ipBlock" in peer:
                continue  # of no pod
            near = matches(peer["namespaceSelector"], there) if "namespaceSelector" in peer else namespace == own
            if near and matches(peer.get("podSelector", {}), labels):
                if "ports" not in rule:
                    return None
                found |= {each["port"] for each in rule["ports"]}
    return found


def test_the_policy_lets_in_who_must_come_in() -> None:
    service = rendered(SERVICE)
    pod, test = pods_of(service)[0]["metadata"]["labels"], one(service, "Pod")["metadata"]["labels"]
    assert ports_open_to(service, "team", pod, "team") is None
    assert ports_open_to(service, "kuberay-system", {}, "team") == {8265, 52365, 8000}
    assert ports_open_to(service, "monitoring", {}, "team") == {8080}
    assert ports_open_to(service, "elsewhere", pod, "team") == set()
    assert ports_open_to(service, "team", test, "team") == {8000, 9000, 8265}
    assert ports_open_to(service, "team", {"app": "client"}, "team") == {8000, 9000}
    cluster = rendered(CLUSTER)
    assert ports_open_to(cluster, "team", {"app": "anything"}, "team") == {8265}, "jobs are handed in"
    jobs = rendered(JOBS)  # the operator is in the same namespace, and nobody reads metrics
    assert ports_open_to(jobs, "kuberay-system", {}, "team") == ports_open_to(jobs, "monitoring", {}, "team") == {8265}
    for change in ("networkPolicy.apiServers={10.0.0.1/32}", "rayTokenAuth=false"):  # known by address, or not let in
        known = rendered(JOBS, change)
        assert ports_open_to(known, "kuberay-system", {}, "team") == set()
        assert ("10.0.0.1/32" in str(one(known, "NetworkPolicy"))) is ("apiServers" in change)
    assert {8265, 52365, 8000} <= (ports_open_to(jobs, "team", {"app": "operator"}, "team") or set())
    watched = rendered(WATCHED, "ingress.enabled=false")  # nginx is between clients and Ray
    proxy = one(watched, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert ports_open_to(watched, "team", proxy, "team") == {8000, 9000, 8265}
    assert ports_open_to(watched, "ingress-nginx", {}, "team") == set()
    assert ports_open_to(rendered(WATCHED), "ingress-nginx", {}, "team") == {8000, 9000}


def test_the_service_asks_for_the_token_of_the_secret_or_says_that_it_is_open() -> None:
    def args_and_names(*changes: str) -> tuple[dict[str, Any], set[str]]:
        objects = rendered(SERVICE, *changes)
        config = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
        env = pods_of(objects)[0]["spec"]["containers"][0]["env"]
        secrets = {e["valueFrom"]["secretKeyRef"]["name"] for e in env if e["name"] == "SHOAL_API_TOKEN"}
        return config["applications"][0]["args"], secrets

    assert args_and_names() == ({"run": "first", "runs_dir": "/mnt/shoal/runs", "workers": 1}, {"rel-shoal-token"})
    assert args_and_names("token.existingSecret=mine")[1] == {"mine"}
    args, secrets = args_and_names("token.create=false", "workers.replicas=2,workers.gpus=8")
    assert (args["insecure"], args["workers"], secrets) == (True, 16, set())
    args, _ = args_and_names("service.placement=colocated,workers.gpus=8")
    assert (args["placement"], args["workers"]) == ("colocated", 8), "not as many ranks as it was trained on"
    args, _ = args_and_names("service.placement=2A:2F,workers.gpus=4")
    assert args["placement"] == "2A:2F" and "workers" not in args
    for run in ("/mnt/shoal/runs/first", "s3://bucket/first"):
        assert args_and_names(f"service.run={run}")[0]["run"] == run


def test_the_notes_of_a_cluster_say_how_a_job_gets_there() -> None:
    """The command is tried where nobody listens, which is all that is wrong with it."""
    dry = helm("install", "rel", str(CHART), "-n", "team", "-f", str(CLUSTER), "--dry-run=client")
    notes = dry.stdout.partition("NOTES:")[2]
    assert "get secret rel-shoal -o jsonpath='{.data.auth_token}'" in notes, "as KubeRay names it, after the cluster"
    (line,) = [each.strip() for each in notes.splitlines() if each.strip().startswith("shoal job submit")]
    words = line.replace("localhost:8265", f"127.0.0.1:{free_port()}").split()
    assert words[words.index("--runs-dir") + 1] == "/mnt/shoal/runs" and words[-4:] == [
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
    ]
    done = shoal(*words[1:], cwd=CHART)
    assert done.returncode == 4 and "does not answer" in done.stderr


def test_workers_take_devices_of_rdma_and_may_lock_memory() -> None:
    head, worker = pods_of(rendered(CLUSTER))
    box = worker["spec"]["containers"][0]
    for amounts in box["resources"].values():
        assert amounts["rdma/hca_shared_devices_a"] == 8 and amounts["nvidia.com/gpu"] == 8
    assert box["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert worker["metadata"]["annotations"] == {"k8s.v1.cni.cncf.io/networks": "rdma-a"}
    assert "rdma" not in str(head) and "IPC_LOCK" not in str(head)


def test_every_part_that_the_queue_needs_has_its_name() -> None:
    objects = rendered(CLUSTER)
    queue = one(objects, "LocalQueue")
    assert queue["metadata"]["name"] == "team-a" and queue["spec"] == {"clusterQueue": "gpus"}
    assert one(objects, "RayCluster")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert one(objects, "PersistentVolumeClaim")["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_requests_under_way_may_end_before_a_pod_does() -> None:
    for pod in pods_of(rendered(WATCHED)):
        assert pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "30"]
        assert pod["spec"]["terminationGracePeriodSeconds"] > 30
    assert not any("lifecycle" in pod["spec"]["containers"][0] for pod in pods_of(rendered(CLUSTER)))


def test_workers_of_a_service_are_ready_without_a_proxy_of_serve() -> None:
    """KubeRay puts in its own probe only where there is none, and that one asks every worker for a proxy."""
    objects = rendered(SERVICE)
    assert "proxy_location: HeadOnly" in one(objects, "RayService")["spec"]["serveConfigV2"]
    probe = pods_of(objects)[1]["spec"]["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/api/local_raylet_healthz", "port": 52365}


def test_metrics_can_be_read_from_all_pods() -> None:
    objects = rendered(WATCHED)
    (endpoint,) = one(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    for pod in pods_of(objects):
        assert {"name": endpoint["port"], "containerPort": 8080} in pod["spec"]["containers"][0]["ports"]


def test_hosts_of_an_ingress_lead_to_http_and_grpc() -> None:
    objects = rendered(WATCHED)
    ports = {each["containerPort"] for each in pods_of(objects)[0]["spec"]["containers"][0]["ports"]}
    for name, host, service, port in (
        ("rel-shoal", "api.example.com", "rel-shoal-serve-svc", 8000),
        ("rel-shoal-grpc", "grpc.example.com", "rel-shoal-head-svc", 9000),
    ):
        spec = one(objects, "Ingress", name)["spec"]
        (path,) = spec["rules"][0]["http"]["paths"]
        assert spec["rules"][0]["host"] == host and host in spec["tls"][0]["hosts"]
        assert path["backend"]["service"] == {"name": service, "port": {"number": port}} and port in ports


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("storage.claim=", "storage.claim is empty"),
        ("service.run=", "service.run is empty"),
        ("workers.replica=2", "replica"),
        ("workers.memory=lots", "memory"),
        ("kind=RayJob", "kind"),
        ("queue=team", "a RayService does not wait in one"),
        ("rayVersion=two", "rayVersion"),
        ("rayVersion=2.51.2", "rayVersion 2.51.2 has no token authentication: use 2.52.0 or later"),
        ("tls.enabled=true", "tls.enabled is set without a certificate"),
        ("rayTls.enabled=true", "rayTls.enabled is set without a certificate authority"),
        ("ingress.enabled=true", "ingress.host is empty"),
        ("localQueue.clusterQueue=gpus", "name the LocalQueue by queue"),
        ("service.drainSeconds=120", "terminationGracePeriodSeconds is 120, and service.drainSeconds 120"),
        ("kind=RayCluster,tls.enabled=true,tls.secret=x", "only a RayService has something to put it before"),
        ("kind=Jobs,ingress.enabled=true,ingress.host=a.b", "only a RayService has something to reach"),
        ("service.placement=0A:1F", "placement"),
        ("service.placement=3A:3F,workers.gpus=4", "service.placement is 3A:3F, and the workers have 4 GPUs"),
        ("storage.mountPath=/tmp", "storage.mountPath is /tmp, where other files are"),
        ("storage.mountPath=/dev/shm/", "storage.mountPath is /dev/shm/, where other files are"),
        (
            "storage.runsDir=/other/runs",
            "storage.runsDir is /other/runs, which is not on the claim: name a folder below",
        ),
        ("service.run=/mnt/shoals/first", "service.run is /mnt/shoals/first, which is not on the claim"),
        ("kind=RayCluster,storage.readOnly=true", "whose jobs write their runs"),
        ("image.repository=a b", "repository"),
        ("env[0].name=A B", "env"),
        (f"kind=Jobs,queue={'q' * 64}", "queue"),
    ],
)
def test_values_that_cannot_be_are_refused(change: str, says: str) -> None:
    assert says in refusal(SERVICE, change)


@pytest.mark.parametrize("name", ["4shoal", "a.shoal"])
def test_names_that_kuberay_cannot_make_names_of_are_refused(name: str) -> None:
    assert f"the release's name gives {name}" in refusal(SERVICE, name=name)


def test_texts_that_yaml_would_take_for_something_else_stay_texts() -> None:
    texts = ("priorityClassName=123", "storage.claim=1e3", "storage.mountPath=/m: #x", "imagePullSecrets={012}")
    changes = [
        part for text in (*texts, "image.tag=1.0", "token.existingSecret=12e4") for part in ("--set-string", text)
    ]
    result = helm("template", "rel", str(CHART), "-f", str(SERVICE), *changes)
    assert result.returncode == 0, result.stderr
    objects = [each for each in yaml.safe_load_all(result.stdout) if each]
    pod = pods_of(objects)[0]["spec"]
    box = pod["containers"][0]
    assert pod["priorityClassName"] == "123" and pod["imagePullSecrets"] == [{"name": "012"}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "1e3"
    assert box["volumeMounts"][0]["mountPath"] == "/m: #x" and box["image"] == "shoal:1.0"
    assert box["env"][1]["valueFrom"]["secretKeyRef"]["name"] == "12e4"
    config = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    assert config["applications"][0]["args"]["runs_dir"] == "/m: #x/runs"


def test_processes_of_ray_are_given_the_certificate_that_their_pod_makes() -> None:
    for pod in pods_of(rendered(WATCHED)):
        (init,), (box,) = pod["spec"]["initContainers"], pod["spec"]["containers"]
        variables = {each["name"]: each.get("value") for each in box["env"]}
        assert variables["RAY_USE_TLS"] == "1" and variables["RAY_TLS_CA_CERT"] == "/etc/ray/tls/ca.crt"
        mounts = {each["name"]: each for each in box["volumeMounts"]}
        assert mounts["ray-tls"]["readOnly"] and "ray-authority" not in mounts, "the key of the authority stays away"
        assert {each["name"] for each in init["volumeMounts"]} == {"ray-tls", "ray-authority"}
    objects = rendered(WATCHED)
    (secret,) = [v for v in pods_of(objects)[0]["spec"]["volumes"] if v["name"] == "ray-authority"]
    authority = one(objects, "Certificate", "rel-shoal-ray-ca")["spec"]
    assert authority["secretName"] == secret["secret"]["secretName"] and authority["isCA"] is True
    assert "RAY_USE_TLS" not in str(ray_of(rendered(SERVICE)))
