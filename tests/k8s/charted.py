"""The Helm chart as its tests see it: files of values, helm, and what it renders."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from kube_fixtures import until
from kube_server import ApiServer

CHART = Path(__file__).parents[2] / "k8s" / "chart"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
SERVICE, CLUSTER, WATCHED, JOBS = (CHART / "ci" / f"{n}-values.yaml" for n in ("service", "cluster", "watched", "jobs"))
Objects = list[dict[str, Any]]

# Kinds of other operators: group, version, kind, plural. Their schemas are not here, so everything in them is taken.
OTHERS = (
    ("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors"),
    ("monitoring.coreos.com", "v1", "PrometheusRule", "prometheusrules"),
    ("cert-manager.io", "v1", "Certificate", "certificates"),
    ("cert-manager.io", "v1", "Issuer", "issuers"),
    ("kueue.x-k8s.io", "v1beta1", "LocalQueue", "localqueues"),
    ("kueue.x-k8s.io", "v1beta1", "Workload", "workloads"),
)


def helm(*arguments: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs helm, with a kubeconfig or none."""
    env = {**os.environ, "KUBECONFIG": str(config or "/dev/null")}
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, timeout=120, env=env)


def may_mount() -> bool:
    """Whether a process here may have a root of its own."""
    tools = all(map(shutil.which, ("unshare", "setpriv", "mount")))
    return tools and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


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


def install_others(server: ApiServer) -> None:
    """Makes the kinds of other operators, where they are not there yet, and returns once they are served."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for group, version, kind, plural in OTHERS:
        names = {"kind": kind, "plural": plural, "singular": kind.lower()}
        schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
        versions = [{"name": version, "served": True, "storage": True, "schema": schema}]
        spec = {"group": group, "scope": "Namespaced", "names": names, "versions": versions}
        crd = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
        server.request("POST", path, crd | {"metadata": {"name": f"{plural}.{group}"}, "spec": spec}, quiet=True)
    for group, version, _, plural in OTHERS:
        until(lambda path=f"/apis/{group}/{version}/{plural}": server.request("GET", path, quiet=True) is not None)  # type: ignore[misc]
