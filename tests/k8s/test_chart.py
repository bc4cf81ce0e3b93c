"""The Helm chart: linted, rendered, checked as KubeRay would check it, installed on a real API server."""

from __future__ import annotations

import base64
import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_server import ApiServer

from shoal.jobs.kube import work
from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.check import check_manifest
from shoal.jobs.kube.manifest import checked_objects
from shoal.jobs.kube.options import resolve_options
from shoal.jobs.kube.ray_api import token_of
from shoal.jobs.kube.status import explain
from shoal.jobs.kube.submit import cancel, delete, find_job, list_jobs, submit
from shoal.workers.errors import ClusterRefused, ShoalError

CHART = Path(__file__).parents[2] / "k8s" / "chart"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
SERVICE = CHART / "ci" / "service-values.yaml"

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")


def helm(*arguments: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KUBECONFIG": str(config or "/dev/null")}
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, timeout=120, env=env)


def rendered(*arguments: str) -> list[dict[str, Any]]:
    """The objects of ``helm template``."""
    result = helm("template", "rel", str(CHART), *arguments)
    assert result.returncode == 0, result.stderr
    return [each for each in yaml.safe_load_all(result.stdout) if each]


def one(objects: list[dict[str, Any]], kind: str) -> Any:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_chart_is_clean_and_kuberay_takes_what_it_renders(values: Path) -> None:
    result = helm("lint", str(CHART), "--strict", "-f", str(values))
    assert result.returncode == 0, result.stdout
    objects = rendered("-f", str(values))
    ray = next(each for each in objects if each["apiVersion"] == "ray.io/v1")
    if ray["kind"] == "RayCluster":  # what is checked of it is what is checked of a job's cluster
        labels = {key: value for key, value in ray["metadata"]["labels"].items() if "kueue" not in key}
        spec = {"entrypoint": "true", "rayClusterSpec": ray["spec"]}
        ray = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x", "labels": labels}, "spec": spec}
    check_manifest(ray)


def test_the_readme_is_what_the_comments_say() -> None:
    scope = runpy.run_path(str(CHART.parent / "chart_readme.py"))
    assert (CHART / "README.md").read_text() == scope["readme"](), "run python k8s/chart_readme.py"
    told = set(scope["commented"]((CHART / "values.yaml").read_text()))
    tops = set(yaml.safe_load((CHART / "values.yaml").read_text()))
    assert tops == {key.partition(".")[0] for key in told}, "every value is described"


def test_a_disruption_budget_has_the_version_that_the_cluster_serves() -> None:
    objects = rendered("-f", str(SERVICE))
    assert one(objects, "PodDisruptionBudget")["apiVersion"] == "policy/v1"
    old = helm("template", "rel", str(CHART), "-f", str(SERVICE), "--kube-version", "1.20.0")
    assert old.returncode == 0, old.stderr


def test_guards_select_the_pods_of_the_release() -> None:
    objects = rendered("-f", str(SERVICE))
    cluster = one(objects, "RayService")["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for selector in (
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector and all(selector.items() <= group["template"]["metadata"]["labels"].items() for group in groups)
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_service_asks_for_the_token_of_the_secret_or_says_that_it_is_open() -> None:
    def args_and_names(*arguments: str) -> tuple[dict[str, Any], set[str]]:
        spec = one(rendered("-f", str(SERVICE), *arguments), "RayService")["spec"]
        config = yaml.safe_load(spec["serveConfigV2"])
        env = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
        secrets = {e["valueFrom"]["secretKeyRef"]["name"] for e in env if e["name"] == "SHOAL_API_TOKEN"}
        return config["applications"][0]["args"], secrets

    assert args_and_names() == ({"run": "first", "runs_dir": "/mnt/shoal/runs", "workers": 1}, {"rel-shoal-token"})
    assert args_and_names("--set", "token.existingSecret=mine")[1] == {"mine"}
    args, secrets = args_and_names("--set", "token.create=false", "--set", "workers.replicas=2,workers.gpus=8")
    assert (args["insecure"], args["workers"], secrets) == (True, 16, set())


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
    ],
)
def test_values_that_cannot_be_are_refused(change: str, says: str) -> None:
    result = helm("template", "rel", str(CHART), "-f", str(SERVICE), "--set", change)
    assert result.returncode != 0 and says in result.stderr


@pytest.mark.parametrize("name", ["4shoal", "a.shoal"])
def test_names_that_kuberay_cannot_make_names_of_are_refused(name: str) -> None:
    result = helm("template", name, str(CHART), "-f", str(SERVICE))
    assert result.returncode != 0 and f"the release's name gives {name}" in result.stderr


def test_texts_that_yaml_would_take_for_something_else_stay_texts() -> None:
    texts = ("priorityClassName=123", "storage.claim=1e3", "storage.mountPath=/m: #x", "imagePullSecrets={012}")
    changes = [
        part for text in (*texts, "image.tag=1.0", "token.existingSecret=12e4") for part in ("--set-string", text)
    ]
    service = one(rendered("-f", str(SERVICE), *changes), "RayService")["spec"]
    pod = service["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    box = pod["containers"][0]
    assert pod["priorityClassName"] == "123" and pod["imagePullSecrets"] == [{"name": "012"}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "1e3"
    assert box["volumeMounts"][0]["mountPath"] == "/m: #x" and box["image"] == "shoal:1.0"
    assert box["env"][1]["valueFrom"]["secretKeyRef"]["name"] == "12e4"
    assert yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]["runs_dir"] == "/m: #x/runs"


def test_a_release_is_installed_upgraded_rolled_back_and_removed(api_server: ApiServer) -> None:
    cluster = cluster_of(api_server, "default")

    def run(*arguments: str) -> None:
        result = helm(*arguments, config=api_server.kubeconfig)
        assert result.returncode == 0, result.stderr

    def token() -> bytes:
        return base64.b64decode(cluster.get(cluster.core("secrets", "rel-shoal-token"))["data"]["token"])

    def nodes() -> Any:
        return find_job(cluster, "rel-shoal")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"]

    run("install", "rel", str(CHART), "-f", str(SERVICE))
    first = token()
    assert len(first) == 40 and nodes() == 1
    run("upgrade", "rel", str(CHART), "-f", str(SERVICE), "--set", "workers.replicas=3")
    assert token() == first, "an upgrade keeps the token"
    assert nodes() == 3
    run("rollback", "rel", "1")
    assert nodes() == 1
    run("uninstall", "rel")
    with pytest.raises(ShoalError):
        find_job(cluster, "rel-shoal")


def cluster_of(server: ApiServer, namespace: str, context: str = "admin") -> Cluster:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(server.kubeconfig))
        return Cluster(context, namespace)


def test_accounts_may_do_what_their_work_needs_and_nothing_else(api_server: ApiServer, tmp_path: Path) -> None:
    api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": "team"}})
    values = ("-f", str(CHART / "ci" / "cluster-values.yaml"), "--namespace", "team")
    result = helm("install", "jobs", str(CHART), *values, config=api_server.kubeconfig)
    assert result.returncode == 0, result.stderr
    submitter = account_of(api_server, "team", "jobs-shoal-submitter", tmp_path)
    options = resolve_options({"name": "first", "volume": ["r:/mnt"], "gpus_per_node": 0, "working_dir": str(CHART)})
    submit(submitter, checked_objects(work.train(options, "tiny"), options))
    assert [each["metadata"]["name"] for each in list_jobs(submitter)] == ["first"]
    api_server.patch_status(
        "rayjobs", "team", "first", {"jobDeploymentStatus": "Initializing", "rayClusterName": "first-abcde"}
    )
    assert explain(submitter, find_job(submitter, "first")).phase == "starting"
    secret = {"metadata": {"name": "first-abcde"}, "data": {"auth_token": base64.b64encode(b"x").decode()}}
    api_server.request("POST", "/api/v1/namespaces/team/secrets", secret)  # as KubeRay makes one of each cluster
    assert token_of(submitter, find_job(submitter, "first")) == "x"
    cancel(submitter, find_job(submitter, "first"))
    delete(submitter, find_job(submitter, "first"))
    for refused in (
        lambda: submitter.get(submitter.core("secrets")),
        lambda: submitter.delete(submitter.core("pods", "any")),
        lambda: submitter.post(submitter.core("pods"), {"metadata": {"name": "x"}, "spec": {"containers": []}}),
        lambda: submitter.get("/apis/ray.io/v1/namespaces/default/rayjobs"),
    ):
        with pytest.raises(ClusterRefused, match="not allowed"):
            refused()
    pods = account_of(api_server, "team", "jobs-shoal", tmp_path)
    with pytest.raises(ClusterRefused, match="not allowed"):
        list_jobs(pods)


def account_of(server: ApiServer, namespace: str, name: str, folder: Path) -> Cluster:
    """The API as a ServiceAccount sees it, by a token of its own."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
    token = server.request("POST", path, body)["status"]["token"]
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["users"][0]["user"]["token"] = token
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(file))
        return Cluster(config["users"][0]["name"], namespace)
