"""Trouble on the way to the API server, which a proxy before a real one makes: what is waited for, and what is said."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from kube_fixtures import (  # noqa: F401  # fixtures are found by their names
    cluster_fixture,
    made,
    proxy_fixture,
    server_fixture,
)
from kube_proxy import Proxy

from shoal.jobs.kube import patience
from shoal.jobs.kube.api import Cluster
from shoal.jobs.kube.ending import wait
from shoal.jobs.kube.ray_api import token_of
from shoal.jobs.kube.submit import list_jobs
from shoal.workers.errors import ClusterRefused, InvalidInput


def error_event(code: int) -> bytes:
    status = {"kind": "Status", "apiVersion": "v1", "code": code, "message": "etcd is unhappy"}
    return json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"


@pytest.mark.parametrize("body", [b"", error_event(500), error_event(410)], ids=["ends", "error", "gone"])
def test_watches_that_end_at_once_are_not_asked_for_again_and_again(
    cluster: Cluster, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 2.0)
    name = f"job-{len(list_jobs(cluster))}"
    made(cluster, name)
    proxy.fate = lambda method, path: (200, body) if "watch=true" in path else None
    with pytest.raises(ClusterRefused, match=r"it was away for 2 s"):
        wait(proxy.cluster(cluster.namespace, monkeypatch), name)
    assert 3 <= sum("watch=true" in path for _, path in proxy.asked) <= 6


@pytest.mark.parametrize(
    ("entry", "token"),
    [
        (b"a-token-of-ray\n", "a-token-of-ray"),
        (b"two\nlines", None),
        (b"a token", None),
        ("t\u00f6ken".encode(), None),
        (b"\xff\xfe", None),
    ],
)
def test_a_token_that_cannot_be_sent_is_not_shown(cluster: Cluster, entry: bytes, token: str | None) -> None:
    name = f"secret-{entry.hex()}"
    job: Any = {"spec": {"rayClusterSpec": {"authOptions": {"mode": "token", "secretName": name}}}}
    body = {"metadata": {"name": name}, "data": {"auth_token": base64.b64encode(entry).decode()}}
    cluster.post(cluster.core("secrets"), body)
    if token is not None:
        assert token_of(cluster, job) == token
        return
    with pytest.raises(InvalidInput) as refused:
        token_of(cluster, job)
    assert str(refused.value) == (
        f"entry auth_token of the Secret {name} cannot be sent as a token: write printable ASCII without spaces to it"
    )
