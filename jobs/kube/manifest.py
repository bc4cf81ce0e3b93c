"""A request as the objects that the API server is given: a RayJob or a RayService, and a ConfigMap for local code."""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from shoal.jobs.kube import tls
from shoal.jobs.kube.check import check_manifest
from shoal.jobs.kube.code import is_url, zip_folder
from shoal.jobs.kube.fit import OBJECT_STORE, Sizes, sizes
from shoal.jobs.kube.names import check_image, check_name, check_object
from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.parts import Object, labels, own_labels, tolerations, variables, volumes
from shoal.jobs.kube.quantity import to_bytes
from shoal.jobs.kube.work import Work
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput, NotFound

API = "ray.io/v1"
KIND, RUN, RECIPE = "shoal/kind", "shoal/run", "shoal/recipe"  # labels and annotations of what this program made
QUEUE, QUEUE_PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
GROUP = "ranks"  # the worker group
GPU = "nvidia.com/gpu"
CODE = "/etc/shoal/code"
CACHE = "/var/cache/shoal"  # of runs that are fetched
STOPPING = 90  # seconds that a job told to stop has to save
DRAINING = 60  # seconds that requests under way have when a service's pod is to go
SUBMITTER_RETRIES = 3  # of the pod that hands the job to Ray and follows its log; it does not begin the job again
_SHELL = frozenset("'\"`$\\;&|<>*?()[]{}#~!")
SERVICE = "shoal.jobs.serve.deployed:application"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
SERVE_PORTS = {"serve": 8000, "grpc": 9000}
# KubeRay's own probe asks each worker of a service for a proxy of Serve, which is on the head alone
READY = {
    "httpGet": {"path": "/api/local_raylet_healthz", "port": 52365},
    "periodSeconds": 5, "timeoutSeconds": 2, "failureThreshold": 10,
}  # fmt: skip

Told = Callable[[str], None]


def render(work: Work, options: JobOptions, told: Told = lambda said: None) -> list[Object]:
    """The objects of a job: the RayJob or RayService last, what it needs before it.

    told: is given sentences on what was left out.

    Raises InvalidInput or NotFound, in one sentence, for options that cannot be rendered; the manifest itself is
    checked by ``shoal.jobs.kube.check``.
    """
    size = sizes(work, options)
    name = work.name
    check_name(name)
    objects, environment = _code(name, options, told)
    cluster = _cluster(work, options, size, name, has_code=bool(objects))
    metadata = {"name": name, "labels": _labels(work, options), "annotations": {RUN: work.run}}
    if work.kind == "serve":
        service = {"serveConfigV2": _serve_config(work, environment), "rayClusterConfig": cluster}
        manifest = {"apiVersion": API, "kind": "RayService", "metadata": metadata, "spec": service}
    else:
        job = _job(work, options, environment) | {"rayClusterSpec": cluster}
        manifest = {"apiVersion": API, "kind": "RayJob", "metadata": metadata, "spec": job}
    for file in options.patch:
        manifest = merge_patch(manifest, _read_patch(file))
    _let_autoscale(manifest, options)
    return [*objects, manifest]


def _let_autoscale(manifest: Object, options: JobOptions) -> None:
    """Where a patch turns the autoscaler on: the head's account's token, to ask the API server for pods, and TLS."""
    spec = manifest.get("spec")
    cluster = (spec.get("rayClusterSpec") or spec.get("rayClusterConfig")) if isinstance(spec, dict) else None
    if isinstance(cluster, dict) and cluster.get("enableInTreeAutoscaling") is True:
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # a patch may have broken it: the checks say how
            cluster["headGroupSpec"]["template"]["spec"].pop("automountServiceAccountToken", None)
            if options.tls_secret is not None:
                secured = {"env": tls.variables(), "volumeMounts": [tls.mount()]}
                cluster["autoscalerOptions"] = merge_patch(secured, cluster.get("autoscalerOptions", {}))


def checked_objects(
    work: Work, options: JobOptions, namespace: str | None = None, told: Told = lambda said: None
) -> list[Object]:
    """``render``, with every check of what comes out, and the namespace in each object if one is given."""
    objects = render(work, options, told)
    for each in objects if namespace is not None else ():
        check_object(namespace or "", "--namespace")
        each["metadata"]["namespace"] = namespace
    check_manifest(objects[-1])
    return objects


def merge_patch(base: Any, patch: Any) -> Any:
    """``base`` with a JSON merge patch laid over it (RFC 7386): null removes a key, lists are replaced."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(base) if isinstance(base, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def _read_patch(file: Any) -> Object:
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFound(f"--patch {file} does not exist: name a YAML file") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise InvalidInput(f"--patch {file} cannot be read ({why}): write valid YAML to it") from None
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise InvalidInput(
            f"--patch {file} holds what JSON cannot say, such as a date or a value within itself: write text in quotes"
        ) from None
    if not isinstance(found, dict):
        raise InvalidInput(f"--patch {file} holds {quote(found)}: write the keys to change, such as spec:")
    return found


def _labels(work: Work, options: JobOptions) -> dict[str, str]:
    found = {"app.kubernetes.io/managed-by": "shoal", KIND: work.kind, **own_labels(options.label)}
    if options.queue:
        check_object(options.queue, "--queue")
        found[QUEUE] = options.queue
        if options.priority:
            check_object(options.priority, "--priority")
            found[QUEUE_PRIORITY] = options.priority
    return found


def _pod_labels(work: Work, options: JobOptions) -> dict[str, str]:
    """Without the queue's: the job waits there for all of its pods, and none waits for itself."""
    return {KIND: work.kind, **own_labels(options.label)}


def _code(name: str, options: JobOptions, told: Told) -> tuple[list[Object], Object]:
    """The ConfigMap of local code, if there is any, and the Ray runtime environment that uses it."""
    if options.working_dir is None:
        return [], {}
    if is_url(options.working_dir):
        return [], {"working_dir": options.working_dir}
    data = base64.b64encode(zip_folder(options.working_dir, told)).decode()
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-code"}}
    return [config | {"binaryData": {"code.zip": data}}], {"working_dir": f"file://{CODE}/code.zip"}


def _job(work: Work, options: JobOptions, environment: Object) -> Object:
    job: Object = {
        "entrypoint": _entrypoint(work.command),
        "submissionMode": options.submission_mode,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": options.ttl,
        "backoffLimit": options.retries,
        "metadata": {"shoal": work.kind, "run": work.run},  # Ray's dashboard shows it
    }
    if work.ranks == 0:  # the command computes by itself, so it belongs on a worker
        job |= {"entrypointNumGpus": 1} if options.gpus_per_node else {"entrypointNumCpus": 1}
    if environment:
        job["runtimeEnvYAML"] = yaml.safe_dump(environment)
    if options.deadline:
        job["activeDeadlineSeconds"] = options.deadline
    if options.suspend:
        job["suspend"] = True
    if options.submission_mode == "K8sJobMode":
        job["submitterConfig"] = {"backoffLimit": SUBMITTER_RETRIES}
        job["submitterPodTemplate"] = {"metadata": {"labels": _pod_labels(work, options)}, "spec": _submitter(options)}
    return job


def _entrypoint(words: Sequence[str]) -> str:
    """A command as Ray runs it. In K8sJobMode `ray job submit` drops the quotes, and a shell sees the words bare.

    Raises InvalidInput for a word that would be more than a word there; a word with spaces is quoted anew.
    """
    for before, word in zip(("", *words), words, strict=False):
        found = next((each for each in word if each in _SHELL or not each.isprintable()), None)
        if found is not None:
            raise InvalidInput(
                f"{before if before.startswith('--') else 'RUN'} {quote(word)} holds {quote(found)}, which Ray's shell "
                f"would take for itself: use a name or path without it"
            )
    return shlex.join(words)


def _submitter(options: JobOptions) -> Object:
    """The pod that hands the job to Ray; KubeRay fills in its command."""
    resources = {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
    return _pod(options) | {
        "restartPolicy": "Never",
        "containers": [_container(options, "ray-job-submitter", resources)],
    }


def _cluster(work: Work, options: JobOptions, size: Sizes, name: str, has_code: bool) -> Object:
    node = _template(work, options, name, has_code, "ray-worker", size.cpus, size.memory, size.shm)
    if options.gpus_per_node:
        for amounts in node["spec"]["containers"][0]["resources"].values():
            amounts[GPU] = options.gpus_per_node
    head_memory = to_bytes(options.head_memory, "--head-memory")
    shm = min(size.shm, OBJECT_STORE * 2)
    if head_memory <= shm:
        raise InvalidInput(f"--head-memory {options.head_memory} does not fit: Ray alone needs 4Gi, so raise it")
    head = _template(work, options, name, has_code, "ray-head", options.head_cpus, head_memory, shm)
    ports = PORTS | (SERVE_PORTS if work.kind == "serve" else {})
    head["spec"]["containers"][0]["ports"] = [{"name": key, "containerPort": port} for key, port in ports.items()]
    store = str(OBJECT_STORE)
    cluster: Object = {
        "rayVersion": options.ray_version or _ray_here(),
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "object-store-memory": store},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": GROUP,
                "replicas": options.nodes,
                "minReplicas": options.nodes,
                "maxReplicas": options.nodes,
                "rayStartParams": {"num-cpus": str(size.cpus), "object-store-memory": store},
                "template": node,
            }
        ],
    }
    if options.auth == "token":
        secret = {}
        if options.auth_secret:
            check_object(options.auth_secret, "--auth-secret")
            secret = {"secretName": options.auth_secret}
        cluster["authOptions"] = {"mode": "token", **secret}
    elif options.auth_secret:
        raise InvalidInput("--auth-secret is given with --auth off: leave one of them out")
    return cluster


def _template(
    work: Work, options: JobOptions, name: str, has_code: bool, container: str, cpus: int, memory: int, shm: int
) -> Object:
    """A pod of the cluster. memory, shm: bytes."""
    amounts: Object = {"cpu": str(cpus), "memory": f"{-(-memory // (1 << 20))}Mi"}
    box = _container(options, container, {"requests": dict(amounts), "limits": dict(amounts)})
    box["env"] = [{"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(STOPPING)}, *box.get("env", [])]
    mounts = volumes(options.volume)
    box["volumeMounts"] = [*(v.mount() for v in mounts), {"name": "shm", "mountPath": "/dev/shm"}]
    declared = [v.declare() for v in mounts]
    declared.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{-(-shm // (1 << 20))}Mi"}})
    annotations = {}
    if work.recipe_toml and container == "ray-head":  # where the command runs
        # a pod sees its own annotation as a file: no object beside the job to be made and removed
        annotations[RECIPE] = work.recipe_toml
        box["volumeMounts"].append({"name": "recipe", "mountPath": "/etc/shoal/recipe", "readOnly": True})
        field = {"path": "recipe.toml", "fieldRef": {"fieldPath": f"metadata.annotations['{RECIPE}']"}}
        declared.append({"name": "recipe", "downwardAPI": {"items": [field]}})
    if work.kind == "serve":
        box["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(DRAINING)]}}}
        box |= {"readinessProbe": READY} if container == "ray-worker" else {}
    if work.fetches:
        _add_cache(options, box, declared)
    if has_code:
        box["volumeMounts"].append({"name": "code", "mountPath": CODE, "readOnly": True})
        declared.append({"name": "code", "configMap": {"name": f"{name}-code"}})
    metadata: Object = {"labels": _pod_labels(work, options)}
    metadata |= {"annotations": annotations} if annotations else {}
    pod = _pod(options) | {"terminationGracePeriodSeconds": STOPPING + 30, "containers": [box], "volumes": declared}
    if options.tls_secret is not None:
        tls.add_certificate(pod, options.tls_secret)
    return {"metadata": metadata, "spec": pod}


def _add_cache(options: JobOptions, box: Object, declared: list[Object]) -> None:
    """Where a run of an object store is fetched to: the first volume that outlives the pod, else one that does not."""
    if any(text.startswith("SHOAL_CACHE=") for text in options.env):
        return
    lasting = [volume for volume in volumes(options.volume) if volume.shared and not volume.read_only]
    folder = f"{lasting[0].path}/cache" if lasting else CACHE
    box["env"].append({"name": "SHOAL_CACHE", "value": folder})
    if not lasting:
        box["volumeMounts"].append({"name": "cache", "mountPath": CACHE})
        declared.append({"name": "cache", "emptyDir": {}})


def _pod(options: JobOptions) -> Object:
    """What all pods have in common."""
    pod: Object = {"securityContext": _security(options)}
    if options.pull_secret:
        for secret in options.pull_secret:
            check_object(secret, "--pull-secret")
        pod["imagePullSecrets"] = [{"name": secret} for secret in options.pull_secret]
    if options.service_account:  # named for what it may do
        check_object(options.service_account, "--service-account")
        pod["serviceAccountName"] = options.service_account
    else:
        pod["automountServiceAccountToken"] = False
    if options.node_selector:
        pod["nodeSelector"] = labels(options.node_selector, "--node-selector")
    if options.toleration:
        pod["tolerations"] = tolerations(options.toleration)
    if options.priority and not options.queue:
        check_object(options.priority, "--priority")
        pod["priorityClassName"] = options.priority
    return pod


def _security(options: JobOptions) -> Object:
    """A pod's user. Its group may write to volumes, which belong to root when a driver has just made them."""
    security: Object = {"seccompProfile": {"type": "RuntimeDefault"}}
    if options.user:
        security |= {"runAsNonRoot": True, "runAsUser": options.user, "runAsGroup": options.user}
        security |= {"fsGroup": options.user, "fsGroupChangePolicy": "OnRootMismatch"}
    return security


def _container(options: JobOptions, name: str, resources: Object) -> Object:
    check_image(options.image, "--image")
    box: Object = {"name": name, "image": options.image}
    box |= {"imagePullPolicy": options.pull_policy} if options.pull_policy else {}
    env, whole = variables(options.env, options.secret)
    box |= {"env": env} if env else {}
    box |= {"envFrom": whole} if whole else {}
    security: Object = {"allowPrivilegeEscalation": False, "seccompProfile": {"type": "RuntimeDefault"}}
    security |= {"capabilities": {"drop": ["ALL"]}} if options.user else {}  # root reads others' files by one
    return box | {"resources": resources, "securityContext": security}


def _serve_config(work: Work, environment: Object) -> str:
    """Ray Serve's own configuration: one application behind a proxy on the head."""
    application = {"name": "shoal", "import_path": SERVICE, "route_prefix": "/", "args": work.service or {}}
    application |= {"runtime_env": environment} if environment else {}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORTS["serve"]},
        "applications": [application],
    }
    return str(yaml.safe_dump(config, sort_keys=False))


def _ray_here() -> str:
    try:
        return version("ray")
    except PackageNotFoundError:  # a machine that only submits
        raise InvalidInput("Ray is not installed here, so name the image's: add --ray-version") from None


def to_text(objects: list[Object], as_json: bool) -> str:
    """The objects as ``kubectl apply -f -`` reads them: YAML documents, or JSON (a List where there are several)."""
    if as_json:
        whole = objects[0] if len(objects) == 1 else {"apiVersion": "v1", "kind": "List", "items": objects}
        return json.dumps(whole, indent=2)
    return "---\n".join(yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=100) for each in objects).rstrip("\n")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and repeats what YAML would name and refer to."""

    def ignore_aliases(self, data: Any) -> bool:
        """Every value is written where it stands."""
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)
