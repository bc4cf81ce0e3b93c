"""Ray Serve for the time of a ``with`` block: an HTTP proxy on the head node, and one application behind it."""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.workers import errors
from shoal.workers.errors import ClusterRefused, InvalidInput, ShoalError, UsageError, last_line

APPLICATION = "shoal"
# Ray gives this resource to the head node alone: proxy and replica then stand beside each other, on the node whose
# address is known, and gRPC, which the replica serves itself, has the address of HTTP.
HEAD = {"node:__internal_head__": 0.001}
POLL = 0.1  # seconds between two looks at Serve's state while it starts
WATCH = 2.0  # seconds between two looks while it runs
GIVE_UP = 600.0  # seconds that Serve may take to start again what died: weights take minutes to load
_FAILED = {"DEPLOY_FAILED", "UNHEALTHY"}


@dataclass(frozen=True)
class Listen:
    """Where a service listens. certificate, key: PEM files for TLS, both or neither."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 9000
    certificate: Path | None = None
    key: Path | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it. A name other than localhost counts as open."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """The address of HTTP."""
        return f"http{'s' if self.certificate else ''}://{self._bracketed}:{self.port}"

    @property
    def grpc(self) -> str:
        """The address of gRPC, as ``host:port``."""
        return f"{self._bracketed}:{self.grpc_port}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def check(self, tokens: bool, insecure: bool) -> None:
        """Refuses what would leave a door open, or cannot work. tokens: whether a bearer token is asked for.

        Raises: UsageError, InvalidInput.
        """
        if self.port == self.grpc_port:
            raise UsageError(f"--port and --grpc-port are both {self.port}: choose two different ports")
        if (self.certificate is None) != (self.key is None):
            raise UsageError("--tls-cert and --tls-key belong together: give both, or neither")
        if self.certificate and self.key:
            _check_certificate(self.certificate, self.key)
        missing = [
            what
            for what, there in (
                ("a bearer token (--token-file, or SHOAL_API_TOKEN)", tokens),
                ("TLS (--tls-cert and --tls-key)", self.certificate is not None),
            )
            if not there
        ]
        if missing and not self.loopback and not insecure:
            raise UsageError(
                f"--host {self.host} opens the service to other machines, without {' and without '.join(missing)}: "
                f"add what is missing, or --insecure if something else guards it"
            )

    def refuse_taken_ports(self) -> None:
        """Raises ClusterRefused when one of the ports cannot be listened on, on this machine."""
        for option, port in (("--port", self.port), ("--grpc-port", self.grpc_port)):
            with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise ClusterRefused(
                        f"{option} {port} cannot be listened on at {self.host} ({error.strerror}): "
                        f"choose another one with {option}"
                    ) from None


def _check_certificate(certificate: Path, key: Path) -> None:
    for option, file in (("--tls-cert", certificate), ("--tls-key", key)):
        if not file.is_file():
            raise errors.NotFound(f"{option} {file} does not exist: name a PEM file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise InvalidInput(
            f"--tls-cert {certificate} and --tls-key {key} cannot be used ({why}): "
            f"give a certificate and its key, without a passphrase, in PEM"
        ) from None


@contextmanager
def ray_serve(listen: Listen) -> Iterator[None]:
    """Ray Serve, with an HTTP proxy on the head node. Ray is running already; Serve is ended with the block.

    Raises: ClusterRefused when Serve runs in this cluster already or cannot be started, or a port is taken.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells its steps on standard error
    if serve.status().proxies:
        raise ClusterRefused(
            "Ray Serve runs in this cluster already, on ports of its own: "
            "end it with `serve shutdown`, or take another cluster"
        )
    if _on_head_node():
        listen.refuse_taken_ports()
    options: dict[str, Any] = {"host": listen.host, "port": listen.port}
    if listen.certificate:
        options |= {"ssl_keyfile": str(listen.key), "ssl_certfile": str(listen.certificate)}
    logs = {"log_level": "WARNING", "enable_access_log": False}
    try:
        try:
            serve.start(proxy_location="HeadOnly", http_options=options, logging_config=logs)
        except Exception as error:
            raise ClusterRefused(f"Ray Serve did not start ({last_line(error)}): Ray's logs say more") from error
        yield
    finally:
        serve.shutdown()


def _on_head_node() -> bool:
    import ray

    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and HEAD.keys() <= node["Resources"].keys() for node in ray.nodes())


def deploy(application: Any, stopped: Callable[[], bool]) -> Any:
    """Starts an application and waits until it answers. Returns its handle, or None when ``stopped`` says so first.

    Raises: the ShoalError that its constructor raised; ClusterRefused when it failed otherwise.
    """
    from ray import serve
    from ray.serve.api import RunTarget

    handle = serve.run_many([RunTarget(application, APPLICATION)], wait_for_applications_running=False)[0]
    while not stopped():
        state, message = application_state()
        if state == "RUNNING":
            return handle
        if state in _FAILED:
            raise _refusal(message)
        time.sleep(POLL)
    return None


def watch(stopped: Callable[[], bool], told: Callable[[str], None]) -> None:
    """Returns when ``stopped`` says so. Serve starts what died again; tells when that begins, and when it is done.

    Raises: ClusterRefused when Serve is gone, or has tried for GIVE_UP seconds.
    """
    well, since = True, time.monotonic()
    due = since + WATCH
    while not stopped():
        time.sleep(POLL)
        now = time.monotonic()
        if now < due:
            continue
        due = now + WATCH
        state, message = application_state()
        if (state == "RUNNING") != well:
            well, since = not well, now
            told("the service answers again" if well else f"the service is {state.lower()}: Ray Serve starts it again")
        if not well and now - since > GIVE_UP:
            raise ClusterRefused(
                f"the service has been {state.lower()} for {now - since:.0f} s ({last_line(message)}): "
                f"Ray's logs say more; start it again"
            )


def application_state() -> tuple[str, str]:
    """What Serve says of the application: its state, such as RUNNING, and why. Raises ClusterRefused without Serve."""
    from ray import serve

    try:
        found = serve.status().applications.get(APPLICATION)
    except Exception as error:
        raise ClusterRefused(f"Ray Serve does not answer ({last_line(error)}): start the service again") from error
    if found is None:
        return "GONE", ""
    said = [found.message, *(each.message for each in found.deployments.values())]
    return found.status.value, "\n".join(part for part in said if part)


def _refusal(message: str) -> ShoalError:
    """The ShoalError that a traceback ends with; else ClusterRefused with its last line."""
    found = re.findall(r"^\S*?(\w+): (.+)$", message, re.MULTILINE)
    for name, sentence in reversed(found):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, ShoalError):
            return kind(sentence)
    return ClusterRefused(f"the service did not start: {last_line(message)}: Ray's logs say more")
