"""``shoal job render``: what a manifest holds, where options come from, and what is refused before there is one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_fixtures import Shell, here_fixture  # noqa: F401  # fixtures are found by their names
from job_request import job_manifest, service_manifest
from shell import shoal

from shoal.jobs.estimate import estimate
from shoal.jobs.kube import work
from shoal.jobs.kube.manifest import checked_objects
from shoal.jobs.kube.options import resolve_options
from shoal.jobs.kube.quantity import to_bytes
from shoal.jobs.memory import beyond, exchanging, gib, memory_of
from shoal.jobs.recipe import check_recipe, load_recipe
from shoal.workers.errors import InvalidInput

CPU = ("--gpus-per-node", "0", "--volume", "runs:/mnt/shoal")
GPU = ("--gpus-per-node", "8", "--volume", "runs:/mnt/shoal")


def cluster_of(manifest: dict[str, Any]) -> Any:
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Head, worker and, where there is one, submitter."""
    cluster = cluster_of(manifest)
    pods = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    submitter = manifest["spec"].get("submitterPodTemplate")
    return [pod["spec"] for pod in [*pods, *([submitter] if submitter else [])]]


def test_a_training_job_asks_for_its_nodes_and_gives_each_rank_a_gpu(tmp_path: Path) -> None:
    result = shoal(
        "job", "render", "train", "--recipe", "deepseekmoe-2b", "--nodes", "2", *GPU, "--name", "first", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    manifest = yaml.safe_load(result.stdout)
    group = cluster_of(manifest)["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 8
    assert manifest["metadata"]["name"] == "first"
    assert cluster_of(manifest)["authOptions"] == {"mode": "token"}
    head = cluster_of(manifest)["headGroupSpec"]
    recipe = check_recipe(tomllib.loads(head["template"]["metadata"]["annotations"]["shoal/recipe"]))
    assert recipe == load_recipe("deepseekmoe-2b", overrides={"parallel.ranks": 16})
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:4] == ["shoal", "train", "--recipe", "/etc/shoal/recipe/recipe.toml"]
    options = dict(zip(words[2::2], words[3::2], strict=False))
    assert options["--name"] == "first"
    assert "--or-resume" in words and "/mnt/shoal/runs" in words and "/mnt/shoal/data" in words
    box = head["template"]["spec"]["containers"][0]
    assert {"name": "recipe", "mountPath": "/etc/shoal/recipe", "readOnly": True} in box["volumeMounts"]


def test_json_and_yaml_say_the_same(here: Shell) -> None:
    arguments = ("job", "render", "train", "--recipe", "tiny", *CPU, "--name", "first")
    as_yaml, as_json = here(*arguments), here(*arguments, "-o", "json")
    assert yaml.safe_load(as_yaml[1]) == json.loads(as_json[1]) == job_manifest()


def test_rendering_imports_neither_torch_nor_ray_nor_a_client() -> None:
    code = (
        "import sys\nfrom shoal.jobs.cli.main import app\n"
        f"try:\n    app(['job', 'render', 'train', '--recipe', 'tiny', *{CPU!r}])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('HEAVY', [name for name in ('torch', 'ray', 'kubernetes', 'numpy') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.endswith("HEAVY []\n"), result.stderr


def test_every_pod_has_what_all_pods_are_told() -> None:
    manifest = job_manifest(
        image="registry/shoal:1", pull_secret=["regcred"], service_account="trainer", node_selector=["pool=a100"],
        toleration=["nvidia.com/gpu:NoSchedule", "team=nlp"], env=["A=b=c"], secret=["TOKEN=keys:one", "whole"],
        priority="high",
    )  # fmt: skip
    for pod in pods_of(manifest):
        box = pod["containers"][0]
        assert box["image"] == "registry/shoal:1"
        assert pod["imagePullSecrets"] == [{"name": "regcred"}]
        assert pod["serviceAccountName"] == "trainer" and pod["priorityClassName"] == "high"
        assert pod["nodeSelector"] == {"pool": "a100"}
        assert pod["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "nlp"},
        ]
        assert {"name": "A", "value": "b=c"} in box["env"]
        assert {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "one"}}} in box["env"]
        assert box["envFrom"] == [{"secretRef": {"name": "whole"}}]


def test_a_pod_has_no_token_of_an_account_unless_something_needs_it(tmp_path: Path) -> None:
    assert [pod["automountServiceAccountToken"] for pod in pods_of(job_manifest())] == [False] * 3
    assert all("automountServiceAccountToken" not in pod for pod in pods_of(job_manifest(service_account="trainer")))
    patch = tmp_path / "patch.yaml"
    patch.write_text("spec: {rayClusterSpec: {enableInTreeAutoscaling: true}}")
    head, *others = pods_of(job_manifest(patch=[patch]))
    assert "automountServiceAccountToken" not in head, "the autoscaler asks the API server for pods"
    assert [pod["automountServiceAccountToken"] for pod in others] == [False] * 2


def test_pods_are_what_a_restricted_namespace_takes_and_may_write_to_a_new_claim() -> None:
    """The standard "restricted" of Kubernetes' pod security, and the group that a claim's files are given to."""
    for manifest in (job_manifest(), job_manifest(tls_secret="ray-ca"), service_manifest()):
        for pod in pods_of(manifest):
            whole = pod["securityContext"]
            assert whole["runAsNonRoot"] is True and whole["seccompProfile"] == {"type": "RuntimeDefault"}
            assert whole["runAsUser"] == whole["runAsGroup"] == whole["fsGroup"] == 1000, "the image's user"
            for box in [*pod["containers"], *pod.get("initContainers", [])]:
                assert box["securityContext"]["allowPrivilegeEscalation"] is False
                assert box["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for pod in pods_of(job_manifest(user=0)):
        assert pod["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
        assert "capabilities" not in pod["containers"][0]["securityContext"]


def test_with_tls_each_pod_of_ray_signs_itself_a_certificate_and_ray_never_sees_the_authority(tmp_path: Path) -> None:
    """What the certificate is good for, tests/k8s/test_chart_tls.py says."""
    patch = tmp_path / "patch.yaml"
    patch.write_text("spec: {rayClusterSpec: {enableInTreeAutoscaling: true}}")
    manifest = job_manifest(tls_secret="ray-ca", env=["A=b"], pull_policy="Always", patch=[patch])
    head, worker, submitter = pods_of(manifest)
    for pod in (head, worker):
        (box,), (maker,) = pod["containers"], pod["initContainers"]
        env = {each["name"]: each.get("value") for each in box["env"]}
        assert env["RAY_USE_TLS"] == "1" and env["A"] == "b"
        certificate = {m["mountPath"]: m["name"] for m in box["volumeMounts"] if m.get("readOnly")}["/etc/ray/tls"]
        assert {env[f"RAY_TLS_{each}"].rpartition("/")[0] for each in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")} == {
            "/etc/ray/tls"
        }
        (authority,) = [v["name"] for v in pod["volumes"] if v.get("secret") == {"secretName": "ray-ca"}]
        assert authority not in {m["name"] for m in box["volumeMounts"]}
        assert {m["name"]: m.get("readOnly", False) for m in maker["volumeMounts"]} == {
            authority: True,
            certificate: False,
        }
        assert (maker["image"], maker["imagePullPolicy"]) == (box["image"], "Always")
    assert "initContainers" not in submitter, "it speaks HTTP"
    scaler = cluster_of(manifest)["autoscalerOptions"]
    assert {"name": "RAY_USE_TLS", "value": "1"} in scaler["env"]
    assert scaler["volumeMounts"] == [{"name": certificate, "mountPath": "/etc/ray/tls", "readOnly": True}]
    assert all("initContainers" not in pod for pod in pods_of(job_manifest()))


def test_a_queue_takes_the_priority_for_itself() -> None:
    manifest = job_manifest(queue="team-a", priority="high")
    labels = manifest["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "team-a" and labels["kueue.x-k8s.io/priority-class"] == "high"
    assert all("priorityClassName" not in pod for pod in pods_of(manifest))
    assert manifest["spec"]["submitterPodTemplate"]["metadata"]["labels"] == {"shoal/kind": "train"}, (
        "a pod with a queue's name would wait there for itself"
    )


def test_volumes_and_shm_are_mounted_where_ranks_stand() -> None:
    manifest = job_manifest(volume=["runs:/mnt/runs", "corpus:/mnt/data:ro", "secret/keys:/keys", "/scratch:/fast"])
    for pod in pods_of(manifest)[:2]:
        declared = {each["name"]: each for each in pod["volumes"]}
        mounted = {each["mountPath"]: each for each in pod["containers"][0]["volumeMounts"]}
        assert declared[mounted["/mnt/data"]["name"]]["persistentVolumeClaim"] == {
            "claimName": "corpus",
            "readOnly": True,
        }
        assert mounted["/mnt/data"]["readOnly"] and "readOnly" not in mounted["/mnt/runs"]
        assert declared[mounted["/keys"]["name"]]["secret"] == {"secretName": "keys"}
        assert declared[mounted["/fast"]["name"]]["hostPath"] == {"path": "/scratch"}
        assert declared[mounted["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        assert {each["name"] for each in mounted.values()} == set(declared)


def test_evaluation_and_one_process_generation_stand_on_a_worker(here: Shell) -> None:
    gpu = ("--volume", "runs:/mnt")
    evaluation = yaml.safe_load(here("job", "render", "evaluate", "first", *gpu)[1])
    assert evaluation["spec"]["entrypointNumGpus"] == 1
    assert evaluation["spec"]["entrypoint"] == "shoal evaluate first --runs-dir /mnt/runs -o json"
    files = ("--input", "/mnt/in.jsonl", "--output", "/mnt/out put.parquet")
    alone = yaml.safe_load(here("job", "render", "generate", "first", *files, *gpu)[1])
    assert alone["spec"]["entrypointNumGpus"] == 1
    words = shlex.split(alone["spec"]["entrypoint"])  # as the pod's shell does
    assert words[words.index("--output") + 1] == "/mnt/out put.parquet"
    many = here("job", "render", "generate", "first", *files, *gpu, "--gpus-per-node", "4")
    spec = yaml.safe_load(many[1])["spec"]
    assert "entrypointNumGpus" not in spec and "--workers 4" in spec["entrypoint"]


def test_a_service_is_one_application_of_serve_behind_a_token() -> None:
    manifest = service_manifest(gpus_per_node=2)
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert config["applications"][0]["args"] == {"run": "first", "runs_dir": "/mnt/shoal/runs", "workers": 2}
    assert config["proxy_location"] == "HeadOnly"

    head = pods_of(manifest)[0]["containers"][0]
    assert {"name": "serve", "containerPort": 8000} in head["ports"]
    token = {"name": "SHOAL_API_TOKEN", "valueFrom": {"secretKeyRef": {"name": "tokens", "key": "one"}}}
    assert token in head["env"]


def test_a_service_has_as_many_ranks_as_it_has_places_for(here: Shell) -> None:
    def placed(placement: str, gpus: int) -> tuple[Any, str]:
        gpu = ("--gpus-per-node", str(gpus), "--placement", placement, "--insecure", "--volume", "runs:/mnt")
        manifest = yaml.safe_load(here("job", "render", "serve", "first", *gpu)[1])
        args = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"][0]["args"]
        return args.get("workers"), pods_of(manifest)[1]["containers"][0]["resources"]["limits"]["cpu"]

    assert placed("colocated", 2)[0] == 2, "not as many as it was trained on"
    assert placed("2A:2F", 0) == (None, "4"), "a core for each"
    assert placed("2A:2F", 4)[0] is None


def test_pods_of_a_service_become_ready_and_drain_as_those_of_the_chart_do() -> None:
    chart = yaml.safe_load((Path(__file__).parents[2] / "k8s" / "chart" / "values.yaml").read_text())
    head, worker = (pod["containers"][0] for pod in pods_of(service_manifest()))
    assert worker["readinessProbe"] == chart["probes"]["worker"]["readinessProbe"]
    assert "readinessProbe" not in head, "KubeRay's own holds there"
    for box in (head, worker):
        assert box["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(chart["service"]["drainSeconds"])]
    assert all(pod["terminationGracePeriodSeconds"] > 60 for pod in pods_of(service_manifest()))
    assert all("readinessProbe" not in pod["containers"][0] for pod in pods_of(job_manifest()))


def test_a_run_in_an_object_store_is_fetched_where_it_is_used(here: Shell) -> None:
    url = "s3://bucket/runs/first"
    alone = yaml.safe_load(here("job", "render", "serve", url, "--insecure", "--gpus-per-node", "2")[1])
    (application,) = yaml.safe_load(alone["spec"]["serveConfigV2"])["applications"]
    assert application["args"] == {"run": url, "workers": 2, "insecure": True}
    assert alone["metadata"]["name"].startswith("serve-first-")
    for pod in pods_of(alone):  # the head reads the tokenizer, ranks their weights
        box = pod["containers"][0]
        assert {"name": "SHOAL_CACHE", "value": "/var/cache/shoal"} in box["env"]
        assert {"name": "cache", "mountPath": "/var/cache/shoal"} in box["volumeMounts"]
        assert {"name": "cache", "emptyDir": {}} in pod["volumes"]
    lasting = ("--volume", "data:/data:ro", "--volume", "runs:/mnt/shoal")
    evaluation = yaml.safe_load(here("job", "render", "evaluate", url, *lasting)[1])
    assert evaluation["spec"]["entrypoint"] == f"shoal evaluate {url} -o json"
    worker = pods_of(evaluation)[1]
    assert {"name": "SHOAL_CACHE", "value": "/mnt/shoal/cache"} in worker["containers"][0]["env"]
    assert all(volume["name"] != "cache" for volume in worker["volumes"])
    told = yaml.safe_load(here("job", "render", "serve", url, "--insecure", "--env", "SHOAL_CACHE=/mine")[1])
    values = [each["value"] for each in pods_of(told)[0]["containers"][0]["env"] if each["name"] == "SHOAL_CACHE"]
    assert values == ["/mine"]


def test_a_profile_stands_below_the_command_line(tmp_path: Path, here: Shell) -> None:
    (tmp_path / "shoal-jobs.toml").write_text(
        'default = { image = "team:1", volume = ["runs:/mnt"], gpus-per-node = 0 }\n'
        '[big]\nimage = "team:2"\nnodes = 4\nenv = ["A=1"]\n'
    )
    render = ("job", "render", "train", "--recipe", "tiny", "--name", "first")
    assert pods_of(yaml.safe_load(here(*render)[1]))[0]["containers"][0]["image"] == "team:1"
    manifest = yaml.safe_load(here(*render, "--profile", "big", "--nodes", "3", "--env", "B=2")[1])
    box = pods_of(manifest)[0]["containers"][0]
    assert box["image"] == "team:2" and cluster_of(manifest)["workerGroupSpecs"][0]["replicas"] == 3
    assert [each for each in box["env"] if each["name"] in "AB"] == [
        {"name": "A", "value": "1"}, {"name": "B", "value": "2"}
    ]  # fmt: skip


def test_a_patch_is_laid_over_the_manifest_and_checked_with_it(tmp_path: Path) -> None:
    patch = tmp_path / "patch.yaml"
    patch.write_text("spec:\n  ttlSecondsAfterFinished: null\n  rayClusterSpec:\n    headServiceAnnotations: {a: b}\n")
    manifest = job_manifest(patch=[patch])
    assert "ttlSecondsAfterFinished" not in manifest["spec"]
    assert cluster_of(manifest)["headServiceAnnotations"] == {"a": "b"}
    patch.write_text("spec:\n  rayClusterSpec:\n    headGroupSpec:\n      rayStartParam: {}\n")
    with pytest.raises(
        InvalidInput, match=r"headGroupSpec\.rayStartParam is not a field .* did you mean rayStartParams"
    ):
        job_manifest(patch=[patch])


def test_the_estimate_of_the_recipe_says_what_a_gpu_must_hold() -> None:
    with pytest.raises(InvalidInput) as refused:
        job_manifest("nsa-27b", gpus_per_node=8)
    recipe = load_recipe("nsa-27b", overrides={"parallel.ranks": 8})
    needed = estimate(recipe).memory["colocated"].total
    assert f"does not fit: needs {gib(needed + needed // 32 + (3 << 29))} a rank, 80.0 GiB asked" in str(refused.value)


def test_slots_for_rows_need_room_where_one_node_has_all_expert_ranks() -> None:
    whole = load_recipe("nsa-8k-small")
    (most,), (least,) = (beyond(memory_of(recipe), 0).values() for recipe in (whole, exchanging(whole)))
    asked = f"{(most + least) // 2048}Ki"
    assert job_manifest("nsa-8k-small", nodes=2, gpus_per_node=1, gpu_memory=asked)
    for sets in ((), ("parallel.dispatch=put",)):
        with pytest.raises(InvalidInput, match="does not fit: needs"):
            job_manifest("nsa-8k-small", sets, nodes=2 if sets else 1, gpus_per_node=1 if sets else 2, gpu_memory=asked)


@pytest.mark.parametrize(
    ("recipe", "nodes", "gpus", "least"),
    [
        ("deepseekmoe-16b", 2, 8, "train.accumulate=72"),
        ("nsa-27b", 8, 8, "train.recompute=12"),
        ("deepseekmoe-145b", 16, 8, "parallel.shard_dense=false"),
    ],
)
def test_what_does_not_fit_a_gpu_is_told_the_keys_with_which_it_does(
    recipe: str, nodes: int, gpus: int, least: str
) -> None:
    """Of these keys a step less, ``least``, still does not."""
    with pytest.raises(InvalidInput, match=r"80\.0 GiB asked") as refused:
        job_manifest(recipe, nodes=nodes, gpus_per_node=gpus)
    keys = tuple(re.findall(r"--set (\S+=\w+)", str(refused.value)))
    assert {key.split(".")[0] for key in keys} <= {"train", "parallel"}
    assert job_manifest(recipe, keys, nodes=nodes, gpus_per_node=gpus)
    with pytest.raises(InvalidInput, match="does not fit"):
        job_manifest(recipe, (*keys, least), nodes=nodes, gpus_per_node=gpus)


def test_a_run_that_may_exist_is_told_only_keys_that_it_may_change() -> None:
    """Going on with it would refuse other micro-batches."""
    options = resolve_options({"name": "again", "volume": ["runs:/mnt/shoal"], "nodes": 2, "gpus_per_node": 8})
    with pytest.raises(InvalidInput, match=r"add --set train\.recompute=\d+, or") as refused:
        checked_objects(work.train(options, "deepseekmoe-16b", run="first"), options)
    keys = tuple(re.findall(r"--set (\S+=\w+)", str(refused.value)))
    assert checked_objects(work.train(options, "deepseekmoe-16b", keys, run="first"), options)


def test_without_gpus_memory_is_that_of_cpus_whatever_the_recipe_leaves_open() -> None:
    left, told = (
        pods_of(job_manifest("deepseekmoe-2b", ("parallel.ranks=8", f"parallel.device={device}"), nodes=8))[1]
        for device in ("auto", "cpu")
    )
    assert left["containers"][0]["resources"] == told["containers"][0]["resources"]


def test_the_memory_that_is_asked_for_by_itself_is_enough_and_a_byte_less_is_refused() -> None:
    sets = ("parallel.ranks=4",)
    manifest = job_manifest(sets=sets)
    asked = pods_of(manifest)[1]["containers"][0]["resources"]["limits"]["memory"]
    assert job_manifest(sets=sets, memory_per_node=asked)
    with pytest.raises(InvalidInput, match=r"does not fit: needs \S+ GiB of memory a rank, \S+ GiB asked \(2Gi a node"):
        job_manifest(sets=sets, memory_per_node="2Gi")


@pytest.mark.parametrize(
    ("text", "size"), [("64Gi", 64 << 30), ("500m", 1), ("1.5Ki", 1536), ("2e3", 2000), (".5M", 500_000), ("1k", 1000)]
)
def test_quantities_are_read_as_kubernetes_does(text: str, size: int) -> None:
    assert to_bytes(text, "--shm") == size


def test_a_command_of_a_run_that_may_exist_needs_its_name(here: Shell) -> None:
    code, _, err = here("train", "--recipe", "tiny", "--or-resume")
    assert code == 2 and "--or-resume needs the run's name" in err
