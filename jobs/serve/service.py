"""Runs the service until it is asked to stop: Ray, Ray Serve, the replica; then drains it, and ends what it started."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cluster.local import RaySession, ray_session
from shoal.cluster.serving import Listen, deploy, ray_serve, watch
from shoal.cluster.supervisor import Stop
from shoal.jobs.serve.app import serve_application
from shoal.workers.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from shoal.jobs.serve.gate import Settings

DRAIN = 30.0  # seconds that requests under way have to end, once the service is asked to stop
ANSWER = 10.0  # seconds more, for the answer itself
TOKEN = "SHOAL_API_TOKEN"  # the environment variable that holds the bearer token


def run_service(
    factory: str,
    options: Mapping[str, Any],
    listen: Listen,
    settings: Settings,
    *,
    ranks: int,
    ready: Callable[[Any], None],
    told: Callable[[str], None],
    drain: float = DRAIN,
) -> int:
    """Serves until SIGINT, SIGTERM or SIGHUP comes, and returns the signal's number; a second one interrupts.

    factory, options: see ``Replica``. ranks: what a local Ray has room for. ready: called with the ModelInfo once the
    service answers. told: takes sentences about what happens. drain: seconds that requests under way have to end.

    Raises: ShoalError for whatever cannot be done; KeyboardInterrupt.
    """
    if os.environ.get("RAY_ADDRESS") in (None, "", "local"):  # else the ports are another machine's
        listen.refuse_taken_ports()
    # Ray is not waited for while it starts: a terminal signals it too, and then it waits a minute for parts that ended.
    stop = Stop(at_once=True)

    def stopped() -> bool:
        return bool(stop.signal)

    with stop.listening():
        try:
            with ray_session(ranks) as ray:
                stop.at_once = False
                with ray_serve(listen):
                    _serve(serve_application(factory, options, listen, settings), ray, stopped, ready, told, drain)
        except KeyboardInterrupt:
            if not stop.at_once:
                raise
    return stop.signal


def _serve(
    application: Any,
    ray: RaySession,
    stopped: Callable[[], bool],
    ready: Callable[[Any], None],
    told: Callable[[str], None],
    drain: float,
) -> None:
    """From the start of the application to the end of its requests, once ``stopped`` says so."""
    handle = deploy(application, stopped)
    if handle is None:
        return
    ready(handle.model.remote().result())
    if ray.dashboard:
        told(f"ray      {ray.dashboard}/#/serve")
    watch(stopped, told)
    told(f"stopping: new requests are refused, those under way have {drain:g} s; a second signal ends it at once")
    _drain(handle, drain, told)


def _drain(handle: Any, seconds: float, told: Callable[[str], None]) -> None:
    try:
        left = handle.drain.remote(seconds).result(timeout_s=seconds + ANSWER)
    except Exception as error:
        told(f"the service did not answer any more ({type(error).__name__}): requests under way are lost")
        return
    if left:
        told(f"{left} requests were not done after {seconds:g} s: they are cut off")


def examples(listen: Listen, model: str, token: bool) -> tuple[str, str]:
    """A command for HTTP and one for gRPC, to paste into a shell on this machine."""
    reached = replace(listen, host="127.0.0.1") if listen.host in ("0.0.0.0", "::") else listen
    curl, ask = ["curl"], ["python -m shoal.jobs.serve.ask"]
    if listen.certificate:
        certificate = shlex.quote(str(listen.certificate))
        curl.append(f"--cacert {certificate}")
        ask.append(f"--tls-ca {certificate}")
    if token:
        curl.append(f'-H "Authorization: Bearer ${TOKEN}"')  # ask reads the variable by itself
    body = json.dumps({"model": model, "prompt": "The ", "max_tokens": 32})
    curl += [f"-H 'Content-Type: application/json' -d {shlex.quote(body)}", f"{reached.url}/v1/completions"]
    return " ".join(curl), " ".join([*ask, reached.grpc, "'The '"])


def read_tokens(file: Path | None) -> tuple[str, ...] | None:
    """The bearer tokens in a file, one a line, else the one of SHOAL_API_TOKEN, else None.

    Raises: NotFound, InvalidInput for a file without tokens, or a token that no header can hold.
    """
    if file is None:
        where, text = TOKEN, os.environ.get(TOKEN, "")
        if not text:
            return None
    else:
        where = f"--token-file {file}"
        try:
            text = file.read_text()
        except FileNotFoundError:
            raise NotFound(f"{where} does not exist: name a file with a bearer token on each line") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"{where} cannot be read ({error}): name a text file with a token on each line"
            ) from None
    tokens = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not tokens or not all(token.isascii() and token.isprintable() and " " not in token for token in tokens):
        raise InvalidInput(f"{where} must hold tokens of visible ASCII characters, one a line: write, say, 32 of them")
    return tokens
