"""Kueue's workloads of a job, in whichever version of its API the cluster serves."""

from __future__ import annotations

from shoal.jobs.kube.api import Cluster, Object

_GROUP = "/apis/kueue.x-k8s.io"


def kueue(cluster: Cluster) -> str:
    """Where the namespace's objects of Kueue are: a path that their plural follows. Raises NotFound without Kueue."""
    version = cluster.get(_GROUP)["preferredVersion"]["version"]
    return cluster.path(f"{_GROUP}/{version}/namespaces/{{}}")


def workloads(cluster: Cluster, where: str, job: Object) -> list[Object]:
    """What Kueue made of a job, of which it may make one a moment later. where: of ``kueue``. Raises ShoalError."""
    uid = job["metadata"].get("uid", "")
    return list(cluster.items(f"{where}/workloads", labelSelector=f"kueue.x-k8s.io/job-uid={uid}"))
