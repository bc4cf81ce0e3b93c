"""A proxy before the API server that fails as proxies and servers do: it refuses, goes away, loses an answer."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import yaml
from kube_server import ApiServer

from shoal.jobs.kube.api import Cluster

Fate = tuple[int, bytes] | Literal["away", "lost"] | None


class Proxy:
    """Forwards requests, unless ``fate(method, path)`` says otherwise.

    A fate is an answer instead of the server's; ``away``: the connection ends at once; ``lost``: the server is asked,
    and its answer does not arrive; None: all is well.
    """

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.asked: list[tuple[str, str]] = []
        self.fate: Callable[[str, str], Fate] = lambda method, path: None
        self._web = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, server))
        threading.Thread(target=self._web.serve_forever, daemon=True).start()
        config = yaml.safe_load(server.kubeconfig.read_text())
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self._web.server_port}"}
        self.kubeconfig = folder / "proxied"
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def cluster(self, namespace: str, patch: Any) -> Cluster:
        """A namespace as it is seen through the proxy. patch: pytest's monkeypatch."""
        patch.setenv("KUBECONFIG", str(self.kubeconfig))
        return Cluster("admin", namespace)

    def close(self) -> None:
        """Ends it."""
        self._web.shutdown()
        self._web.server_close()


def _handler(proxy: Proxy, server: ApiServer) -> type[BaseHTTPRequestHandler]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            self.close_connection = True
            proxy.asked.append((self.command, self.path))
            fate = proxy.fate(self.command, self.path)
            if isinstance(fate, tuple):
                self._answer(*fate)
                return
            if fate == "away":
                return
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            headers = {key: value for key, value in self.headers.items() if key not in ("Host", "Content-Length")}
            request = urllib.request.Request(server.url + self.path, data, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                    if fate != "lost":
                        self._head(answer.status, "Transfer-Encoding", "chunked")
                        while chunk := answer.read1(1 << 16):
                            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                        self.wfile.write(b"0\r\n\r\n")
            except urllib.error.HTTPError as error:
                self._answer(error.code, error.read())
            except OSError:
                return

        do_GET = do_POST = do_PATCH = do_DELETE = _serve

        def _answer(self, status: int, body: bytes) -> None:
            self._head(status, "Content-Length", str(len(body)))
            self.wfile.write(body)

        def _head(self, status: int, key: str, value: str) -> None:
            self.send_response(status)
            self.send_header(key, value)
            self.send_header("Connection", "close")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
