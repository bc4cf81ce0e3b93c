"""Trouble on the way to the API server, which a proxy before a real one makes: what is waited for, and what is said."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from kube_fixtures import (  # noqa: F401  # fixtures are found by their names
    cluster_fixture,
    ended,
    kubelet_fixture,
    made,
    proxy_fixture,
    server_fixture,
    until,
)
from kube_proxy import Proxy
from kube_server import ApiServer

from shoal.jobs.kube import patience
from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.ending import wait
from shoal.jobs.kube.manifest import checked_objects
from shoal.jobs.kube.options import resolve_options
from shoal.jobs.kube.place import Namespace
from shoal.jobs.kube.ray_api import ray_job, token_of
from shoal.jobs.kube.submit import find_job, list_jobs, submit
from shoal.jobs.kube.work import train
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, TimedOut


@pytest.mark.parametrize("kind", ["rayjobs", "configmaps"])
def test_a_submission_whose_answer_is_lost_is_found(
    cluster: Cluster, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, kind: str, tmp_path: Path
) -> None:
    objects = job_with_code(f"lost-{kind}-job", tmp_path)
    proxy.fate = lambda method, path: "lost" if method == "POST" and path.endswith(kind) else None
    job = submit(proxy.cluster(cluster.namespace, monkeypatch), objects)
    config = cluster.get(cluster.core("configmaps", f"lost-{kind}-job-code"))
    assert config["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    assert [method for method, path in proxy.asked if path.endswith(kind)] == ["POST"], "asked once"


@pytest.mark.parametrize("kind", ["rayjobs", "configmaps"])
@pytest.mark.parametrize("status", [403, 503, 0])
def test_a_submission_that_fails_halfway_leaves_nothing_and_says_why(
    cluster: Cluster, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, kind: str, status: int, tmp_path: Path
) -> None:
    name = f"half-{kind}-{status}"
    objects, body = job_with_code(name, tmp_path), json.dumps({"message": "not today"}).encode()
    seen = proxy.cluster(cluster.namespace, monkeypatch)
    if status:
        proxy.fate = lambda method, path: (status, body) if method == "POST" and path.endswith(kind) else None
    else:  # Ctrl-C while the request is on its way, which has arrived
        post = seen.post

        def interrupted(path: str, body: Any, **query: Any) -> Any:
            found = post(path, body, **query)
            if path.endswith(kind) and not query:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(seen, "post", interrupted)
    with pytest.raises(ClusterRefused if status else KeyboardInterrupt, match="not today" if status else None):
        submit(seen, objects)
    assert name not in {each["metadata"]["name"] for each in list_jobs(cluster)}
    for each in cluster.items(cluster.core("configmaps")):  # there is no garbage collector here: owned is gone
        assert each["metadata"]["name"] != f"{name}-code" or each["metadata"]["ownerReferences"]


def job_with_code(name: str, folder: Path) -> list[Any]:
    (folder / "a.py").write_text("x = 1\n")
    given = {"name": name, "volume": ["runs:/mnt"], "gpus_per_node": 0, "working_dir": str(folder)}
    options = resolve_options(given)
    return checked_objects(train(options, "tiny"), options)


def error_event(code: int) -> bytes:
    status = {"kind": "Status", "apiVersion": "v1", "code": code, "message": "etcd is unhappy"}
    return json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"


@pytest.mark.parametrize("body", [b"", error_event(500), error_event(410)], ids=["ends", "error", "gone"])
def test_watches_that_end_at_once_are_not_asked_for_again_and_again(
    cluster: Cluster, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 2.0)
    name = f"job-{len(list_jobs(cluster))}"
    made(cluster, name)
    proxy.fate = lambda method, path: (200, body) if "watch=true" in path else None
    with pytest.raises(ClusterRefused, match=r"it was away for 2 s"):
        wait(proxy.cluster(cluster.namespace, monkeypatch), name)
    assert 3 <= sum("watch=true" in path for _, path in proxy.asked) <= 6


@pytest.mark.timeout(100)
def test_a_wait_ends_in_its_time_though_the_server_answers_nothing(
    cluster: Cluster, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is overloaded takes connections, and each answer may be waited for 30 s, four times."""
    made(cluster, "first")
    silent = threading.Event()
    proxy.fate = lambda method, path: "away" if silent.wait(120) else None
    proxied = proxy.cluster(cluster.namespace, monkeypatch)
    with pytest.raises(ClusterRefused, match="does not answer"):
        Namespace("admin", cluster.namespace).wait("first", 1, print)
    proxy.fate = lambda method, path: ("away" if silent.wait(120) else None) if "watch=true" in path else None
    with pytest.raises(TimedOut, match="has not ended in the time given"):
        wait(proxied, "first", 2)
    silent.set()


@pytest.mark.parametrize(("told", "code"), [({"driver_exit_code": 0}, 1), ({"driver_exit_code": 7}, 7), ({}, 1)])
def test_a_job_that_failed_does_not_exit_with_0(
    server: ApiServer,
    cluster: Cluster,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, int],
    code: int,
) -> None:
    name = f"ends-{len(list_jobs(cluster))}"
    made(cluster, name, auth="off")
    address = {"jobId": "a", "dashboardURL": f"{name}-head-svc:8265", "reason": "AppFailed"}
    ended(server, cluster, name, "FAILED", "Unexpected error occurred: The actor died.", **address)
    proxy.fate = lambda method, path: (200, json.dumps(told).encode()) if "/proxy/" in path else None
    assert wait(proxy.cluster(cluster.namespace, monkeypatch), name)[1] == code


@pytest.mark.parametrize(
    ("entry", "token"),
    [
        (b"a-token-of-ray\n", "a-token-of-ray"),
        (b"two\nlines", None),
        (b"a token", None),
        ("t\u00f6ken".encode(), None),
        (b"\xff\xfe", None),
    ],
)
def test_a_token_that_cannot_be_sent_is_not_shown(cluster: Cluster, entry: bytes, token: str | None) -> None:
    name = f"secret-{entry.hex()}"
    job: Any = {"spec": {"rayClusterSpec": {"authOptions": {"mode": "token", "secretName": name}}}}
    body = {"metadata": {"name": name}, "data": {"auth_token": base64.b64encode(entry).decode()}}
    cluster.post(cluster.core("secrets"), body)
    if token is not None:
        assert token_of(cluster, job) == token
        return
    with pytest.raises(InvalidInput) as refused:
        token_of(cluster, job)
    assert str(refused.value) == (
        f"entry auth_token of the Secret {name} cannot be sent as a token: write printable ASCII without spaces to it"
    )


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (401, b"Unauthorized: Missing authentication token", ClusterRefused, "the Ray of asked asks for a token, and"),
        (
            404,
            b"Job asked-1 does not exist",
            NotFound,
            "the Ray of asked does not know it (Job asked-1",
        ),
        (500, b"Traceback\nValueError: no", ClusterRefused, "the Ray of asked refused it (ValueError: no)"),
        (404, b'{"kind": "Status", "message": "services \\"x\\" not found"}', NotFound, 'services "x" not found'),
    ],
)
def test_what_ray_refuses_is_not_said_to_be_the_api_servers(
    server: ApiServer, cluster: Cluster, proxy: Proxy, monkeypatch: pytest.MonkeyPatch,
    status: int, body: bytes, kind: type[Exception], says: str,
) -> None:  # fmt: skip
    if not any(each["metadata"]["name"] == "asked" for each in list_jobs(cluster)):
        made(cluster, "asked", auth="off")
    told = {"jobId": "asked-1", "dashboardURL": "x.y.svc:8265", "jobStatus": "RUNNING"}
    server.patch_status("rayjobs", cluster.namespace, "asked", {**told, "jobDeploymentStatus": "Running"})
    seen = proxy.cluster(cluster.namespace, monkeypatch)
    proxy.fate = lambda method, path: (status, body) if "/proxy/" in path else None
    with pytest.raises(kind) as refused:
        ray_job(seen, find_job(seen, "asked"))
    assert says in str(refused.value)
