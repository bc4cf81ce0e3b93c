"""Ray's own job API on a job's cluster, through the API server's proxy: nothing needs to be reachable but that."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from shoal.jobs.kube.api import AnsweredBehind, Cluster, Object
from shoal.jobs.kube.ray_answers import refusal
from shoal.workers.errors import InvalidInput, NotFound

DASHBOARD = 8265
_TOKEN = "auth_token"  # entry of the Secret, as KubeRay names it


def ray_job(cluster: Cluster, job: Object) -> Object:
    """What Ray says of the job, such as ``driver_exit_code``. Raises ShoalError when its cluster cannot be asked."""
    return _ask(cluster, job, cluster.get, f"api/jobs/{_id(job)}")


def ray_logs(cluster: Cluster, job: Object) -> str:
    """All that the job has printed so far. Raises ShoalError."""
    return str(_ask(cluster, job, cluster.get, f"api/jobs/{_id(job)}/logs").get("logs") or "")


def stop_ray_job(cluster: Cluster, job: Object) -> None:
    """Tells the job to end; it saves what it has to. Raises ShoalError."""
    _ask(cluster, job, cluster.post, f"api/jobs/{_id(job)}/stop", {})


def _ask(cluster: Cluster, job: Object, ask: Callable[..., Object], below: str, *body: Object) -> Object:
    """Ray's answer, by the API server's proxy. What Ray itself refuses is said to be Ray's."""
    path, headers = _path(cluster, job, below), _headers(cluster, job)
    try:
        return ask(path, *body, headers=headers)
    except AnsweredBehind as error:
        secret = _secret(job)
        remedy = f"look at entry {_TOKEN} of the Secret {secret}" if secret else "set --auth token when it is submitted"
        ray = f"the Ray of {job['metadata']['name']}"
        raise refusal(error.status, error.body, ray, remedy) from None


def token_of(cluster: Cluster, job: Object) -> str | None:
    """The token that Ray asks for, None where it asks for none; spaces and line ends around it do not count.

    Raises ShoalError when it may not be read, InvalidInput when it can be no token; what it is is never said.
    """
    name = _secret(job)
    if name is None:
        return None
    data: dict[str, Any] = cluster.get(cluster.core("secrets", name)).get("data") or {}
    try:
        token = base64.b64decode(data.get(_TOKEN) or "", validate=True).decode("ascii").strip()
    except ValueError:  # which would show the token
        token = "\n"
    if not token.isprintable() or " " in token:
        raise InvalidInput(
            f"entry {_TOKEN} of the Secret {name} cannot be sent as a token: write printable ASCII without spaces to it"
        )
    return token


def _secret(job: Object) -> str | None:
    """The Secret of the token that Ray asks for, None where it asks for none."""
    spec = job["spec"]
    options = (spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or {}).get("authOptions") or {}
    if options.get("mode", "disabled") != "token":
        return None
    return str(options.get("secretName") or cluster_name(job))


def cluster_name(job: Object) -> str:
    """The RayCluster of a job or a service; empty when there is none yet."""
    return (clusters_of(job) or [""])[0]


def clusters_of(job: Object) -> list[str]:
    """RayClusters: the one of a job; of a service the one that serves, and the one that is to take its place."""
    status = job.get("status") or {}
    places = [status, status.get("activeServiceStatus") or {}, status.get("pendingServiceStatus") or {}]
    return list(dict.fromkeys(str(place["rayClusterName"]) for place in places if place.get("rayClusterName")))


def _id(job: Object) -> str:
    found = str((job.get("status") or {}).get("jobId") or "")
    if not found:
        raise NotFound("the job was not handed to Ray yet")
    return found


def _path(cluster: Cluster, job: Object, below: str) -> str:
    # "first-abcde-head-svc.team.svc.cluster.local:8265": the service, whose proxy the API server is
    address = str((job.get("status") or {}).get("dashboardURL", ""))
    host, _, port = address.removeprefix("http://").partition(":")
    if not host:
        raise NotFound("the job has no cluster that could be asked")
    service = f"{host.split('.')[0]}:{port or DASHBOARD}"
    return cluster.path(f"/api/v1/namespaces/{{}}/services/{service}/proxy/{below}")


def _headers(cluster: Cluster, job: Object) -> dict[str, str]:
    # not `Authorization`, which the API server takes for itself
    token = token_of(cluster, job)
    return {"X-Ray-Authorization": f"Bearer {token}"} if token else {}
