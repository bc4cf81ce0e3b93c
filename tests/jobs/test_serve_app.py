"""``shoal serve`` as a whole: the command, Ray Serve, HTTP and gRPC on free ports; only the engines are a stand-in."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
import typer
from certificate import make_certificate
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serve_parrot import make_run, noted
from serve_process import HERE, Running, command_of, ended, patiently, serving, starting
from shell import PATIENCE, environment, processes_in

from shoal.jobs.cli.serve import serve
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2 as pb
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2_grpc
from shoal.workers.errors import ShoalError

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service on loopback, shared by the tests of this module."""
    with serving(tmp_path_factory.mktemp("serve")) as it:
        yield it


@contextmanager
def held(it: Running) -> Iterator[None]:
    """Answers stop after their first tokens."""
    it.file("hold").touch()
    try:
        yield
    finally:
        it.file("hold").unlink(missing_ok=True)


def pieces(lines: Iterator[str]) -> Iterator[str]:
    """The texts of a completion's events."""
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def test_http_and_grpc_give_the_same_answer(service: Running) -> None:
    answer = service.complete()
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    assert text.startswith("the seathe sea")
    with httpx.stream("POST", f"{service.url}/v1/completions", json=service.body(stream=True), timeout=60) as stream:
        assert "".join(pieces(stream.iter_lines())) == text
    with grpc.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        responses = list(stub.Generate(pb.GenerateRequest(text="the sea", sampling=pb.Sampling(max_tokens=30))))
        assert "".join(response.text for response in responses) == text
        info = stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.name, info.step) == (service.run.name, 5)
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    models = httpx.get(f"{service.url}/v1/models").json()["data"]
    assert [(model["id"], model["step"]) for model in models] == [(service.run.name, 5)]


def printed_commands(service: Running) -> tuple[str, str]:
    """What a service says one may try: over HTTP, and over gRPC with this Python."""
    said = [line.strip().removeprefix("try").strip() for line in service.told().splitlines()]
    (curl,) = (line for line in said if line.startswith("curl "))
    (ask,) = (line for line in said if line.startswith("python -m shoal.jobs.serve.ask "))
    return curl, ask.replace("python", sys.executable, 1)


def test_the_commands_that_are_printed_work(service: Running) -> None:
    curl, ask = printed_commands(service)
    assert f"{service.url}/v1\n" in service.told()
    answer = subprocess.run(ask, shell=True, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("The The ")
    if subprocess.run(["which", "curl"], capture_output=True).returncode == 0:
        fetched = subprocess.run(curl, shell=True, capture_output=True, text=True)
        assert json.loads(fetched.stdout)["choices"][0]["text"] == answer.stdout.rstrip("\n")


def test_the_first_tokens_come_before_the_last_are_made(service: Running) -> None:
    with (
        held(service),
        httpx.stream("POST", f"{service.url}/v1/completions", json=service.body(stream=True), timeout=60) as stream,
    ):
        parts = pieces(stream.iter_lines())
        first = next(parts)
        assert first
        service.file("hold").unlink()
        assert first + "".join(parts) == service.complete().json()["choices"][0]["text"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_the_engine(service: Running, stream: bool) -> None:
    count = noted(service.run).count("cancelled")
    with held(service):
        began = noted(service.run).count("began")
        request = httpx.Request("POST", f"{service.url}/v1/completions", json=service.body(stream=stream))
        with socket.create_connection(("127.0.0.1", service.port)) as raw:
            head = "".join(f"{key}: {value}\r\n" for key, value in request.headers.items())
            raw.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
            patiently(lambda: noted(service.run).count("began") == began + 1)
            if stream:
                assert raw.recv(1)
        patiently(lambda: noted(service.run).count("cancelled") == count + 1)


def test_a_grpc_call_that_is_cancelled_frees_the_engine(service: Running) -> None:
    count = noted(service.run).count("cancelled")
    with held(service), grpc.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(pb.GenerateRequest(text="the sea", sampling=pb.Sampling(max_tokens=30)))
        assert next(call).text
        call.cancel()
        patiently(lambda: noted(service.run).count("cancelled") == count + 1)


def test_refusals_come_through_the_proxy_as_the_service_says_them(service: Running) -> None:
    service.file("busy").touch()
    try:
        busy = service.complete()
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
        assert "the queue is full" in busy.json()["error"]["message"]
    finally:
        service.file("busy").unlink()
    assert service.complete(model="other").status_code == 404
    assert service.complete(max_tokens=-1).status_code == 400
    assert service.complete(prompt="x" * (5 << 20)).status_code == 413
    assert httpx.get(f"{service.url}/nowhere").json()["error"]["message"]


def test_many_streams_go_on_beside_one_that_nobody_reads(service: Running) -> None:
    body = json.dumps(service.body(stream=True, max_tokens=20_000)).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", service.port))
        slow.sendall(head.encode() + b"\r\n" + body)
        assert slow.recv(1)
        for _ in range(3):
            assert service.complete().status_code == 200


def test_sigterm_refuses_new_requests_lets_the_old_ones_end_and_leaves_nothing(service: Running) -> None:
    """The last test of the service that this module shares."""
    it = service
    patiently(lambda: noted(it.run).count("began") == sum(map(noted(it.run).count, ("done", "cancelled"))))
    before = len(noted(it.run))
    with grpc.insecure_channel(it.address) as channel:
        it.file("hold").touch()
        stub, health = inference_pb2_grpc.InferenceStub(channel), health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        asked = pb.GenerateRequest(text="the sea", sampling=pb.Sampling(max_tokens=30))
        call = stub.Generate(asked)
        text = next(call).text
        with httpx.stream("POST", f"{it.url}/v1/completions", json=it.body(stream=True), timeout=60) as stream:
            parts = pieces(stream.iter_lines())
            mine = next(parts)
            it.process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            patiently(lambda: it.ready() == 503)
            assert it.complete().status_code == 503
            with pytest.raises(grpc.RpcError) as refusal:
                next(stub.Generate(asked))
            assert refusal.value.code() is Code.UNAVAILABLE
            assert it.process.poll() is None
            it.file("hold").unlink()
            mine += "".join(parts)
        text += "".join(response.text for response in call)
        assert mine == text
        assert len(text) > len("the sea")
        assert it.process.wait(PATIENCE) == 0, it.told()
    assert noted(it.run)[0] == "opened"
    assert noted(it.run)[before:] == ["began", "began", "done", "done", "closed"]
    assert "stopping" in it.told()
    assert not processes_in(it.run.parent)


@pytest.mark.slow
def test_what_does_not_end_in_time_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain", "0.5") as it:
        it.file("hold").touch()
        with httpx.stream("POST", f"{it.url}/v1/completions", json=it.body(stream=True), timeout=60) as stream:
            parts = pieces(stream.iter_lines())
            assert next(parts)
            assert ended(it, signal.SIGINT) == 130
            assert "1 requests were not done after 0.5 s" in it.told()
    assert not processes_in(tmp_path)


@pytest.mark.slow
def test_it_can_be_stopped_while_the_weights_load(tmp_path: Path) -> None:
    run = make_run(tmp_path / "parrot")
    (run / "slow").touch()
    with starting(tmp_path) as it:
        patiently(it.file("pid").exists, it.process)
        assert ended(it, signal.SIGTERM) == 0
        assert "serving" not in it.told()
    assert not processes_in(tmp_path)


@pytest.mark.slow
def test_a_terminal_s_ctrl_c_while_ray_starts_ends_it_without_waiting_for_ray(tmp_path: Path) -> None:
    with starting(tmp_path, SHOAL_RUNS=str(tmp_path)) as it:  # a variable that Ray's processes inherit
        patiently(lambda: any("/dashboard.py " in line for line in processes_in(tmp_path)), it.process)
        os.killpg(it.process.pid, signal.SIGINT)
        assert it.process.wait(PATIENCE) == 130
        assert it.lines == ["loading  parrot: step 5"]
    assert not processes_in(tmp_path)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain", "600") as it, grpc.insecure_channel(it.address) as channel:
        it.file("hold").touch()
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(text="the sea", sampling=pb.Sampling(max_tokens=30))
        )
        assert next(call).text
        it.process.send_signal(signal.SIGTERM)
        patiently(lambda: it.ready() == 503)
        assert ended(it, signal.SIGTERM) == 130
    assert not processes_in(tmp_path)


@pytest.mark.slow
def test_a_replica_that_dies_is_started_again(tmp_path: Path) -> None:
    with serving(tmp_path) as it:
        os.kill(int(it.file("pid").read_text()), signal.SIGKILL)
        patiently(lambda: noted(it.run).count("opened") == 2, it.process)
        patiently(lambda: it.ready() == 200, it.process)
        if "Ray Serve starts it again" in it.told():  # it looks every two seconds, and a quick restart escapes it
            patiently(lambda: "the service answers again" in it.told(), it.process)
        assert it.complete().status_code == 200
        with grpc.insecure_channel(it.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            patiently(lambda: grpc.channel_ready_future(channel).result(PATIENCE) is None)
            assert stub.GetModelInfo(pb.GetModelInfoRequest()).step == 5
        assert ended(it, signal.SIGTERM) == 0


@pytest.mark.slow
def test_a_replica_that_cannot_be_started_again_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, GIVE_UP="3") as it:
        it.file("refusal").write_text("the weights are gone: restore them")
        os.kill(int(it.file("pid").read_text()), signal.SIGKILL)
        assert it.process.wait(PATIENCE) == 4
        assert "Ray Serve starts it again" in it.told()
        assert "error: the service has been unhealthy for " in it.told()
    assert not processes_in(tmp_path)


@pytest.mark.slow
def test_open_to_others_it_asks_for_a_token_and_speaks_tls_only(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    (tmp_path / "tokens").write_text("one\ntwo\n")
    tls = ["--tls-cert", str(made.certificate), "--tls-key", str(made.key)]
    with serving(tmp_path, "--host", "0.0.0.0", "--token-file", str(tmp_path / "tokens"), *tls) as it:
        trust = httpx.Client(verify=ssl.create_default_context(cafile=made.certificate))
        assert trust.get(f"{it.url}/readyz").status_code == 200
        assert trust.get(f"{it.url}/v1/models").status_code == 401
        assert trust.get(f"{it.url}/v1/models", headers={"Authorization": "Bearer two"}).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{it.port}/readyz")
        authority = grpc.ssl_channel_credentials(made.certificate.read_bytes())
        with grpc.secure_channel(it.address, authority) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            with pytest.raises(grpc.RpcError) as refusal:
                stub.GetModelInfo(pb.GetModelInfoRequest())
            assert refusal.value.code() is Code.UNAUTHENTICATED
            told = stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=(("authorization", "Bearer one"),))
            assert told.name == it.run.name
        for command in printed_commands(it):
            answer = subprocess.run(
                command, shell=True, capture_output=True, text=True, env={**os.environ, "SHOAL_API_TOKEN": "two"}
            )
            assert answer.returncode == 0 and "The " in answer.stdout, answer


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster that was there before, and its address."""
    command = [sys.executable, "-c", CLUSTER]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(PYTHONPATH=str(HERE))
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(PATIENCE)
        process.stdout.close()


@pytest.mark.slow
def test_in_a_cluster_one_service_runs_and_the_cluster_outlives_it(tmp_path: Path) -> None:
    with cluster() as address:
        with serving(tmp_path, RAY_ADDRESS=address) as it:
            assert it.complete().status_code == 200
            other = command_of(it.run, RAY_ADDRESS=address)
            assert other.returncode == 4
            assert other.stderr.startswith("error: Ray Serve runs in this cluster already")
            assert it.complete().status_code == 200
            assert ended(it, signal.SIGTERM) == 0
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            other = command_of(it.run, "--port", str(taken.getsockname()[1]), RAY_ADDRESS=address)
            assert other.returncode == 4
            assert "cannot be listened on" in other.stderr
        with serving(tmp_path, RAY_ADDRESS=address) as it:
            assert it.complete().status_code == 200
            assert ended(it, signal.SIGINT) == 130


@pytest.mark.slow
def test_what_the_engines_refuse_is_said_in_their_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "parrot")
    (run / "refusal").write_text("serve.pages=1 is too few: set it to 2 or more")
    result = command_of(run)
    assert (result.returncode, result.stderr) == (3, "error: serve.pages=1 is too few: set it to 2 or more\n")


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--host", "0.0.0.0"], 2, "without a bearer token (--token-file, or SHOAL_API_TOKEN) and without TLS"),
        (["--host", "0.0.0.0", "--token-file", "tokens"], 2, "without TLS (--tls-cert and --tls-key): add what is"),
        (["--host", "::", "--tls-cert", "localhost.pem", "--tls-key", "localhost.key"], 2, "without a bearer token"),
        (["--tls-cert", "localhost.pem"], 2, "--tls-cert and --tls-key belong together"),
        (["--tls-cert", "localhost.pem", "--tls-key", "nowhere"], 5, "nowhere does not exist: name a PEM file"),
        (["--tls-cert", "localhost.pem", "--tls-key", "other.key"], 3, "cannot be used (KEY_VALUES_MISMATCH)"),
        (["--tls-cert", "tokens", "--tls-key", "other.key"], 3, "tokens and --tls-key"),
        (["--port", "9000"], 2, "--port and --grpc-port are both 9000: choose two different ports"),
        (["--token-file", "nowhere"], 5, "--token-file nowhere does not exist"),
        (["--token-file", "empty"], 3, "--token-file empty must hold tokens of visible ASCII characters"),
        (["--step", "7"], 5, "has no checkpoint of step 7"),
        (["--set", "serve.pages=-1"], 3, "serve.pages"),
        (["--port", "{taken}"], 4, "--port {taken} cannot be listened on at 127.0.0.1 (Address already in use)"),
        (["--grpc-port", "{taken}"], 4, "--grpc-port {taken} cannot be listened on at 127.0.0.1"),
        (["--host", "no.such.host.invalid", "--insecure"], 4, "cannot be listened on at no.such.host.invalid"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHOAL_API_TOKEN", raising=False)
    make_run(tmp_path / "parrot")
    make_certificate(tmp_path)
    make_certificate(tmp_path, "other")
    (tmp_path / "tokens").write_text("one\n")
    (tmp_path / "empty").write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = refusal_of("parrot", *(option.format(taken=port) for option in options))
    assert (error.exit_code, says.format(taken=port) in str(error)) == (code, True), error
    assert "\n" not in str(error)


def test_a_token_in_the_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_API_TOKEN", "secret")
    error = refusal_of(str(make_run(tmp_path / "parrot")), "--host", "0.0.0.0")
    assert error.exit_code == 2
    assert "without TLS" in str(error) and "bearer" not in str(error)


def test_what_must_be_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.cli.serve.NEEDS", ("grpc", "surely_not_there"))
    error = refusal_of("parrot")
    assert error.exit_code == 3
    assert str(error) == "shoal serve needs surely_not_there, not installed here: pip install 'shoal[serve]'"


def refusal_of(*arguments: str) -> ShoalError:
    """What ``shoal serve`` refuses with, in this process."""
    app = typer.Typer()
    app.command()(serve)
    with pytest.raises(ShoalError) as caught:
        app(arguments, standalone_mode=False)
    return caught.value
