"""The chart on a real API server: installed, upgraded, rolled back and removed, and what its accounts may do."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from charted import CHART, CLUSTER, JOBS, SERVICE, VALUES, WATCHED, helm, install_others, one, rendered
from kube_server import ApiServer

from shoal.jobs.kube import work
from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.manifest import checked_objects
from shoal.jobs.kube.options import resolve_options
from shoal.jobs.kube.ray_api import token_of
from shoal.jobs.kube.status import explain
from shoal.jobs.kube.submit import cancel, delete, find_job, list_jobs, submit
from shoal.workers.errors import ClusterRefused, ShoalError

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")


@pytest.fixture(scope="module", name="server")
def server_fixture(chart_server: ApiServer) -> ApiServer:
    """The API server with the kinds that the chart makes of other operators."""
    install_others(chart_server)
    return chart_server


def helm_on(server: ApiServer, *arguments: str) -> str:
    result = helm(*arguments, config=server.kubeconfig)
    assert result.returncode == 0, result.stderr
    return result.stdout


def cluster_of(server: ApiServer, namespace: str) -> Cluster:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(server.kubeconfig))
        return Cluster("admin", namespace)


def test_a_release_is_installed_upgraded_rolled_back_and_removed(server: ApiServer) -> None:
    cluster = cluster_of(server, "default")

    def token() -> bytes:
        return base64.b64decode(cluster.get(cluster.core("secrets", "rel-shoal-token"))["data"]["token"])

    def nodes() -> Any:
        return find_job(cluster, "rel-shoal")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"]

    helm_on(server, "install", "rel", str(CHART), "-f", str(SERVICE))
    first = token()
    assert len(first) == 40 and nodes() == 1
    helm_on(server, "upgrade", "rel", str(CHART), "-f", str(SERVICE), "--set", "workers.replicas=3")
    assert token() == first, "an upgrade keeps the token"
    assert nodes() == 3
    helm_on(server, "rollback", "rel", "1")
    assert nodes() == 1
    helm_on(server, "uninstall", "rel")
    with pytest.raises(ShoalError):
        find_job(cluster, "rel-shoal")


@pytest.mark.parametrize(
    "values",
    [pytest.param(each, id=each.stem, marks=[] if each in (CLUSTER, WATCHED) else pytest.mark.slow) for each in VALUES],
)
def test_every_file_of_values_is_installed_and_leaves_nothing_but_the_claim(server: ApiServer, values: Path) -> None:
    """The server stores each object as it was rendered: no key is dropped or refused."""
    namespace = f"v-{values.stem}"
    server.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    notes = helm_on(server, "install", "rel", str(CHART), "-f", str(values), "--namespace", namespace)
    assert "rel-shoal" in notes or "shoal job submit" in notes
    shown = helm_on(server, "get", "manifest", "rel", "--namespace", namespace)
    objects = [each for each in yaml.safe_load_all(shown) if each]
    for each in objects:
        found = server.request("GET", path_of(each, namespace))
        assert not missing_in(each, found), f"{each['kind']}: the server dropped {missing_in(each, found)}"
    helm_on(server, "uninstall", "rel", "--namespace", namespace)
    left = {each["kind"] for each in objects if server.request("GET", path_of(each, namespace), quiet=True)}
    assert left == ({"PersistentVolumeClaim"} & {each["kind"] for each in objects})


def path_of(manifest: dict[str, Any], namespace: str) -> str:
    group, kind = manifest["apiVersion"], manifest["kind"].lower()
    plural = {"networkpolicy": "networkpolicies", "ingress": "ingresses"}.get(kind, f"{kind}s")
    base = "/api/v1" if group == "v1" else f"/apis/{group}"
    return f"{base}/namespaces/{namespace}/{plural}/{manifest['metadata']['name']}"


def missing_in(said: Any, stored: Any, path: str = "") -> list[str]:
    """Where what was said is not what is stored; defaults that the server adds do not count, nor does how it writes a
    quantity, nor the empty."""
    if isinstance(said, dict) and isinstance(stored, dict):
        return [
            p for k, v in said.items() if v not in ({}, [], None) for p in missing_in(v, stored.get(k), f"{path}.{k}")
        ]
    if isinstance(said, list) and isinstance(stored, list) and len(said) == len(stored):
        return [p for i, pair in enumerate(zip(said, stored, strict=True)) for p in missing_in(*pair, f"{path}[{i}]")]
    return [] if str(said) == str(stored) else [f"{path}: {said!r} is {stored!r}"]


def test_an_account_may_do_what_its_work_needs(server: ApiServer, tmp_path: Path) -> None:
    server.request("POST", "/api/v1/namespaces", {"metadata": {"name": "accounts"}})
    helm_on(server, "install", "jobs", str(CHART), "-f", str(CLUSTER), "--namespace", "accounts")
    submitter = account_of(server, "accounts", "jobs-shoal-submitter", tmp_path)
    options = resolve_options({"name": "first", "volume": ["r:/mnt"], "gpus_per_node": 0, "working_dir": str(CHART)})
    submit(submitter, checked_objects(work.train(options, "tiny"), options))
    assert [each["metadata"]["name"] for each in list_jobs(submitter)] == ["first"]
    server.patch_status(
        "rayjobs", "accounts", "first", {"jobDeploymentStatus": "Initializing", "rayClusterName": "first-abcde"}
    )
    assert explain(submitter, find_job(submitter, "first")).phase == "starting"
    secret = {"metadata": {"name": "first-abcde"}, "data": {"auth_token": base64.b64encode(b"x").decode()}}
    server.request("POST", "/api/v1/namespaces/accounts/secrets", secret)  # as KubeRay makes one of each cluster
    assert token_of(submitter, find_job(submitter, "first")) == "x"
    cancel(submitter, find_job(submitter, "first"))
    delete(submitter, find_job(submitter, "first"))
    pods = account_of(server, "accounts", "jobs-shoal", tmp_path)
    with pytest.raises(ClusterRefused, match="not allowed"):
        list_jobs(pods)


VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
RESOURCES = (
    "ray.io/rayjobs", "ray.io/rayservices", "ray.io/rayclusters", "/pods", "/pods/log", "/pods/exec",
    "/pods/portforward", "/events", "/secrets", "/configmaps", "/services", "/services/proxy", "/serviceaccounts",
    "/serviceaccounts/token", "/persistentvolumeclaims", "apps/deployments", "rbac.authorization.k8s.io/roles",
    "rbac.authorization.k8s.io/rolebindings", "kueue.x-k8s.io/workloads", "kueue.x-k8s.io/localqueues",
)  # fmt: skip


@pytest.mark.parametrize("values", [CLUSTER, JOBS], ids=["with Secrets", "without Secrets"])
def test_an_account_has_the_rights_of_its_role_and_no_others(server: ApiServer, values: Path, tmp_path: Path) -> None:
    """Asked of the API server itself, in the account's own name."""
    namespace = f"rights-{values.stem}"
    server.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    helm_on(server, "install", "rel", str(CHART), "-f", str(values), "--namespace", namespace)
    account = account_of(server, namespace, "rel-shoal-submitter", tmp_path)
    expected = {
        (f"{group}/{resource}", verb)
        for rule in one(rendered(values), "Role")["rules"]
        if "resourceNames" not in rule
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert ("/secrets", "get") in expected or values is JOBS
    assert {each for each, _ in expected} <= set(RESOURCES) and ("/secrets", "list") not in expected
    asked = {(each, verb) for each in RESOURCES for verb in VERBS}
    assert {each for each in asked if may(account, namespace, *each)} == expected
    assert may(account, namespace, "kueue.x-k8s.io/localqueues", "get", name="team-a")
    assert not may(account, namespace, "kueue.x-k8s.io/localqueues", "get", name="team-b")
    assert not any(may(account, "default", each, "get") for each in RESOURCES), "of another namespace"
    if values is CLUSTER:
        pods = account_of(server, namespace, "rel-shoal", tmp_path)
        assert not any(may(pods, namespace, each, verb) for each, verb in expected)


def may(account: Cluster, namespace: str, resource: str, verb: str, name: str = "") -> bool:
    """SelfSubjectAccessReview."""
    group, _, rest = resource.partition("/")
    plural, _, below = rest.partition("/")
    where = {"namespace": namespace, "verb": verb, "group": group, "resource": plural, "subresource": below}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": where | ({"name": name} if name else {})},
    }
    return bool(account.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)["status"]["allowed"])


def account_of(server: ApiServer, namespace: str, name: str, folder: Path) -> Cluster:
    """The API as a ServiceAccount sees it, by a token of its own."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
    token = server.request("POST", path, body)["status"]["token"]
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["users"][0]["user"]["token"] = token
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(file))
        return Cluster(config["users"][0]["name"], namespace)
