"""Watching jobs on a real API server: why they wait, their logs and dashboards, and how they end, come what may."""

from __future__ import annotations

import os
import signal
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from job_request import job_manifest, service_manifest
from kube_fixtures import (  # noqa: F401  # fixtures are found by their names
    Shell,
    cluster_fixture,
    ended,
    kubelet_fixture,
    made,
    server_fixture,
    shoal_fixture,
    until,
)
from kube_kubelet import Kubelet, Log, make_pod, set_pod
from kube_server import ApiServer
from shell import started

from shoal.jobs.kube import submit
from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.ending import wait
from shoal.jobs.kube.forward import forwarded, head_pod
from shoal.jobs.kube.logs import logs
from shoal.jobs.kube.status import explain, summarize
from shoal.jobs.kube.submit import cancel, find_job
from shoal.workers.errors import ClusterRefused, NotFound

LINES = int(os.environ.get("SHOAL_LINES", "30000"))


def test_status_says_why_a_job_waits(server: ApiServer, kubelet: Kubelet, cluster: Cluster) -> None:
    made(cluster, "first", nodes=3)
    server.patch_status(
        "rayjobs", cluster.namespace, "first", {"jobDeploymentStatus": "Initializing", "rayClusterName": "first-abcde"}
    )
    head = job_manifest()["spec"]["rayClusterSpec"]
    body = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "first-abcde"}, "spec": head}
    cluster.post(cluster.ray("rayclusters"), body)
    event = {
        "metadata": {"name": "first-abcde.1"}, "type": "Warning", "reason": "FailedToCreateWorkerPod",
        "involvedObject": {"kind": "RayCluster", "name": "first-abcde", "namespace": cluster.namespace},
        "message": "exceeded quota: team, requested: nvidia.com/gpu=8",
    }  # fmt: skip
    cluster.post(cluster.core("events"), event)
    assert any("exceeded quota: team" in reason for reason in explain(cluster, find_job(cluster, "first")).reasons)
    labels = {"ray.io/cluster": "first-abcde"}
    unplaced = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient gpu."}
    for index in range(2):
        make_pod(server, cluster.namespace, f"waits-{index}", labels, phase="Pending", conditions=[unplaced])
    pull = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    make_pod(server, cluster.namespace, "pulls", labels, pull, phase="Pending")
    make_pod(server, cluster.namespace, "lacks", labels, {"waiting": {"reason": "PodInitializing"}}, phase="Pending")
    lacks = {
        "metadata": {"name": "lacks.1"}, "type": "Warning", "reason": "FailedMount",
        "involvedObject": {"kind": "Pod", "name": "lacks", "namespace": cluster.namespace},
        "message": 'MountVolume.SetUp failed for volume "ray-authority" : secret "ray-ca" not found',
    }  # fmt: skip
    cluster.post(cluster.core("events"), lacks)
    server.patch_status("rayclusters", cluster.namespace, "first-abcde", {"readyWorkerReplicas": 1})
    assert explain(cluster, find_job(cluster, "first")).reasons == [
        "2 pods: no node takes it (0/3 nodes are available: 3 Insufficient gpu.)",
        '1 pod: cannot start (MountVolume.SetUp failed for volume "ray-authority" : secret "ray-ca" not found)',
        "1 pod: image shoal:0.1.0 cannot be pulled (Back-off pulling image)",
        "1 of 3 nodes are ready",
    ]


def test_a_service_that_does_not_come_up_says_why(server: ApiServer, kubelet: Kubelet, cluster: Cluster) -> None:
    """A first cluster, and one that is to replace another, are pending ones to KubeRay until they serve."""
    submit.submit(cluster, [service_manifest()])
    failed = "Deploying app 'shoal' failed\nTraceback:\nshoal.workers.errors.NotFound: there is no run first"
    pending = {
        "rayClusterName": "served-new", "applicationStatuses": {"shoal": {"status": "DEPLOY_FAILED", "message": failed}}
    }  # fmt: skip
    server.patch_status("rayservices", cluster.namespace, "served", {"pendingServiceStatus": pending})
    labels = {"ray.io/cluster": "served-new", "ray.io/node-type": "head"}
    pull = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    make_pod(server, cluster.namespace, "served-head", labels, pull, phase="Pending")
    reasons = [
        "Ray Serve's application shoal is DEPLOY_FAILED: shoal.workers.errors.NotFound: there is no run first",
        "1 pod: image shoal:0.1.0 cannot be pulled (Back-off pulling image)",
    ]
    found = explain(cluster, find_job(cluster, "served"))
    assert (found.phase, found.cluster, found.reasons) == ("starting", "served-new", reasons)
    active = {
        "serviceStatus": "Running",
        "activeServiceStatus": {
            "rayClusterName": "served-old",
            "applicationStatuses": {"shoal": {"status": "RUNNING"}},
        },
    }
    server.patch_status("rayservices", cluster.namespace, "served", active)
    found = explain(cluster, find_job(cluster, "served"))
    assert (found.phase, found.cluster, found.reasons) == ("running", "served-old", reasons)


def test_status_of_who_may_not_see_pods(server: ApiServer, cluster: Cluster) -> None:
    made(cluster, "first")
    status = {"jobDeploymentStatus": "Initializing", "rayClusterName": "first-abcde"}
    server.patch_status("rayjobs", cluster.namespace, "first", status)
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{cluster.namespace}"
    rule = {"apiGroups": ["ray.io"], "resources": ["*"], "verbs": ["*"]}
    server.request("POST", f"{rbac}/roles", {"metadata": {"name": "ray"}, "rules": [rule]})
    subject = {"kind": "User", "name": "nobody", "apiGroup": "rbac.authorization.k8s.io"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "ray"}
    server.request(
        "POST", f"{rbac}/rolebindings", {"metadata": {"name": "ray"}, "subjects": [subject], "roleRef": role}
    )
    limited = Cluster("nobody", cluster.namespace)

    def allowed() -> bool:  # a moment later
        try:
            find_job(limited, "first")
        except ClusterRefused:
            return False
        return True

    until(allowed)
    (reason,) = explain(limited, find_job(limited, "first")).reasons
    assert reason.startswith("its pods cannot be asked (not allowed: pods is forbidden")


WORKLOADS = "/apis/kueue.x-k8s.io/v1beta2/namespaces/{}/workloads"
KUEUE = {"workloads": "Workload", "localqueues": "LocalQueue"}


def install_kueue(server: ApiServer) -> None:
    """Kueue's two objects that jobs ask about, of any content; once. Those of the chart's tests are of v1beta1."""
    if server.request("GET", WORKLOADS.format("default"), quiet=True) is not None:
        return
    for plural, kind in KUEUE.items():
        schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        version = {"name": "v1beta2", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
        names = {"plural": plural, "kind": kind, "singular": kind.lower(), "listKind": f"{kind}List"}
        spec = {"group": "kueue.x-k8s.io", "scope": "Namespaced", "names": names, "versions": [version]}
        body = {"metadata": {"name": f"{plural}.kueue.x-k8s.io"}, "spec": spec}
        body |= {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
        server.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body)
    group = "/apis/kueue.x-k8s.io"
    server._until(lambda: server.request("GET", group, quiet=True) is not None)
    for plural in KUEUE:
        path = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/default/{plural}"
        server._until(lambda path=path: server.request("GET", path, quiet=True) is not None)


def test_a_queued_job_says_what_the_queue_says_and_never_starts_once_cancelled(
    server: ApiServer, cluster: Cluster
) -> None:
    job = made(cluster, "first", queue="team-a", suspend=True)
    assert explain(cluster, job).reasons == ["this cluster has no Kueue, which would take it from its queue"]
    install_kueue(server)
    assert explain(cluster, job).reasons == [f"there is no LocalQueue team-a in namespace {cluster.namespace}"]
    path, meta = (
        f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{cluster.namespace}",
        {"apiVersion": "kueue.x-k8s.io/v1beta2"},
    )
    message = "couldn't assign flavors to pod set head: insufficient unused quota for nvidia.com/gpu"
    body = {
        **meta, "kind": "Workload", "spec": {"active": True},
        "metadata": {"name": "w", "labels": {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}},
        "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": message}]},
    }  # fmt: skip
    server.request("POST", f"{path}/workloads", body)
    found = explain(cluster, job)
    assert found.phase == "queued" and found.reasons == [f"it waits in queue team-a: {message}"]
    assert cancel(cluster, job) == "first will not start"
    assert server.request("GET", f"{path}/workloads/w")["spec"]["active"] is False
    assert summarize(find_job(cluster, "first")).phase == "cancelled"
    assert wait(cluster, "first")[1] == 130


def workload(job: Any) -> dict[str, Any]:
    """What Kueue makes of a job."""
    labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
    meta = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload"}
    return {**meta, "metadata": {"name": job["metadata"]["name"], "labels": labels}, "spec": {"active": True}}


def test_a_job_that_its_queue_starts_meanwhile_is_not_cancelled_as_if_it_waited(
    server: ApiServer, cluster: Cluster
) -> None:
    seen = made(cluster, "first", queue="team-a", suspend=True)
    cluster.patch(cluster.ray("rayjobs", "first"), {"spec": {"suspend": False}})  # by Kueue
    status = {"jobStatus": "RUNNING", "jobDeploymentStatus": "Running", "jobId": "a"}
    server.patch_status("rayjobs", cluster.namespace, "first", status)
    with pytest.raises(ClusterRefused, match="the job's Ray cannot be told to end it"):  # no Ray is here
        cancel(cluster, seen)
    job = find_job(cluster, "first")
    assert job["spec"]["suspend"] is False and "shoal/cancelled" not in job["metadata"]["annotations"]


def test_the_workload_of_a_new_job_is_waited_for(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kueue(server)
    job, path = made(cluster, "first", queue="team-a", suspend=True), cluster.path(WORKLOADS)
    kueue = threading.Timer(1.0, lambda: cluster.post(path, workload(job)))
    kueue.start()
    assert cancel(cluster, job) == "first will not start"
    kueue.join()
    assert cluster.get(f"{path}/first")["spec"]["active"] is False
    monkeypatch.setattr(submit, "WORKLOAD_SECONDS", 0.2)
    with pytest.raises(ClusterRefused, match=r"Kueue has made no workload of it yet, .*: say `shoal job cancel second"):
        cancel(cluster, made(cluster, "second", queue="team-a", suspend=True))


def numbered(log: Log, count: int, first: int = 0) -> None:
    """Lines with their number, four of each time, and a second every thousand."""
    for index in range(first, first + count):
        log.write(f"line {index}", (index // 4) * 4_000_000)


def test_logs_and_waiting_go_on_when_the_api_server_dies_and_comes_back(
    server: ApiServer, kubelet: Kubelet, cluster: Cluster
) -> None:
    made(cluster, "first")
    log = kubelet.logs["first-pod"] = Log()
    numbered(log, LINES // 2)
    make_pod(server, cluster.namespace, "first-pod", {"job-name": "first"}, {"running": {}}, phase="Running")
    server.patch_status(
        "rayjobs", cluster.namespace, "first", {"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}
    )
    lines: list[bytes] = []
    phases: list[str] = []
    outcome: list[Any] = []
    threads = [
        threading.Thread(target=lambda: logs(cluster, "first", lines.append, follow=True)),
        threading.Thread(target=lambda: outcome.append(wait(cluster, "first", 120, lambda s: phases.append(s.phase)))),
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(lines) > LINES // 4 and bool(phases))
    server.kill()
    numbered(log, LINES // 2, LINES // 2)
    server.start_again()
    until(lambda: len(lines) == LINES)
    log.ended = True
    set_pod(server, cluster.namespace, "first-pod", {"terminated": {"exitCode": 0}}, phase="Succeeded")
    ended(server, cluster, "first", "FAILED", "Job entrypoint command failed with exit code 7. No logs available.")
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert lines == [f"line {index}\n".encode() for index in range(LINES)]
    assert phases == ["running", "failed"] and outcome[0][1] == 7
    assert any("sinceTime" in asked for asked in log.asked), "the stream was taken up where it broke"


def test_a_log_that_has_ended_is_printed_from_any_line(
    server: ApiServer, kubelet: Kubelet, shoal: Shell, cluster: Cluster
) -> None:
    made(cluster, "second")
    code, _, err = shoal("logs", "second")
    assert code == 5 and "second is waiting and has no log" in err
    log = kubelet.logs["second-pod"] = Log(ended=True)
    numbered(log, 5)
    make_pod(
        server,
        cluster.namespace,
        "second-pod",
        {"job-name": "second"},
        {"terminated": {"exitCode": 0}},
        phase="Succeeded",
    )
    ended(server, cluster, "second", "SUCCEEDED")
    assert shoal("logs", "second", "--tail", "2")[1] == "line 3\nline 4\n"
    assert shoal("logs", "second", "-f")[1] == "".join(f"line {index}\n" for index in range(5))


def test_the_dashboard_is_reached_through_the_api_server(
    server: ApiServer, kubelet: Kubelet, cluster: Cluster, tmp_path: Path
) -> None:
    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello " * 20_000)

        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    kubelet.port = web.server_port
    made(cluster, "first")
    server.patch_status("rayjobs", cluster.namespace, "first", {"rayClusterName": "first-abcde"})
    with pytest.raises(NotFound, match="the head of first does not run"):
        head_pod(cluster, find_job(cluster, "first"))
    labels = {"ray.io/cluster": "first-abcde", "ray.io/node-type": "head"}
    make_pod(server, cluster.namespace, "head", labels, {"running": {}}, phase="Running")
    with forwarded(cluster, head_pod(cluster, find_job(cluster, "first")), 8265) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            assert answer.read() == b"hello " * 20_000
        answers: list[bytes] = []

        def ask() -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                answers.append(answer.read())

        threads = [threading.Thread(target=ask) for _ in range(8)]  # as a browser does
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == [b"hello " * 20_000] * 8
        with (
            pytest.raises(ClusterRefused, match=f"--port {port} cannot be listened on"),
            forwarded(cluster, "head", 8265, port),
        ):
            pass
    command = ("job", "dashboard", "first", "--no-browser", "--port", "0", "--namespace", cluster.namespace)
    with started(*command, cwd=tmp_path, KUBECONFIG=str(server.kubeconfig)) as process:
        assert process.stdout
        address, token = process.stdout.readline().split()[1], process.stdout.readline()
        assert "get secret -n" in token
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.read() == b"hello " * 20_000
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    web.shutdown()
    web.server_close()
    said: list[str] = []
    for pod, says in (
        ("head", "port 8265 of pod head does not answer (connection refused)"),
        ("ghost", "pod ghost ca"),
    ):
        with (
            forwarded(cluster, pod, 8265, told=said.append) as port,
            pytest.raises((urllib.error.URLError, ConnectionError, HTTPException)),
        ):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30)
        until(lambda: bool(said))
        assert says in said.pop()
