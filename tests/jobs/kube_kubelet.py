"""A small stand-in for a kubelet: the API server asks it for the logs of containers and for ports of pods.

It is registered as a Node, serves HTTPS as a kubelet does, and is all of the API that is not Kubernetes' own here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web
from certificate import make_certificate
from kube_server import ApiServer

START = int(datetime(2026, 8, 1, tzinfo=UTC).timestamp()) * 10**9


@dataclass
class Log:
    """Lines of a container, each with its time in nanoseconds, or None. ended: no more will come."""

    lines: list[tuple[int | None, bytes]] = field(default_factory=list)
    ended: bool = False
    asked: list[dict[str, str]] = field(default_factory=list)

    def write(self, text: str, at: int | None) -> None:
        """Adds a line, ``at`` nanoseconds after ``START``; None: one of the kubelet's own, without a time."""
        self.lines.append((None if at is None else START + at, text.encode()))


def stamp(at: int | None) -> bytes:
    """A time as Go's RFC3339Nano writes it, without zeros at the end, and a space; nothing for None."""
    if at is None:
        return b""
    seconds, nanos = divmod(at, 10**9)
    digits = f".{nanos:09d}".rstrip("0").rstrip(".")
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{digits}Z ".encode()


class Kubelet:
    """Serves ``logs[pod]`` and, at any port of any pod, what ``port`` on this machine serves."""

    def __init__(self, server: ApiServer, folder: Path, node: str = "node-1") -> None:
        self.node, self.logs, self.port = node, dict[str, Log](), 0
        self._loop = asyncio.new_event_loop()
        made = make_certificate(folder, "kubelet")
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(made.certificate, made.key)
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(30)
        endpoint = {"daemonEndpoints": {"kubeletEndpoint": {"Port": self.listening}}}
        status = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}], **endpoint}
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}, "status": status}
        server.request("POST", "/api/v1/nodes", body, quiet=True)  # another module may have made it
        path, kind = f"/api/v1/nodes/{node}/status", "application/merge-patch+json"
        server.request("PATCH", path, {"status": status}, content=kind)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        ready.set()
        self._loop.run_forever()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._log)
        app.router.add_get("/portForward/{namespace}/{pod}", self._forward)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        self.listening: int = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _log(self, request: web.Request) -> web.StreamResponse:
        log, asked = self.logs[request.match_info["pod"]], dict(request.query)
        log.asked.append(asked)
        since = datetime.fromisoformat(asked["sinceTime"].replace("Z", "+00:00")) if "sinceTime" in asked else None
        first = int(since.timestamp()) * 10**9 if since else 0
        at = max(0, len(log.lines) - int(asked["tailLines"])) if "tailLines" in asked else 0
        answer = web.StreamResponse()
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                ended = log.ended
                batch = log.lines[at : at + 500]
                at += len(batch)
                text = b"".join(stamp(when) + line + b"\n" for when, line in batch if when is None or when >= first)
                for cut in (text[: len(text) // 2 + 3], text[len(text) // 2 + 3 :]):  # pieces end within lines
                    if cut:
                        await answer.write(cut)
                if not batch and (ended or asked.get("follow") != "true"):
                    break
                await asyncio.sleep(0 if batch else 0.01)
            await answer.write_eof()
        return answer

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        """Two channels a port, for data and for errors; each begins with the port's number."""
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        port = int(request.query["port"].split(",")[0])
        for channel in (0, 1):
            await socket.send_bytes(bytes([channel]) + struct.pack("<H", port))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            await socket.send_bytes(b"\1connection refused")
            await socket.close()
            return socket

        async def back() -> None:
            while data := await reader.read(1 << 14):
                await socket.send_bytes(b"\0" + data)
            await socket.close()

        pumping = asyncio.create_task(back())
        async for message in socket:
            if message.type is WSMsgType.BINARY and message.data[:1] == b"\0":
                writer.write(message.data[1:])
        writer.close()
        pumping.cancel()
        return socket

    def close(self) -> None:
        """Ends it."""

        async def end() -> None:
            await self._runner.cleanup()

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


def make_pod(
    server: ApiServer, namespace: str, name: str, labels: dict[str, str], state: Any = None, node: str = "node-1",
    container: str = "ray-job-submitter", **status: Any,
) -> None:  # fmt: skip
    """A pod of one container with a state, such as ``{"running": {}}``; its status is set as a kubelet would."""
    body = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels},
        "spec": {"nodeName": node, "containers": [{"name": container, "image": "shoal:0.1.0"}]},
    }  # fmt: skip
    server.request("POST", f"/api/v1/namespaces/{namespace}/pods", body)
    set_pod(server, namespace, name, state, container, **status)


def set_pod(
    server: ApiServer, namespace: str, name: str, state: Any, container: str = "ray-job-submitter", **status: Any
) -> None:
    """Sets a pod's status."""
    one = {"name": container, "image": "shoal:0.1.0", "imageID": "", "ready": False, "restartCount": 0}
    told = {"containerStatuses": [{**one, "state": state}]} if state is not None else {}
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/status"
    server.request("PATCH", path, {"status": {**told, **status}}, content="application/merge-patch+json")
