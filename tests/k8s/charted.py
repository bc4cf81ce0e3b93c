"""The Helm chart as its tests see it: files of values, helm, and what it renders."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "k8s" / "chart"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
SERVICE, CLUSTER, WATCHED, JOBS = (CHART / "ci" / f"{n}-values.yaml" for n in ("service", "cluster", "watched", "jobs"))
Objects = list[dict[str, Any]]


def helm(*arguments: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs helm, with a kubeconfig or none."""
    env = {**os.environ, "KUBECONFIG": str(config or "/dev/null")}
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, timeout=120, env=env)


def rendered(values: Path, *changes: str) -> Objects:
    """The objects of ``helm template``. changes: as ``--set`` takes them."""
    sets = [part for change in changes for part in ("--set", change)]
    result = helm("template", "rel", str(CHART), "--namespace", "team", "-f", str(values), *sets)
    assert result.returncode == 0, result.stderr
    return [each for each in yaml.safe_load_all(result.stdout) if each]


def refusal(values: Path, *changes: str, name: str = "rel") -> str:
    """What helm says to values that it does not take."""
    sets = [part for change in changes for part in ("--set", change)]
    result = helm("template", name, str(CHART), "-f", str(values), *sets)
    assert result.returncode != 0, "it was rendered"
    return result.stderr


def one(objects: Objects, kind: str, name: str | None = None) -> Any:
    """The only object of a kind, or of a kind and a name."""
    (found,) = [e for e in objects if e["kind"] == kind and name in (None, e["metadata"]["name"])]
    return found


def ray_of(objects: Objects) -> Any:
    """The RayCluster's part of a RayService or RayCluster."""
    (ray,) = [each for each in objects if each["apiVersion"] == "ray.io/v1"]
    return ray["spec"]["rayClusterConfig"] if ray["kind"] == "RayService" else ray["spec"]


def pods_of(objects: Objects) -> list[Any]:
    """The templates of head and workers."""
    cluster = ray_of(objects)
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def templates_of(objects: Objects) -> list[Any]:
    """The pods of everything that has some: metadata and spec."""
    rays = [each for each in objects if each["apiVersion"] == "ray.io/v1"]
    plain = [each for each in objects if each["kind"] == "Pod"]
    sets = [each["spec"]["template"] for each in objects if each["kind"] == "Deployment"]
    return [*(pods_of(rays) if rays else []), *plain, *sets]


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector takes these labels, by the rules of Kubernetes that the chart uses."""
    known = {"Exists": lambda key: key in labels, "DoesNotExist": lambda key: key not in labels}
    return (selector.get("matchLabels") or {}).items() <= labels.items() and all(
        known[each["operator"]](each["key"]) for each in selector.get("matchExpressions") or []
    )
