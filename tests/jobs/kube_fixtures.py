"""Fixtures of tests against the API server, and what such tests do again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from called import called
from job_request import job_manifest
from kube_kubelet import Kubelet
from kube_proxy import Proxy
from kube_server import ApiServer

from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.submit import submit


@pytest.fixture(scope="module", name="server")
def server_fixture(api_server: ApiServer) -> ApiServer:
    return api_server


@pytest.fixture(scope="module", name="kubelet")
def kubelet_fixture(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    found = Kubelet(server, tmp_path_factory.mktemp("kubelet"))
    yield found
    found.close()


@pytest.fixture(name="cluster")
def cluster_fixture(server: ApiServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """An administrator's view of a namespace of the test's own."""
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    name = "ns-" + request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")[:50].strip("-")
    server.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}}, quiet=True)
    return Cluster("admin", name)


@pytest.fixture(name="proxy")
def proxy_fixture(server: ApiServer, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy before the API server, which fails as it is told."""
    found = Proxy(server, tmp_path)
    yield found
    found.close()


Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="shoal")
def shoal_fixture(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """``shoal job ARGUMENTS`` in the test's namespace: exit code, standard output, standard error."""

    def run(*arguments: str, namespace: bool = True) -> tuple[int, str, str]:
        where = ["--namespace", cluster.namespace] if namespace else []
        return called(monkeypatch, capfd, "job", *arguments, *where)

    return run


def made(cluster: Cluster, name: str, **options: Any) -> dict[str, Any]:
    """A job submitted to the cluster."""
    return submit(cluster, [job_manifest(name=name, **options)])


def ended(server: ApiServer, cluster: Cluster, name: str, job: str, message: str = "Done.", **more: Any) -> None:
    """Sets the status that KubeRay sets when Ray's job has ended."""
    deployment = {"SUCCEEDED": "Complete", "STOPPED": "Complete", "FAILED": "Failed"}[job]
    status = {"jobStatus": job, "jobDeploymentStatus": deployment, "message": message, **more}
    server.patch_status("rayjobs", cluster.namespace, name, status)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
