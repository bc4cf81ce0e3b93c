"""The API server, as far as jobs need it: requests and streams in plain dictionaries, refusals in one sentence.

The official client reads the kubeconfig and brings credentials, TLS and its pool of connections; its typed models are
left aside, since decoding a thousand jobs into them takes longer than a person waits.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote as escape
from urllib.parse import urlencode

from shoal.jobs.kube.limit import Limited
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, ShoalError

Object = dict[str, Any]

JOBS, SERVICES, CLUSTERS = "rayjobs", "rayservices", "rayclusters"
PAGE = 500  # objects of one answer
ANSWER = 30.0  # seconds for an answer
SILENCE = 60.0  # seconds that a stream may be silent before it is asked for anew
TRIES = 4  # of a request that changes nothing, while the server is not there or busy
FIRST_PAUSE = 0.3  # seconds before the second try; doubled for each further one
_PATCH = "application/merge-patch+json"
_NAMESPACE_OF_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Unreachable(ClusterRefused):
    """The API server does not answer; it may again."""


class Gone(ClusterRefused):
    """What was asked for from some point on is not remembered any more (410): begin anew."""


class Conflict(ClusterRefused):
    """It exists already, or was changed meanwhile (409)."""


class AnsweredBehind(Exception):
    """Not the API server refused, but the service behind its proxy."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status, self.body = status, body


class Cluster(Limited):
    """One namespace of a cluster, by a context of the kubeconfig, or from inside a pod."""

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        """Reads the kubeconfig; no request is made. Raises InvalidInput, NotFound."""
        self._client, found = _client(context)
        self.namespace = namespace or found
        told = {"--context": context, "--namespace": namespace}
        self.flags = "".join(f" {key} {shlex.quote(value)}" for key, value in told.items() if value is not None)
        self.host = str(self._client.configuration.host)

    def __str__(self) -> str:
        return f"namespace {self.namespace}"

    def hint(self, command: str) -> str:
        """A ``shoal job`` command about this namespace of this cluster, to be shown to a person."""
        return f"`shoal job {command}{self.flags}`"

    @property
    def client(self) -> Any:
        """The official client's ApiClient."""
        return self._client

    def ray(self, plural: str, name: str = "") -> str:
        """The path of KubeRay's objects, or of one."""
        return self.path(f"/apis/ray.io/v1/namespaces/{{}}/{plural}", name)

    def core(self, plural: str, name: str = "") -> str:
        """The path of Kubernetes' own objects, such as ``pods``, or of one."""
        return self.path(f"/api/v1/namespaces/{{}}/{plural}", name)

    def path(self, form: str, name: str = "") -> str:
        """A path with the namespace in its place."""
        return form.format(escape(self.namespace, safe="")) + (f"/{escape(name, safe='')}" if name else "")

    def get(self, path: str, **query: Any) -> Object:
        """Reads; tries again while the server is not there or busy. Raises ShoalError."""
        pause = FIRST_PAUSE
        for _ in range(TRIES - 1):
            try:
                return self._request("GET", path, query)
            except Unreachable:
                if self.out_of_time:
                    raise
                time.sleep(self.left(pause))
                pause *= 2
        return self._request("GET", path, query)

    def post(self, path: str, body: Object, **query: Any) -> Object:
        """Creates. Raises ShoalError."""
        return self._request("POST", path, query, body)

    def patch(self, path: str, body: Object, **query: Any) -> Object:
        """Changes, by a JSON merge patch. Raises ShoalError."""
        return self._request("PATCH", path, query, body, _PATCH)

    def delete(self, path: str, **query: Any) -> Object:
        """Deletes. Raises ShoalError."""
        return self._request("DELETE", path, query)

    def items(self, path: str, **query: Any) -> Iterator[Object]:
        """All objects of a list, a page at a time; begins anew when a page is not remembered any more."""
        seen: set[str] = set()
        token = None
        while True:
            try:
                page = self.get(path, limit=PAGE, **query, **({"continue": token} if token else {}))
            except Gone:
                token = None
                continue
            for each in page.get("items") or []:
                key = each["metadata"].get("uid") or each["metadata"]["name"]
                if key not in seen:
                    seen.add(key)
                    yield each
            token = page["metadata"].get("continue")
            if not token:
                return

    def stream(self, path: str, **query: Any) -> Any:
        """An answer that is read as it comes, a urllib3 response; the caller closes it. Raises ShoalError."""
        return self._send("GET", path, query, stream=True)

    def _request(
        self, method: str, path: str, query: Mapping[str, Any], body: Object | None = None, content: str | None = None
    ) -> Object:
        answer = self._send(method, path, query, body, content)
        try:
            found: Object = json.loads(answer.data)
        except ValueError:
            raise ClusterRefused(f"{self.host} does not answer as an API server does: check the kubeconfig") from None
        return found

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any],
        body: Object | None = None,
        content: str | None = None,
        stream: bool = False,
    ) -> Any:
        import urllib3

        headers = {"Accept": "application/json, */*", **self._credentials()}
        if body is not None:
            headers["Content-Type"] = content or "application/json"
        headers |= query.get("headers") or {}
        told = {key: value for key, value in query.items() if value is not None and key != "headers"}
        url = f"{self.host}{path}" + (f"?{urlencode(told)}" if told else "")
        try:
            answer = self._client.rest_client.pool_manager.request(
                method,
                url,
                body=None if body is None else json.dumps(body),
                headers=headers,
                preload_content=not stream,
                retries=False,
                timeout=urllib3.Timeout(connect=self.left(10.0), read=self.left(SILENCE if stream else ANSWER)),
            )
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"the API server {self.host} does not answer ({_reason(error)}): try again") from None
        if answer.status < 300:
            return answer
        text = answer.data or answer.read()
        if "/proxy/" in path and not _is_status(text):
            raise AnsweredBehind(answer.status, text)
        raise _refusal(answer.status, text, method, path, self)

    def _credentials(self) -> dict[str, str]:
        """Headers, renewed by the client where a token runs out."""
        found = self._client.configuration.auth_settings().values()
        return {each["key"]: each["value"] for each in found if each.get("in") == "header" and each.get("value")}


def _client(context: str | None) -> tuple[Any, str]:
    """The official client of a context, and the context's namespace."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise InvalidInput("the Kubernetes client is not installed here: pip install 'shoal[k8s]'") from None
    file = os.environ.get("KUBECONFIG") or None
    settings = client.Configuration()
    settings.retries = False
    try:
        contexts, active = _contexts(config, file, context)
    except config.ConfigException as error:
        if context is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
            return _in_pod(settings)
        why = " ".join(str(error).split())
        raise NotFound(f"no kubeconfig can be used ({why}): set KUBECONFIG, or write ~/.kube/config") from None
    except Exception as error:  # PyYAML's, for a file that is no YAML
        why = " ".join(str(error).split())[:200]
        raise InvalidInput(f"the kubeconfig cannot be read ({why}): correct it") from None
    names = {each["name"]: each for each in contexts}
    if context is not None and context not in names:
        raise NotFound(f"--context {quote(context)} is not in the kubeconfig: it has {', '.join(names) or 'none'}")
    chosen = names[context] if context is not None else active
    try:
        config.load_kube_config(file, chosen["name"], client_configuration=settings)
    except (config.ConfigException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise InvalidInput(
            f"context {quote(chosen['name'])} of the kubeconfig cannot be used ({why}): correct it"
        ) from None
    return client.ApiClient(settings), chosen["context"].get("namespace") or "default"


def _contexts(config: Any, file: str | None, context: str | None) -> tuple[list[Object], Object]:
    """The contexts of the kubeconfig, and the current one; without one, which ``context`` makes up for, an empty one.

    Raises the client's ConfigException, and PyYAML's errors.
    """
    try:
        found: tuple[list[Object], Object] = config.list_kube_config_contexts(file)
        return found
    except config.ConfigException:
        if context is None:
            raise
    # the client insists on a current context, whichever is asked for
    from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION, KubeConfigMerger

    merged = KubeConfigMerger(file or KUBE_CONFIG_DEFAULT_LOCATION).config
    if merged is None:
        raise config.ConfigException("there is none")
    return [each.value for each in merged["contexts"]], {}


def _in_pod(settings: Any) -> tuple[Any, str]:
    """The client of a pod's own account, and the pod's namespace."""
    from kubernetes import client, config

    try:
        config.load_incluster_config(client_configuration=settings)
        return client.ApiClient(settings), _NAMESPACE_OF_POD.read_text().strip()
    except (config.ConfigException, OSError):
        raise NotFound(
            "there is no kubeconfig, and no token of an account is mounted into this pod: set KUBECONFIG, or "
            "automountServiceAccountToken: true"
        ) from None


def _reason(error: Exception) -> str:
    """What is wrong with the connection, without the names of Python's objects."""
    text = " ".join(str(getattr(error, "reason", None) or error).split())
    return text.rpartition(">: ")[2].rpartition(": ")[2][:160] or type(error).__name__


def _is_status(body: bytes) -> bool:
    """Whether an answer is the API server's own."""
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("kind") == "Status"


def _refusal(status: int, body: bytes, method: str, path: str, cluster: Cluster) -> ShoalError:
    """What an answer other than 2xx means for a person."""
    try:
        said = str(json.loads(body).get("message", ""))
    except (ValueError, AttributeError):
        said = body[:200].decode(errors="replace")
    said = " ".join(said.split())[:500].rstrip(".") or f"status {status}"
    if status == 401:
        return ClusterRefused(f"{cluster.host} does not know you ({said}): log in again, or use another --context")
    if status == 403:
        return ClusterRefused(f"not allowed: {said}: ask for a Role that allows it, or use another --namespace")
    if status == 404 and ("could not find the requested resource" in said or "page not found" in said):
        if path.startswith("/apis/ray.io"):
            return ClusterRefused(f"{cluster.host} knows no ray.io/v1: install KubeRay 1.4 or later on that cluster")
        return NotFound(f"{cluster.host} does not have {path}: check the cluster's version")
    if status == 404:
        return NotFound(f"{said}, in {cluster}: {cluster.hint('list')} shows the jobs")
    if status == 409:
        return Conflict(f"{said}: choose another --name, or delete that one first")
    if status == 410:
        return Gone(said)
    if status == 422:
        return ClusterRefused(f"the API server finds it invalid: {said}: correct that")
    if status == 429 or status >= 500:
        return Unreachable(f"the API server {cluster.host} cannot do it now ({said}): try again")
    return ClusterRefused(f"the API server refused {method} {path} ({said}): correct that")
