"""The verbs of ``shoal job`` against a real API server: what they do there, what they say, how they exit."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from called import called
from job_request import job_manifest
from kube_kubelet import Kubelet, Log, make_pod, set_pod
from kube_server import ApiServer
from shell import started

from shoal.jobs.kube import api
from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.ending import wait
from shoal.jobs.kube.forward import forwarded, head_pod
from shoal.jobs.kube.logs import logs
from shoal.jobs.kube.status import explain, summarize
from shoal.jobs.kube.submit import cancel, find_job, list_jobs, submit
from shoal.workers.errors import ClusterRefused, NotFound

CPU = ("--recipe", "tiny", "--gpus-per-node", "0", "--volume", "runs:/mnt/shoal")
LINES = 30_000


@pytest.fixture(scope="module")
def server(api_server: ApiServer) -> ApiServer:
    return api_server


@pytest.fixture(scope="module")
def kubelet(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    found = Kubelet(server, tmp_path_factory.mktemp("kubelet"))
    yield found
    found.close()


@pytest.fixture
def cluster(server: ApiServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """An administrator's view of a namespace of the test's own."""
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    name = "ns-" + request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")[:50].strip("-")
    server.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}}, quiet=True)
    return Cluster("admin", name)


Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shoal(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """``shoal job ARGUMENTS`` in the test's namespace: exit code, standard output, standard error."""

    def run(*arguments: str, namespace: bool = True) -> tuple[int, str, str]:
        where = ["--namespace", cluster.namespace] if namespace else []
        return called(monkeypatch, capfd, "job", *arguments, *where)

    return run


def made(cluster: Cluster, name: str, **options: Any) -> dict[str, Any]:
    """A job submitted to the cluster."""
    return submit(cluster, [job_manifest(name=name, **options)])


def holds(there: Any, sent: Any) -> bool:
    """Whether all that was sent is there; the server adds defaults."""
    if isinstance(sent, dict):
        return all(key in there and holds(there[key], value) for key, value in sent.items())
    if isinstance(sent, list):
        return len(there) == len(sent) and all(map(holds, there, sent))
    return bool(there == sent)


def ended(server: ApiServer, cluster: Cluster, name: str, job: str, message: str = "Done.", **more: Any) -> None:
    """Sets the status that KubeRay sets when Ray's job has ended."""
    deployment = {"SUCCEEDED": "Complete", "STOPPED": "Complete", "FAILED": "Failed"}[job]
    status = {"jobStatus": job, "jobDeploymentStatus": deployment, "message": message, **more}
    server.patch_status("rayjobs", cluster.namespace, name, status)


def test_a_job_is_submitted_listed_shown_and_deleted(shoal: Shell, cluster: Cluster) -> None:
    code, out, err = shoal("submit", "train", *CPU, "--name", "first", "-o", "json")
    assert code == 0, err
    assert json.loads(out) == {
        "name": "first", "namespace": cluster.namespace, "kind": "train", "run": "first", "dry_run": False
    }  # fmt: skip
    assert holds(find_job(cluster, "first")["spec"], job_manifest()["spec"]), "something was dropped or changed"
    assert shoal("submit", "serve", "first", "--volume", "runs:/mnt", "--insecure", "--name", "web")[0] == 0
    code, out, _ = shoal("list", "-o", "json")
    assert {(each["name"], each["kind"], each["phase"]) for each in json.loads(out)} == {
        ("first", "train", "waiting"), ("web", "serve", "waiting")
    }  # fmt: skip
    code, out, _ = shoal("status", "first")
    assert code == 0 and "KubeRay has not taken it up" in out
    assert shoal("delete", "first", "web")[0] == 0
    assert shoal("list", "-o", "json")[1].strip() == "[]"


def test_a_dry_run_makes_nothing(shoal: Shell, cluster: Cluster) -> None:
    code, out, _ = shoal("submit", "train", *CPU, "--name", "first", "--dry-run", "client")
    assert code == 0 and yaml.safe_load(out)["metadata"] == {
        **job_manifest()["metadata"], "namespace": cluster.namespace
    }  # fmt: skip
    code, out, _ = shoal("submit", "train", *CPU, "--name", "first", "--dry-run", "server")
    assert code == 0 and "first would be submitted" in out
    assert list_jobs(cluster) == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("list", "--context", "stranger"), 4, "does not know you"),
        (("list", "--context", "nobody"), 4, 'not allowed: rayjobs.ray.io is forbidden: User "nobody" cannot list'),
        (("status", "ghost"), 5, "there is no job ghost in namespace"),
        (("wait", "ghost"), 5, "there is no job ghost"),
        (("delete", "ghost"), 5, "there is no job ghost"),
        (("list", "--context", "moon"), 5, "--context 'moon' is not in the kubeconfig: it has admin, nobody, stranger"),
        (("submit", "train", *CPU, "--name", "x", "--queue", "Bad Queue"), 3, "--queue 'Bad Queue' is not a name"),
    ],
)
def test_what_the_server_refuses_is_one_sentence(
    shoal: Shell, arguments: tuple[str, ...], code: int, says: str
) -> None:
    found, out, err = shoal(*arguments)
    assert (found, out) == (code, ""), err
    assert says in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_name_that_is_taken_is_refused(shoal: Shell, cluster: Cluster) -> None:
    made(cluster, "taken")
    code, _, err = shoal("submit", "train", *CPU, "--name", "taken")
    assert code == 4 and '"taken" already exists: choose another --name' in err


def test_a_namespace_that_is_not_there_is_refused(shoal: Shell) -> None:
    arguments = ("submit", "train", *CPU, "--name", "first", "--namespace", "nowhere")
    code, _, err = shoal(*arguments, namespace=False)
    assert code == 5 and "nowhere" in err


def test_what_the_server_finds_invalid_is_refused(cluster: Cluster) -> None:
    manifest = job_manifest()
    manifest["spec"]["backoffLimit"] = "many"  # our own check would say it; the server says it too
    with pytest.raises(ClusterRefused, match=r"finds it invalid: .*spec\.backoffLimit"):
        submit(cluster, [manifest])


def test_a_field_that_an_older_kuberay_would_drop_is_refused(cluster: Cluster) -> None:
    manifest = job_manifest()
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["newField"] = {"a": 1}
    with pytest.raises(ClusterRefused, match=r"does not know spec\.rayClusterSpec\.workerGroupSpecs\[0\]\.newField"):
        submit(cluster, [manifest])
    assert list_jobs(cluster) == []


def test_local_code_belongs_to_its_job(shoal: Shell, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    assert shoal("submit", "train", *CPU, "--name", "first", "--working-dir", str(tmp_path))[0] == 0
    owner = cluster.get(cluster.core("configmaps", "first-code"))["metadata"]["ownerReferences"][0]
    job = find_job(cluster, "first")
    assert (owner["kind"], owner["name"], owner["uid"]) == ("RayJob", "first", job["metadata"]["uid"])
    code, _, err = shoal("submit", "train", *CPU, "--name", "first", "--working-dir", str(tmp_path))
    assert code == 4 and "already exists" in err
    code, _, err = shoal("resubmit", "first", "--name", "second")
    assert code == 0, err
    assert cluster.get(cluster.core("configmaps", "second-code"))["binaryData"]
    volumes = find_job(cluster, "second")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "code", "configMap": {"name": "second-code"}} in volumes


def test_a_list_is_read_page_by_page(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PAGE", 3)
    for index in range(8):
        made(cluster, f"job-{index}")
    assert {each["metadata"]["name"] for each in list_jobs(cluster)} == {f"job-{index}" for index in range(8)}


def test_resubmitting_goes_on_with_the_run_or_begins_another(server: ApiServer, shoal: Shell, cluster: Cluster) -> None:
    made(cluster, "first")
    server.patch_status(
        "rayjobs", cluster.namespace, "first", {"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}
    )
    code, _, err = shoal("resubmit", "first", "--from-checkpoint")
    assert code == 4 and "two jobs must not write one run" in err
    ended(server, cluster, "first", "FAILED", "Job entrypoint command failed with exit code 1. No logs available.")
    code, out, err = shoal("resubmit", "first", "--from-checkpoint", "--name", "second", "-o", "json")
    assert code == 0, err
    assert json.loads(out)["run"] == "first"
    assert find_job(cluster, "second")["spec"]["entrypoint"] == find_job(cluster, "first")["spec"]["entrypoint"]
    code, out, _ = shoal("resubmit", "first", "-o", "json")
    fresh = json.loads(out)
    assert fresh["name"].startswith("first-") and fresh["run"] == fresh["name"]
    assert f"--name {fresh['name']} --or-resume" in find_job(cluster, fresh["name"])["spec"]["entrypoint"]


@pytest.mark.parametrize(
    ("job", "message", "more", "code"),
    [
        ("SUCCEEDED", "Job finished successfully.", {}, 0),
        (
            "FAILED",
            "Job entrypoint command failed with exit code 7, last available logs (truncated):\nexit code 9",
            {},
            7,
        ),
        ("FAILED", "Job entrypoint command failed with exit code -9. No logs available.", {}, 137),
        ("STOPPED", "Job was intentionally stopped.", {}, 130),
        ("FAILED", "Unexpected error occurred: The actor died.", {"reason": "AppFailed"}, 1),
    ],
)
def test_waiting_exits_with_the_jobs_own_code(
    server: ApiServer, shoal: Shell, cluster: Cluster, job: str, message: str, more: dict[str, str], code: int
) -> None:
    name = f"job-{code}"
    made(cluster, name)
    ended(server, cluster, name, job, message, **more)
    found, out, _ = shoal("wait", name)
    assert found == code and f"exit code {code}" in out and "\nexit code 9" not in out


def ends_with(phases: list[str], phase: str) -> bool:
    return phases[-1:] == [phase]


def test_a_job_that_is_begun_again_has_not_ended(server: ApiServer, cluster: Cluster) -> None:
    made(cluster, "first", retries=1)
    message = "Job entrypoint command failed with exit code 7. No logs available."
    phases: list[str] = []
    outcome: list[Any] = []
    waiting = threading.Thread(
        target=lambda: outcome.append(wait(cluster, "first", 120, lambda found: phases.append(found.phase)))
    )
    waiting.start()
    for job, deployment, phase in (
        ("RUNNING", "Running", "running"), ("FAILED", "Running", "running"), ("", "Retrying", "retrying"),
        ("RUNNING", "Running", "running"), ("SUCCEEDED", "Complete", "succeeded"),
    ):  # fmt: skip
        status = {"jobStatus": job or None, "jobDeploymentStatus": deployment, "message": message}
        server.patch_status("rayjobs", cluster.namespace, "first", status)
        until(partial(ends_with, phases, phase))
    waiting.join(60)
    assert phases == ["waiting", "running", "retrying", "running", "succeeded"]
    assert outcome[0][1] == 0


def test_a_job_that_never_ran_has_a_code_of_ours(server: ApiServer, shoal: Shell, cluster: Cluster) -> None:
    for name, reason, code in (("late", "DeadlineExceeded", 124), ("unsent", "SubmissionFailed", 4)):
        made(cluster, name)
        status = {"jobDeploymentStatus": "Failed", "reason": reason, "message": "why"}
        server.patch_status("rayjobs", cluster.namespace, name, status)
        assert shoal("wait", name)[0] == code
    made(cluster, "refused")
    status = {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "the rules"}
    server.patch_status("rayjobs", cluster.namespace, "refused", status)
    code, out, _ = shoal("wait", "refused")
    assert code == 4 and "refused refused, exit code 4: the rules" in out
    made(cluster, "never")
    code, _, err = shoal("wait", "never", "--timeout", "0.5")
    assert code == 124 and "never has not ended in the time given" in err


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
    server.patch_status("rayclusters", cluster.namespace, "first-abcde", {"readyWorkerReplicas": 1})
    assert explain(cluster, find_job(cluster, "first")).reasons == [
        "2 pods: no node takes it (0/3 nodes are available: 3 Insufficient gpu.)",
        "1 pod: image shoal:0.1.0 cannot be pulled (Back-off pulling image)",
        "1 of 3 nodes are ready",
    ]


KUEUE = {"workloads": "Workload", "localqueues": "LocalQueue"}


def install_kueue(server: ApiServer) -> None:
    """Kueue's two objects that jobs ask about, of any content."""
    for plural, kind in KUEUE.items():
        schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        version = {"name": "v1beta1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
        names = {"plural": plural, "kind": kind, "singular": kind.lower(), "listKind": f"{kind}List"}
        spec = {"group": "kueue.x-k8s.io", "scope": "Namespaced", "names": names, "versions": [version]}
        body = {"metadata": {"name": f"{plural}.kueue.x-k8s.io"}, "spec": spec}
        body |= {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
        server.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body)
    for plural in KUEUE:
        path = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/default/{plural}"
        server._until(lambda path=path: server.request("GET", path, quiet=True) is not None)


def test_a_queued_job_says_what_the_queue_says_and_never_starts_once_cancelled(
    server: ApiServer, cluster: Cluster
) -> None:
    job = made(cluster, "first", queue="team-a", suspend=True)
    assert "cannot" in explain(cluster, job).reasons[0] or "does not have" in explain(cluster, job).reasons[0]
    install_kueue(server)
    assert explain(cluster, job).reasons == [f"there is no LocalQueue team-a in namespace {cluster.namespace}"]
    path, meta = (
        f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{cluster.namespace}",
        {"apiVersion": "kueue.x-k8s.io/v1beta1"},
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


def test_a_waiting_job_that_is_cancelled_is_suspended(cluster: Cluster) -> None:
    cancel(cluster, made(cluster, "first"))
    assert find_job(cluster, "first")["spec"]["suspend"] is True
    assert summarize(find_job(cluster, "first")).phase == "cancelled"


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


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


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


def test_a_server_that_is_not_there_is_one_sentence(
    shoal: Shell, server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    code, _, err = shoal("list")
    assert code == 4 and "https://127.0.0.1:1 does not answer (" in err and err.count("\n") == 1
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, _, err = shoal("list")
    assert code == 5 and "no kubeconfig can be used" in err
    (tmp_path / "bad").write_text("a: [")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "bad"))
    code, _, err = shoal("list")
    assert code == 3 and "kubeconfig cannot be read" in err


@pytest.mark.slow
def test_a_thousand_jobs_are_listed(cluster: Cluster, shoal: Shell) -> None:
    manifest = job_manifest()
    for index in range(1000):
        manifest["metadata"]["name"] = f"job-{index}"
        cluster.post(cluster.ray("rayjobs"), manifest)
    begun = time.monotonic()
    code, out, _ = shoal("list", "-o", "json")
    print(f"listed in {time.monotonic() - begun:.2f} s")
    assert code == 0 and len(json.loads(out)) == 1000
