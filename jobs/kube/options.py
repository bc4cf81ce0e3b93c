"""What a person may say about a job on Kubernetes: one model, from which the command line and profiles are read.

Every field of ``JobOptions`` is an option of ``shoal job render`` and ``shoal job submit`` (``gpus_per_node`` is
``--gpus-per-node``) and a key of a profile. Nothing here imports the Kubernetes client, torch or Ray.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import shoal
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput, NotFound

PROFILES = (Path("shoal-jobs.toml"), Path("~/.config/shoal/jobs.toml"))  # looked for in this order

DEFAULT = "default"  # the table that always holds

# options that a RayService has no place for
OF_JOBS = ("queue", "retries", "deadline", "ttl", "suspend", "submission_mode")

# options that mean something to a Ray cluster which runs already
OF_RAY = ("name", "nodes", "gpus_per_node", "gpu_memory", "env", "working_dir", "ray_address")

CLUSTER, PODS, LIFE, SAFETY = "Cluster", "Pods", "Queue and life", "Access"


def option(default: Any, help: str, panel: str, **rules: Any) -> Any:
    """A field with its line of help, the panel it stands in, and pydantic's rules for it."""
    return Field(default, description=help, json_schema_extra={"panel": panel}, **rules)


class JobOptions(BaseModel):
    """A job's cluster, pods, queue and access. Quantities of memory are Kubernetes' (``64Gi``)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str | None = option(None, "Name of the job; default: what it does, and a random end.", CLUSTER)
    nodes: int = option(1, "Nodes (worker pods), beside the head.", CLUSTER, ge=1, le=4096)
    gpus_per_node: int = option(1, "GPUs of a node, one a rank; 0: ranks on CPUs.", CLUSTER, ge=0, le=64)
    cpus_per_node: int = option(0, "CPU cores of a node; 0: 8 a GPU, or 1 a rank.", CLUSTER, ge=0, le=4096)
    memory_per_node: str | None = option(None, "Memory of a node; default: what its ranks need.", CLUSTER)
    gpu_memory: str = option("80Gi", "Memory of one GPU: what the recipe's estimate must fit into.", CLUSTER)
    shm: str | None = option(None, "Size of /dev/shm; default: 1Gi and 512Mi a rank.", CLUSTER)
    head_cpus: int = option(2, "CPU cores of the head, which hosts no rank.", CLUSTER, ge=1, le=4096)
    head_memory: str = option("8Gi", "Memory of the head.", CLUSTER)
    ray_version: str | None = option(None, "Ray in the image; default: the one installed here.", CLUSTER)

    ray_address: str | None = option(
        None, "Address of a running Ray's dashboard, such as http://head:8265: no Kubernetes.", CLUSTER
    )

    image: str = option(f"shoal:{shoal.__version__}", "Image of all pods.", PODS)
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = option(None, "When the image is pulled.", PODS)
    pull_secret: list[str] = option([], "Secret for the image's registry.", PODS)
    volume: list[str] = option([], "CLAIM:/path[:ro], secret/NAME:/path, configmap/NAME:/path or /host:/path.", PODS)
    env: list[str] = option([], "KEY=VALUE, an environment variable of all pods.", PODS)
    secret: list[str] = option([], "KEY=SECRET:ENTRY, a variable from a Secret; SECRET: all its entries.", PODS)
    toleration: list[str] = option([], "KEY[=VALUE][:EFFECT], of all pods.", PODS)
    node_selector: list[str] = option([], "KEY=VALUE that a node must have as its label.", PODS)
    label: list[str] = option([], "KEY=VALUE, a label of the job and its pods.", PODS)
    service_account: str | None = option(None, "ServiceAccount of all pods; default: one without rights.", PODS)
    user: int = option(1000, "User and group of all pods; 0: the image's own, root too.", PODS, ge=0, lt=2**31)
    working_dir: str | None = option(
        None, "Code to use, not the image's: a folder (zipped, up to 0.9 MB; on a Ray 100), or a .zip's URL.", PODS
    )
    patch: list[Path] = option([], "YAML file laid over the manifest (JSON merge patch).", PODS)

    queue: str | None = option(None, "Kueue's LocalQueue.", LIFE)
    priority: str | None = option(None, "Kueue's WorkloadPriorityClass with --queue, else a PriorityClass.", LIFE)
    retries: int = option(0, "Times the job is begun again on a new cluster when it fails.", LIFE, ge=0, le=100)
    deadline: int | None = option(None, "Seconds the job may be active.", LIFE, ge=1, lt=2**31)
    ttl: int = option(60, "Seconds the cluster is kept once the job has ended.", LIFE, ge=0, lt=2**31)
    suspend: bool = option(False, "Submit it suspended.", LIFE)
    submission_mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = option(
        "K8sJobMode", "How KubeRay hands the job to Ray; K8sJobMode keeps its log in a pod.", LIFE
    )

    auth: Literal["token", "off"] = option("token", "Whether Ray asks for a token (KubeRay 1.5.1 and later).", SAFETY)
    auth_secret: str | None = option(
        None, "Secret with an entry auth_token; default: KubeRay makes one (named: KubeRay 1.6).", SAFETY
    )
    tls_secret: str | None = option(
        None, "Secret with tls.crt and tls.key of an authority: TLS between Ray's processes.", SAFETY
    )


def panel_of(field: str) -> str:
    """The panel of the help that an option stands in."""
    extra = JobOptions.model_fields[field].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["panel"])


def flag(field: str) -> str:
    """``--gpus-per-node`` of ``gpus_per_node``."""
    return "--" + field.replace("_", "-")


def resolve_options(given: Mapping[str, Any], profile: str | None = None, file: Path | None = None) -> JobOptions:
    """Options of the command line laid over those of a profile, laid over those of the table ``default``; checked.

    given: by field name; None, and empty lists, count as not said. Lists of all are joined. profile: a table of the
    profiles' file.

    Raises NotFound (no such file or profile), InvalidInput, each in one sentence.
    """
    values: dict[str, Any] = {}
    source: dict[str, str] = {}  # where a key was last said, by the table
    for where, fields in [*_read_profiles(profile, file), ("", given)]:
        for key, value in fields.items():
            if value is None or (value == [] and not where):
                continue
            joined = isinstance(value, list) and isinstance(values.get(key), list)
            values[key], source[key] = [*values[key], *value] if joined else value, where
    try:
        return JobOptions.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(_one_sentence(error, source)) from None


def _read_profiles(profile: str | None, file: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """The tables that hold, the first below the others: where each stands, and its keys by field name."""
    named = file or (Path(os.environ["SHOAL_PROFILES"]) if os.environ.get("SHOAL_PROFILES") else None)
    found = named or next((path for path in (p.expanduser() for p in PROFILES) if path.is_file()), None)
    if found is None:
        if profile is None:
            return []
        raise NotFound(f"--profile {profile}: there is no file of profiles: write [{profile}] to {PROFILES[0]}")
    try:
        tables = tomllib.loads(found.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFound(f"the file of profiles {found} does not exist: name another by --profiles") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the file of profiles {found} cannot be read ({error}): write valid TOML to it") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise InvalidInput(
                f"{found}: {name}={quote(table)} is not a table: write it below the head of one, such as [default]"
            )
    if profile is not None and profile not in tables:
        raise NotFound(f"--profile {profile} is not in {found}: it has {', '.join(tables) or 'none'}")
    if file is not None and profile is None and DEFAULT not in tables:
        raise InvalidInput(f"--profiles {file} has no table [{DEFAULT}]: add --profile {' or '.join(tables) or 'NAME'}")
    names = dict.fromkeys(name for name in (DEFAULT, profile) if name in tables)
    return [
        (f"profile {name} of {found}", _fields(tables[name], f"profile {name} of {found}")) for name in names if name
    ]


def _fields(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {str(key).replace("-", "_"): value for key, value in table.items()}
    known = [field.replace("_", "-") for field in JobOptions.model_fields]  # as one writes them
    for key in table:
        if str(key).replace("_", "-") not in known:
            near = get_close_matches(str(key).replace("_", "-"), known, n=1)
            remedy = f"did you mean {near[0]}" if near else f"it may have {', '.join(known)}"
            raise InvalidInput(f"{where}: {quote(key)} is not an option of a job: {remedy}")
    return fields


def _one_sentence(error: ValidationError, source: Mapping[str, str]) -> str:
    detail = error.errors(include_url=False)[0]
    field = str(detail["loc"][0])
    where = f"{source[field]}: {field}" if source.get(field) else flag(field)
    expected = detail["msg"].removeprefix("Input should be ")
    return f"{where}={quote(detail['input'])} cannot be used: it should be {expected}"
