"""TLS of the chart and of jobs, as it runs: nginx as it is configured, Ray with certificates that pods make."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from charted import WATCHED, may_mount, one, pods_of, rendered
from job_request import job_manifest
from kube_server import address_of_this_machine
from ports import free_port

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
both = pytest.mark.parametrize("kind", ["chart", "job"])
needs_nginx = pytest.mark.skipif(NGINX is None, reason="needs nginx")


def authority(folder: Path) -> Path:
    """A certificate authority as cert-manager makes one: tls.crt and tls.key."""
    folder.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=authority", "-keyout", "tls.key", "-out", "tls.crt"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder


def pod(kind: str) -> Any:
    """The head's pod of the chart, or of a job that is submitted with --tls-secret."""
    objects = rendered(WATCHED) if kind == "chart" else [job_manifest(tls_secret="ray-ca")]
    if kind == "chart":
        return pods_of(objects)[0]["spec"]
    return objects[0]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def certificate(authority: Path, out: Path, address: str, kind: str = "chart") -> Path:
    """Runs the container that makes a pod's certificate, as it is rendered: tls.crt, tls.key and ca.crt."""
    out.mkdir()
    (init,) = pod(kind)["initContainers"]
    names = next(each["value"] for each in init["env"] if each["name"] == "NAMES").replace("$(NAMESPACE)", "team")
    env = {"PATH": os.environ["PATH"], "POD_IP": address, "NAMES": names, "AUTHORITY": str(authority), "OUT": str(out)}
    result = subprocess.run([*init["command"], *init["args"]], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


@both
def test_a_pod_makes_a_certificate_for_its_address_and_the_names_of_services(kind: str, tmp_path: Path) -> None:
    own = certificate(authority(tmp_path / "authority"), tmp_path / "own", "10.1.2.3", kind)
    text = subprocess.run(
        ["openssl", "x509", "-in", own / "tls.crt", "-noout", "-ext", "subjectAltName"], capture_output=True, text=True
    ).stdout
    assert "IP Address:10.1.2.3" in text and "DNS:*.team.svc.cluster.local" in text
    verified = subprocess.run(["openssl", "verify", "-CAfile", own / "ca.crt", own / "tls.crt"], capture_output=True)
    assert verified.returncode == 0
    assert (own / "tls.key").stat().st_mode & 0o077 == 0


class Slow(http.server.BaseHTTPRequestHandler):
    """Says one line, waits until the test has seen it, and says another."""

    protocol_version = "HTTP/1.1"
    seen: threading.Event

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for text in (f"{self.headers['X-Forwarded-Proto']} {len(body)}\n".encode(), b"last\n"):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            self.seen.wait(30)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


class Rpc(grpc.GenericRpcHandler):
    """A method that streams: one message, then another when the test has seen the first."""

    def __init__(self, seen: threading.Event, first: bytes = b"first") -> None:
        self.seen, self.first = seen, first

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            context.set_trailing_metadata((("retry-after", "1"),))
            yield self.first
            assert self.seen.wait(30)
            yield request
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")

        return grpc.unary_stream_rpc_method_handler(answer)


class Names:
    """A name server with one name, whose address changes."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = b"".join(bytes([len(p)]) + p.encode() for p in name.split(".")) + b"\0", address
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            asked, who = self.socket.recvfrom(512)
            question = asked[12 : asked.index(b"\0", 12) + 5]
            known, is_a = question.startswith(self.name), question.endswith(b"\0\1\0\1")
            answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(self.address) if known and is_a else b""
            flags = b"\x81\x80" if known else b"\x81\x83"  # an answer; no such name
            counts = b"\0\1\0" + bytes([bool(answer)]) + bytes(4)
            self.socket.sendto(asked[:2] + flags + counts + question + answer, who)


@pytest.fixture(name="behind")
def behind_fixture(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """nginx as the chart starts it, before an HTTP and a gRPC server of this process."""
    seen = threading.Event()
    handler = type("Handler", (Slow,), {"seen": seen})
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    rpc = grpc.server(ThreadPoolExecutor(2), handlers=[Rpc(seen)])
    rpc_port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    names = Names("rel-shoal-head-svc.team.svc.cluster.local", "127.0.0.1")
    own = certificate(authority(tmp_path / "authority"), tmp_path / "own", "10.1.2.3")
    https, grpcs = free_port(), free_port()
    objects = rendered(WATCHED)
    text = one(objects, "ConfigMap", "rel-shoal-tls")["data"]["nginx.conf"]
    for was, now in (
        ("/tmp/", f"{tmp_path}/"),
        ("rel-shoal-serve-svc:8000", f"127.0.0.1:{web.server_port}"),
        ("-head-svc.$domain:9000", f"-head-svc.$domain:{rpc_port}"),
        ("listen 8443", f"listen 127.0.0.1:{https}"),
        ("listen 9443", f"listen 127.0.0.1:{grpcs}"),
        ("/etc/nginx/tls", str(own)),
    ):
        assert was in text
        text = text.replace(was, now)
    (tmp_path / "nginx.conf").write_text(text)
    (tmp_path / "resolv.conf").write_text("search team.svc.cluster.local svc.cluster.local\nnameserver 127.0.0.1\n")
    (tmp_path / "nginx").write_text(f'#!/bin/sh\nexec {NGINX} -c {tmp_path}/nginx.conf "$@"\n')
    (tmp_path / "nginx").chmod(0o755)
    (box,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    (script,) = box["args"]
    for was, now in (("/tmp/", f"{tmp_path}/"), ("/etc/resolv.conf", f"{tmp_path}/resolv.conf"),
                     (": $2)", f': $2 ":{names.port}")')):  # fmt: skip
        assert was in script
        script = script.replace(was, now)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [*box["command"], script]
    nginx = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", grpcs), 1):
            break
        assert nginx.poll() is None and time.monotonic() < end, nginx.stderr and nginx.stderr.read()
        time.sleep(0.05)
    yield {"https": https, "grpcs": grpcs, "seen": seen, "ca": own / "ca.crt", "names": names, "rpc_port": rpc_port}
    os.killpg(nginx.pid, signal.SIGTERM)  # its hourly loop too
    nginx.communicate(timeout=30)
    web.shutdown()
    rpc.stop(0)


@needs_nginx
def test_http_streams_through_nginx_with_tls(behind: dict[str, Any]) -> None:
    context = ssl.create_default_context(cafile=str(behind["ca"]))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    body = b"x" * (4 << 20)  # more than nginx takes by itself
    with opener.open(f"https://localhost:{behind['https']}/v1/completions", body, timeout=30) as answer:
        assert answer.readline() == b"https 4194304\n", "it came before the answer was whole"
        behind["seen"].set()
        assert answer.readline() == b"last\n"


@needs_nginx
def test_grpc_streams_through_nginx_with_tls_and_keeps_its_trailers(behind: dict[str, Any]) -> None:
    credentials = grpc.ssl_channel_credentials(behind["ca"].read_bytes())
    with grpc.secure_channel(f"localhost:{behind['grpcs']}", credentials, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_stream("/shoal.v1.Inference/Generate")(b"second", timeout=30)
        assert next(call) == b"first"
        behind["seen"].set()
        assert next(call) == b"second"
        with pytest.raises(grpc.RpcError, match="the queue is full"):
            next(call)
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("retry-after", "1") in call.trailing_metadata()


@needs_nginx
def test_grpc_goes_to_the_head_that_takes_anothers_place(behind: dict[str, Any]) -> None:
    """A new cluster of an upgrade, or a lost head: the name of its Service then has another address."""
    behind["seen"].set()
    other = grpc.server(ThreadPoolExecutor(1), handlers=[Rpc(behind["seen"], b"the new head")])
    assert other.add_insecure_port(f"127.0.0.2:{behind['rpc_port']}")
    other.start()
    credentials = grpc.ssl_channel_credentials(behind["ca"].read_bytes())
    with grpc.secure_channel(f"localhost:{behind['grpcs']}", credentials, [("grpc.enable_http_proxy", 0)]) as channel:

        def first() -> bytes:
            return bytes(next(channel.unary_stream("/shoal.v1.Inference/Generate")(b"second", timeout=30)))

        assert first() == b"first"
        behind["names"].address = "127.0.0.2"
        end = time.monotonic() + 60
        while first() != b"the new head":
            assert time.monotonic() < end, "it was not looked up anew"
            time.sleep(0.2)
    other.stop(0)


TASK = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(resources={"second": 1})
def where(): return "on the second node"
print(ray.get(where.remote(), timeout=120))
"""


# the second node knows the head by the name of its Service, as in Kubernetes: in a file of hosts that it alone sees
SERVICE = "first-7xk2p-head-svc.team.svc.cluster.local"
KNOWING = ["unshare", "--mount", "sh", "-c", 'mount --make-rprivate / && mount --bind "$0" /etc/hosts && exec "$@"']


@both
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_nodes_of_ray_meet_with_certificates_and_refuse_who_has_none(
    kind: str, tmp_path: Path, ray_temp_dir: Path
) -> None:
    """Two nodes with certificates of their own: the pods' script, their variables, a task from one to the other."""
    address, port = address_of_this_machine(), free_port()
    shared, hosts = authority(tmp_path / "authority"), tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{address} {SERVICE}\n")
    variables = pod(kind)["containers"][0]["env"]
    token = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-more-than-thirty-two-letters"}

    def environment(name: str) -> dict[str, str]:
        own = certificate(shared, tmp_path / name, address, kind)
        told = {v["name"]: v["value"].replace("/etc/ray/tls", str(own)) for v in variables if "TLS" in v["name"]}
        assert len(told) == 4
        return {**token, **told}

    def node(name: str, *arguments: str) -> subprocess.Popen[bytes]:
        ray = str(Path(sys.executable).parent / "ray")
        with (tmp_path / f"{name}.log").open("wb") as log:
            command = [ray, "start", "--block", f"--node-ip-address={address}", "--num-cpus=1", "--disable-usage-stats",
                       "--object-store-memory=100000000", *arguments]  # fmt: skip
            if name == "second":
                command = [*KNOWING, str(hosts), *command]
            return subprocess.Popen(command, env=environment(name), stdout=log, stderr=log, start_new_session=True)

    def ask(env: dict[str, str], seconds: float) -> str:
        command = [sys.executable, "-c", TASK, f"{address}:{port}"]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "no answer"
        return done.stdout.strip() or done.stderr[-2000:]

    with contextlib.ExitStack() as closing:
        head = node(
            "head", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={ray_temp_dir / kind}"
        )
        closing.callback(_end, head)
        _until(lambda: re.search(r"Ray runtime started", (tmp_path / "head.log").read_text()), tmp_path / "head.log")
        second = node("second", f"--address={SERVICE}:{port}", '--resources={"second": 1}')
        closing.callback(_end, second)
        assert ask(environment("driver"), 180) == "on the second node"
        short = {"RAY_gcs_rpc_server_connect_timeout_s": "2", "RAY_gcs_server_request_timeout_seconds": "5"}
        assert "on the second node" not in ask(token | short, 40), "the token alone"


def _until(true: Any, log: Path) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    for each in [process, *children]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            each.kill()
    process.wait()
