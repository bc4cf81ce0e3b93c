"""A port of a pod as a port of this machine, through the API server."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shoal.jobs.kube.api import Cluster, Object
from shoal.jobs.kube.ray_api import cluster_name
from shoal.workers.errors import ClusterRefused, NotFound, last_line

_PIECE = 1 << 16

Told = Callable[[str], None]


def head_pod(cluster: Cluster, job: Object) -> str:
    """The name of the head's pod. Raises NotFound when it does not run."""
    name, found = job["metadata"]["name"], cluster_name(job)
    selector = f"ray.io/cluster={found},ray.io/node-type=head"
    pods = list(cluster.items(cluster.core("pods"), labelSelector=selector)) if found else []
    running = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Running"]
    if not running:
        raise NotFound(f"the head of {name} does not run: {cluster.hint(f'status {name}')} says why")
    return str(running[0]["metadata"]["name"])


@contextmanager
def forwarded(cluster: Cluster, pod: str, remote: int, local: int = 0, told: Told = lambda said: None) -> Iterator[int]:
    """Listens on this machine for the time of a ``with`` block; the port is what is given (0: a free one).

    told: is given a sentence when a connection fails, from another thread.

    Raises ClusterRefused when the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", local))
    except OSError as error:
        listener.close()
        raise ClusterRefused(f"--port {local} cannot be listened on ({error.strerror}): choose another") from None
    listener.listen()
    threading.Thread(target=_accept, args=(listener, cluster, pod, remote, told), daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _accept(listener: socket.socket, cluster: Cluster, pod: str, remote: int, told: Told) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the block was left
            return
        threading.Thread(target=_serve, args=(connection, cluster, pod, remote, told), daemon=True).start()


def _serve(connection: socket.socket, cluster: Cluster, pod: str, remote: int, told: Told) -> None:
    """One connection: a websocket to the API server, and bytes both ways until one side ends."""
    from kubernetes import client
    from kubernetes.stream import portforward

    with connection:
        try:
            # a client of its own: the library changes a client for as long as it opens a websocket
            api = client.CoreV1Api(client.ApiClient(cluster.client.configuration))
            tunnel: Any = portforward(
                api.connect_get_namespaced_pod_portforward, pod, cluster.namespace, ports=str(remote)
            )
        except Exception as error:  # the library's, its websocket's, and those of sockets
            told(f"pod {pod} cannot be reached through {cluster.host} ({last_line(error)}): is it still there?")
            return
        far = tunnel.socket(remote)
        far.setblocking(True)
        back = threading.Thread(target=_pump, args=(far, connection), daemon=True)
        back.start()
        _pump(connection, far)
        back.join()
        if problem := tunnel.error(remote):
            told(f"port {remote} of pod {pod} does not answer ({last_line(problem)}): is its container running?")


def _pump(source: Any, target: Any) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
