"""The verbs of ``shoal job`` against a real API server: what they do there, what they say, how they exit."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_request import job_manifest, service_manifest
from kube_fixtures import (  # noqa: F401  # fixtures are found by their names
    Shell,
    cluster_fixture,
    ended,
    made,
    server_fixture,
    shoal_fixture,
    until,
)
from kube_server import ApiServer

from shoal.jobs.kube import api
from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.ending import wait
from shoal.jobs.kube.status import summarize
from shoal.jobs.kube.submit import cancel, find_job, list_jobs, submit
from shoal.workers.errors import ClusterRefused

CPU = ("--recipe", "tiny", "--gpus-per-node", "0", "--volume", "runs:/mnt/shoal")


def holds(there: Any, sent: Any) -> bool:
    """Whether all that was sent is there; the server adds defaults."""
    if isinstance(sent, dict):
        return all(key in there and holds(there[key], value) for key, value in sent.items())
    if isinstance(sent, list):
        return len(there) == len(sent) and all(map(holds, there, sent))
    return bool(there == sent)


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
    assert yaml.safe_load(shoal("list", "-o", "yaml")[1]) == json.loads(out)
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
    "options",
    [
        {},
        {
            "working_dir": ".",
            "volume": ["runs:/mnt/shoal", "secret/keys:/etc/keys"],
            "env": ["A=b"],
            "secret": ["K=a:b"],
        },
        {"tls_secret": "ray-ca", "pull_secret": ["regcred"], "toleration": ["a:NoSchedule"], "label": ["team=nlp"]},
    ],
    ids=["plain", "code", "tls"],
)
def test_kubernetes_takes_the_pods_of_a_job(options: dict[str, Any], cluster: Cluster, tmp_path: Path) -> None:
    """It looks closer at a pod than at one within a RayJob: mounts without volumes, paths mounted twice, and so on."""
    if "working_dir" in options:
        (tmp_path / "a.py").touch()
        options = {**options, "working_dir": str(tmp_path)}
    spec = job_manifest(**options)["spec"]
    ray = spec["rayClusterSpec"]
    templates = [ray["headGroupSpec"]["template"], *(group["template"] for group in ray["workerGroupSpecs"])]
    for name, template in zip(("head", "worker", "submitter"), [*templates, spec["submitterPodTemplate"]], strict=True):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**pod.get("metadata", {}), "name": name}
        assert cluster.post(cluster.core("pods"), pod, dryRun="All")["metadata"]["name"] == name
    pod["spec"] = {**templates[0]["spec"], "volumes": []}
    with pytest.raises(ClusterRefused, match="volumeMounts"):
        cluster.post(cluster.core("pods"), pod, dryRun="All")


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


def test_a_job_and_a_service_of_one_name_are_told_apart(shoal: Shell, cluster: Cluster) -> None:
    made(cluster, "first")
    serve = ("submit", "serve", "first", "--volume", "runs:/mnt", "--insecure", "--name", "first")
    code, _, err = shoal(*serve)
    assert code == 4 and "has a rayjob first: choose another --name" in err
    cluster.post(cluster.ray("rayservices"), service_manifest(name="first"))  # as by kubectl
    for verb in ("status", "logs", "wait", "cancel", "delete", "resubmit"):
        code, out, err = shoal(verb, "first")
        assert (code, out) == (3, "") and "say which, by rayjob/first or rayservice/first" in err
    kinds = [json.loads(shoal("status", f"{kind}/first", "-o", "json")[1])["kind"] for kind in ("rayjob", "rayservice")]
    assert kinds == ["train", "serve"]
    assert shoal("delete", "rayservice/first")[1] == "first deleted\n"
    assert json.loads(shoal("status", "first", "-o", "json")[1])["kind"] == "train"


def test_every_kind_of_job_is_submitted(shoal: Shell, cluster: Cluster) -> None:
    """Each with arguments of its own: generate's --output is a file, and how the result is printed another thing."""
    shared = ("--volume", "runs:/mnt", "-o", "json")
    files = ("--input", "/mnt/in.jsonl", "--output", "/mnt/out.jsonl")
    for arguments in (("evaluate", "first"), ("generate", "first", *files), ("serve", "first", "--insecure")):
        code, out, err = shoal("submit", *arguments, *shared, "--name", arguments[0])
        assert code == 0, err
        assert json.loads(out)["kind"] == arguments[0]
    entrypoint = find_job(cluster, "generate")["spec"]["entrypoint"]
    assert entrypoint == "shoal generate first --input /mnt/in.jsonl --output /mnt/out.jsonl --runs-dir /mnt/runs"


@pytest.mark.parametrize("name", ["", "rayjob/"])
@pytest.mark.parametrize("verb", ["status", "delete", "cancel", "logs", "wait", "resubmit", "dashboard"])
def test_a_name_that_is_empty_is_no_list(verb: str, name: str, shoal: Shell, cluster: Cluster) -> None:
    """As of a variable that a script has not set: the path of a job would be that of all jobs."""
    code, out, err = shoal(verb, name)
    assert (code, out) == (3, "") and f"NAME {name!r} names no job: `shoal job list" in err


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
    cluster.delete(cluster.core("configmaps", "first-code"))
    code, _, err = shoal("resubmit", "first", "--name", "third")
    assert code == 5 and "the local code of first is gone, its ConfigMap first-code: submit the job again" in err


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
    annotations = {"team/cost-centre": "7", "kubectl.kubernetes.io/last-applied-configuration": "{}"}
    cluster.patch(cluster.ray("rayjobs", "first"), {"metadata": {"annotations": annotations}})
    ended(server, cluster, "first", "FAILED", "Job entrypoint command failed with exit code 1. No logs available.")
    code, out, err = shoal("resubmit", "first", "--from-checkpoint", "--name", "second", "-o", "json")
    assert code == 0, err
    assert json.loads(out)["run"] == "first"
    assert find_job(cluster, "second")["spec"]["entrypoint"] == find_job(cluster, "first")["spec"]["entrypoint"]
    assert find_job(cluster, "second")["metadata"]["annotations"] == {
        "shoal/run": "first", "shoal/resubmits": "first", "team/cost-centre": "7"
    }  # fmt: skip
    code, out, _ = shoal("resubmit", "first", "-o", "json")
    fresh = json.loads(out)
    assert fresh["name"].startswith("first-") and fresh["run"] == fresh["name"]
    assert f"--name {fresh['name']} --or-resume" in find_job(cluster, fresh["name"])["spec"]["entrypoint"]


def test_a_job_that_may_run_again_or_is_not_of_our_command_is_not_resubmitted(shoal: Shell, cluster: Cluster) -> None:
    made(cluster, "queued", queue="team-a", suspend=True)
    code, _, err = shoal("resubmit", "queued", "--from-checkpoint")
    assert code == 4 and "queued is queued, and two jobs must not write one run" in err
    manifest = job_manifest(name="patched")
    manifest["spec"]["entrypoint"] = "sh -c 'shoal train'"
    submit(cluster, [manifest])
    code, _, err = shoal("resubmit", "patched")
    assert code == 3 and "of patched was not written by Shoal, so its run cannot be named anew" in err


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
    code, _, err = shoal("wait", "never", "--timeout", "0.5", "--context", "admin")
    assert code == 124 and "never has not ended in the time given" in err
    assert f"`shoal job status never --context admin --namespace {cluster.namespace}` shows it" in err


def test_a_waiting_job_that_is_cancelled_is_suspended(cluster: Cluster) -> None:
    cancel(cluster, made(cluster, "first"))
    assert find_job(cluster, "first")["spec"]["suspend"] is True
    assert summarize(find_job(cluster, "first")).phase == "cancelled"


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
    begun, computed = time.monotonic(), time.process_time()
    code, out, _ = shoal("list", "-o", "json")
    print(f"listed in {time.monotonic() - begun:.2f} s, {time.process_time() - computed:.2f} s of them here")
    assert code == 0 and len(json.loads(out)) == 1000
