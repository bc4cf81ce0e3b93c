"""From ``shoal job submit`` to the job's exit code: a real API server, a real Ray with a token, real training.

The operator of ``kube_operator`` stands for KubeRay: no nodes are here to run its pods on.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_kubelet import Kubelet
from kube_operator import API_TOKEN, Operator, RayHead
from kube_server import ApiServer
from ports import free_port
from shell import shoal, started, steps_done, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMESPACE = "team"
SMALL = ("train.steps=60", "train.batch=2", "train.sequence=64", "train.eval_every=0", "checkpoint.every=5")


@pytest.fixture(scope="module")
def place(api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("end")
    api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    with contextlib.ExitStack() as closing:
        kubelet = Kubelet(api_server, folder, "node-end")
        closing.callback(kubelet.close)
        ray = RayHead(folder)
        closing.callback(ray.close)
        closing.callback(Operator(api_server, kubelet, ray, NAMESPACE, folder).close)
        yield {"server": api_server, "folder": folder, "ray": ray}


def job(place: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    """``shoal job ARGUMENTS`` in the namespace."""
    config = str(place["server"].kubeconfig)
    return shoal("job", *arguments, "--namespace", NAMESPACE, cwd=place["folder"], KUBECONFIG=config)


def train(place: dict[str, Any], name: str, *more: str) -> tuple[str, ...]:
    """Arguments that submit a small training on two CPU ranks."""
    sets = [part for each in SMALL for part in ("--set", each)]
    cpu = ("--gpus-per-node", "0", "--volume", f"runs:{place['folder']}", "--name", name)
    return ("submit", "train", "--recipe", "tiny", *sets, *cpu, *more)


def test_a_job_that_exits_7_makes_waiting_exit_7(place: dict[str, Any], tmp_path: Path) -> None:
    patch = tmp_path / "patch.yaml"
    patch.write_text("spec:\n  entrypoint: bash -c \"echo 'two words'; exit 7\"\n")
    result = job(place, *train(place, "seven", "--patch", str(patch), "--wait", "--timeout", "240"))
    assert result.returncode == 7, result.stderr
    assert "seven failed, exit code 7" in result.stdout
    job_of_ray = place["ray"].ask("GET", "/api/jobs/seven-1")
    assert job_of_ray["driver_exit_code"] == 7
    assert "two words" in job(place, "logs", "seven").stdout.splitlines()


def test_the_log_of_a_job_without_a_submitter_is_rays(place: dict[str, Any], tmp_path: Path) -> None:
    patch = tmp_path / "patch.yaml"
    patch.write_text("spec:\n  entrypoint: bash -c 'for i in 1 2 3; do echo line $i; sleep 0.5; done'\n")
    result = job(place, *train(place, "http", "--patch", str(patch), "--submission-mode", "HTTPMode"))
    assert result.returncode == 0, result.stderr
    assert job(place, "wait", "http", "--timeout", "240").returncode == 0
    lines = job(place, "logs", "-f", "http").stdout.splitlines()
    assert [line for line in lines if line.startswith("line")] == ["line 1", "line 2", "line 3"]
    assert job(place, "logs", "http", "--tail", "1").stdout == "line 3\n"


def test_a_job_is_preempted_cancelled_and_resubmitted_and_trains_to_its_end(place: dict[str, Any]) -> None:
    folder: Path = place["folder"]
    run, config = folder / "runs" / "first", str(place["server"].kubeconfig)
    result = job(place, *train(place, "first"))
    assert result.returncode == 0, result.stderr
    follow = ("job", "logs", "-f", "first", "--namespace", NAMESPACE)
    with started(*follow, cwd=folder, KUBECONFIG=config) as following:
        wait_until(lambda: steps_done(run) >= 11, following)
        path = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs/first"
        kind = "application/merge-patch+json"
        place["server"].request("PATCH", path, {"spec": {"suspend": True}}, content=kind)
        suspended = lambda: "suspended" in job(place, "status", "first").stdout  # noqa: E731
        wait_until(suspended, following)
        before = steps_done(run)
        assert before < 60
        place["server"].request("PATCH", path, {"spec": {"suspend": False}}, content=kind)
        wait_until(lambda: steps_done(run) > before, following)
        assert job(place, "cancel", "first").returncode == 0
        ended = job(place, "wait", "first", "--timeout", "240")
        assert ended.returncode == 130, (ended.stdout, ended.stderr)
        out, err = following.communicate(timeout=240)
        assert following.returncode == 0, err
    assert out.count("run      ") >= 2, "the log of both attempts is there"
    assert steps_done(run) < 60
    result = job(place, "resubmit", "first", "--from-checkpoint", "--name", "second")
    assert result.returncode == 0, result.stderr
    ended = job(place, "wait", "second", "--timeout", "240")
    assert ended.returncode == 0, (ended.stdout, ended.stderr, job(place, "logs", "second").stdout)
    assert steps_done(run) == 60
    assert job(place, "wait", "first").returncode == 130, "told from what KubeRay noted down"


def test_the_configuration_of_a_service_is_deployed_by_ray_serve_and_answers(place: dict[str, Any]) -> None:
    """What KubeRay does with a RayService: it hands serveConfigV2 to Ray's dashboard. The run is the one above."""
    ray, port = place["ray"], free_port()
    options = ("--volume", f"runs:{place['folder']}", "--secret", "SHOAL_API_TOKEN=tokens:one", "--name", "served")
    result = job(place, "render", "serve", "first", *options)
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(yaml.safe_load(result.stdout)["spec"]["serveConfigV2"])
    config["http_options"]["port"] = port  # the usual ones may be taken on this machine
    config["applications"][0]["args"]["grpc_port"] = free_port()
    assert ray.put("/api/serve/applications/", config) == 200
    end = time.monotonic() + 240
    while (state := ray.ask("GET", "/api/serve/applications/")["applications"]["shoal"])["status"] != "RUNNING":
        assert state["status"] != "DEPLOY_FAILED" and time.monotonic() < end, state
        time.sleep(0.5)
    body = json.dumps({"model": "first", "prompt": "def ", "max_tokens": 4}).encode()
    headers = {"Authorization": f"Bearer {API_TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 4
    del request.headers["Authorization"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=30)
