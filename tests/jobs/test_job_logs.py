"""Following a job's log through trouble, which a proxy before a real API server makes: no line is lost or repeated."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
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
from kube_kubelet import Kubelet, Log, make_pod, set_pod
from kube_proxy import Fate, Proxy
from kube_server import ApiServer

from shoal.jobs.kube import api, patience
from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.logs import logs
from shoal.workers.errors import ClusterRefused, NotFound


def followed(cluster: Cluster, name: str, **options: Any) -> tuple[threading.Thread, list[bytes]]:
    """``logs -f`` in a thread, and the lines that it writes."""
    lines: list[bytes] = []
    thread = threading.Thread(target=lambda: logs(cluster, name, lines.append, follow=True, **options), daemon=True)
    thread.start()
    return thread, lines


@pytest.mark.slow
def test_a_log_is_followed_whenever_the_server_goes_away(
    server: ApiServer, kubelet: Kubelet, cluster: Cluster, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(cluster, "first")
    seen = proxy.cluster(cluster.namespace, monkeypatch)

    def away() -> None:
        before = len(proxy.asked)
        proxy.fate = lambda method, path: "away"
        until(lambda: len(proxy.asked) > before + 5)  # a request is tried four times
        proxy.fate = lambda method, path: None

    thread, lines = followed(seen, "first")
    until(lambda: len(proxy.asked) > 3)
    away()  # while there is no pod
    log = kubelet.logs["first-pod"] = Log()
    log.write("before", 0)
    make_pod(server, cluster.namespace, "first-pod", {"job-name": "first"}, {"running": {}}, phase="Running")
    until(lambda: len(lines) == 1)
    log.write("between", 1)
    log.ended = True
    set_pod(server, cluster.namespace, "first-pod", {"terminated": {"exitCode": 1}}, phase="Failed")
    until(lambda: len(lines) == 2)
    away()  # while the job has not ended, and its pod has
    assert thread.is_alive()
    again = kubelet.logs["first-again"] = Log(ended=True)
    again.write("after", 2)
    make_pod(server, cluster.namespace, "first-again", {"job-name": "first"}, {"terminated": {}}, phase="Succeeded")
    until(lambda: len(lines) == 3)
    ended(server, cluster, "first", "SUCCEEDED")
    thread.join(30)
    assert not thread.is_alive() and lines == [b"before\n", b"between\n", b"after\n"]
    # a log that is not followed is not waited for
    before = len(proxy.asked)
    proxy.fate = lambda method, path: "away" if path.partition("?")[0].endswith("/log") else None
    with pytest.raises(ClusterRefused, match="does not answer"):
        logs(seen, "first", lines.append)
    assert sum("/log?" in path for _, path in proxy.asked[before:]) == 1


def told_by_ray(number: int, *text: str) -> list[str]:
    """What `ray job` says itself, each time with another time, and text of the job's."""
    said = f"2026-11-25 21:59:{number:02},948\tINFO cli.py:42 -- Job submission server address: http://head:8265"
    return [said, *text]


@pytest.mark.parametrize("tail", [None, 5, 0])
def test_a_submitter_that_takes_anothers_place_repeats_no_line(
    server: ApiServer, kubelet: Kubelet, cluster: Cluster, tail: int | None
) -> None:
    """However near to its end the log of the first one was begun with."""
    kind = "whole" if tail is None else str(tail)
    job = f"first-{kind}"
    made(cluster, job, retries=1)

    def tell(identity: str, state: str = "RUNNING", deployment: str = "Running") -> None:
        status = {"jobId": identity or None, "jobStatus": state or None, "jobDeploymentStatus": deployment}
        server.patch_status("rayjobs", cluster.namespace, job, status)

    def submitter(name: str, lines: list[str], ended: bool) -> None:
        name = f"{name}-{kind}"
        log = kubelet.logs[name] = Log(ended=ended)
        for index, text in enumerate(lines):
            log.write(text, index)
        state = {"terminated": {"exitCode": 1}} if ended else {"running": {}}
        make_pod(server, cluster.namespace, name, {"job-name": job}, state, phase="Failed" if ended else "Running")

    def end(name: str) -> None:
        kubelet.logs[f"{name}-{kind}"].ended = True
        set_pod(server, cluster.namespace, f"{name}-{kind}", {"terminated": {"exitCode": 1}}, phase="Failed")

    steps = [f"step {index // 3}" for index in range(60)]
    broken = ["Traceback (most recent call last):", "ConnectionError: the node went away"]
    one, two = told_by_ray(1, *steps[:40], *broken), told_by_ray(2, *steps)
    tell("a")
    submitter("one", one, ended=False)
    thread, lines = followed(cluster, job, tail=tail)
    shown = one if tail is None else one[len(one) - tail :]
    first = kubelet.logs[f"one-{kind}"]
    until(lambda: len(lines) == len(shown) and any(asked.get("follow") == "true" for asked in first.asked))
    end("one")
    submitter("two", two, ended=False)
    until(lambda: len(lines) == len(shown) + 1 + 20)
    end("two")
    tell("", "", "Retrying")
    tell("b")  # begun again, so that it says the same anew
    submitter("three", told_by_ray(3, *steps), ended=True)
    tell("b", "SUCCEEDED", "Complete")
    thread.join(30)
    wanted = [*shown, two[0], *steps[40:], *told_by_ray(3, *steps)]
    assert not thread.is_alive() and b"".join(lines).decode().splitlines() == wanted


def test_a_job_that_is_silent_for_long_is_followed_on(
    server: ApiServer, kubelet: Kubelet, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may compile or load for minutes; the server that is asked is there all the time."""
    monkeypatch.setattr(api, "SILENCE", 0.2)
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    made(cluster, "first")
    log = kubelet.logs["silent"] = Log()
    log.write("before", 0)
    make_pod(server, cluster.namespace, "silent", {"job-name": "first"}, {"running": {}}, phase="Running")
    thread, lines = followed(cluster, "first")
    until(lambda: len(log.asked) > 5)
    assert thread.is_alive()
    log.write("after", 1)
    until(lambda: len(lines) == 2)
    log.ended = True
    set_pod(server, cluster.namespace, "silent", {"terminated": {"exitCode": 0}}, phase="Succeeded")
    ended(server, cluster, "first", "SUCCEEDED")
    thread.join(30)
    assert not thread.is_alive() and lines == [b"before\n", b"after\n"]


def test_a_line_without_a_time_is_passed_through(
    server: ApiServer, kubelet: Kubelet, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(cluster, "first")
    log = kubelet.logs["untimed"] = Log(ended=True)
    for index, text in enumerate(("one", "two", "three")):
        log.write(text, index)
        log.write(f"failed to watch {text}", None)
    make_pod(server, cluster.namespace, "untimed", {"job-name": "first"}, {"terminated": {}}, phase="Succeeded")
    lines: list[bytes] = []
    logs(cluster, "first", lines.append)
    assert b"".join(lines).decode().splitlines() == [
        "one", "failed to watch one", "two", "failed to watch two", "three", "failed to watch three"
    ]  # fmt: skip


def test_a_container_beside_the_one_with_the_log_does_not_count(
    server: ApiServer, kubelet: Kubelet, cluster: Cluster
) -> None:
    made(cluster, "first", submission_mode="SidecarMode")
    server.patch_status("rayjobs", cluster.namespace, "first", {"rayClusterName": "first-abcde"})
    labels = {"ray.io/cluster": "first-abcde", "ray.io/node-type": "head"}
    containers = [{"name": name, "image": "shoal:0.1.0"} for name in ("ray-head", "ray-job-submitter")]
    body = {"metadata": {"name": "both", "labels": labels}, "spec": {"nodeName": "node-1", "containers": containers}}
    cluster.post(cluster.core("pods"), body)
    one = {"image": "shoal:0.1.0", "imageID": "", "ready": False, "restartCount": 0}
    states = {"ray-head": {"running": {}}, "ray-job-submitter": {"waiting": {"reason": "ContainerCreating"}}}

    def tell() -> None:
        told = [{**one, "name": name, "state": state} for name, state in states.items()]
        path = cluster.core("pods", "both") + "/status"
        server.request("PATCH", path, {"status": {"containerStatuses": told}}, content="application/merge-patch+json")

    tell()
    lines: list[bytes] = []
    with pytest.raises(NotFound, match="first is waiting and has no log"):
        logs(cluster, "first", lines.append)
    kubelet.logs["both"] = Log(ended=True)
    kubelet.logs["both"].write("hello", 0)
    states["ray-job-submitter"] = {"running": {}}
    tell()
    logs(cluster, "first", lines.append)
    assert lines == [b"hello\n"]


def forbidden(body: bytes, _identity: str) -> Fate:
    return 403, body


def ray_says(answer: Callable[[str], Fate]) -> Callable[[str, str], Fate]:
    """A fate in which Ray's job API says ``answer(job's id)`` for its log."""

    def fate(method: str, path: str) -> Fate:
        return answer(path.split("/")[-2]) if path.endswith("/logs") else None

    return fate


def test_a_log_that_ray_gives_whole_is_shown_line_by_line_once(
    server: ApiServer, cluster: Cluster, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(cluster, "first", submission_mode="HTTPMode", auth="off")
    seen, texts, said = proxy.cluster(cluster.namespace, monkeypatch), dict[str, str](), list[str]()
    proxy.fate = ray_says(lambda identity: (200, json.dumps({"logs": texts.get(identity, "")}).encode()))

    def tell(identity: str, job: str = "RUNNING", deployment: str = "Running") -> None:
        status = {"jobId": identity, "dashboardURL": "x.y.svc:8265", "jobStatus": job}
        server.patch_status("rayjobs", cluster.namespace, "first", {**status, "jobDeploymentStatus": deployment})

    thread, lines = followed(seen, "first", tail=2, told=said.append)
    until(lambda: bool(said))  # why there is none
    texts["a"] = "zero\none\n10%\r20%\u2028\x85\x0c\nhalf"
    tell("a")
    until(lambda: len(lines) == 2)
    texts["a"] += " a line\nthree\nfour\nfive\n"
    until(lambda: len(lines) == 6)
    texts["b"] = "anew\n"
    tell("b")
    until(lambda: len(lines) == 7)
    texts["b"] += "the end"
    tell("b", "SUCCEEDED", "Complete")
    thread.join(30)
    assert b"".join(lines).decode() == ("one\n10%\r20%\u2028\x85\x0c\nhalf a line\nthree\nfour\nfive\nanew\nthe end\n")
    for body, says in (
        (b'{"kind": "Status", "message": "services is forbidden"}', "not allowed: services is forbidden"),
        (b"Forbidden: Invalid authentication token", "the Ray of first does not take the token that it was sent"),
    ):
        proxy.fate = ray_says(partial(forbidden, body))
        with pytest.raises(ClusterRefused, match=says):
            logs(seen, "first", lines.append, follow=True)
