"""Ray's job API over HTTP, as its dashboard serves it. Needs neither Ray nor torch on this machine."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any
from urllib.parse import quote as escape
from urllib.parse import urlsplit

from shoal.jobs.kube.api import Unreachable
from shoal.jobs.kube.limit import Limited
from shoal.jobs.kube.ray_answers import refusal
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound

Object = dict[str, Any]

ANSWER = 30.0  # seconds for an answer
UPLOAD = 300.0  # seconds for a package to arrive
TRIES = 4  # of a request that changes nothing, while nobody answers
FIRST_PAUSE = 0.3  # seconds before the second try; doubled for each further one
_DEFAULT_TOKEN = Path("~/.ray/auth_token")  # where Ray keeps a token that it made by itself
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_REMEDY = "set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the cluster, or RAY_AUTH_TOKEN_PATH to its file"


class RayCluster(Limited):
    """The dashboard at an address such as ``http://head:8265``."""

    def __init__(self, address: str) -> None:
        """Makes no request. Raises InvalidInput for what is no such address, or a token that cannot be sent."""
        try:
            parts = urlsplit(address)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, half an IPv6 address
            parts, known = urlsplit(""), False
        if not known or parts.query or parts.fragment or parts.username or not address.isprintable():
            raise InvalidInput(
                f"--ray-address {quote(address)} is not the address of a Ray dashboard: write, say, http://head:8265"
            )
        self.address = address.rstrip("/")
        self._token = _token(parts.hostname in _LOOPBACK)

    def __str__(self) -> str:
        return f"Ray at {self.address}"

    def hint(self, command: str) -> str:
        """A ``shoal job`` command about this cluster, to be shown to a person."""
        return f"`shoal job {command} --ray-address {self.address}`"

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def get(self, path: str) -> Any:
        """Reads; tries again while nobody answers. Raises ShoalError."""
        pause = FIRST_PAUSE
        for _ in range(TRIES - 1):
            try:
                return self.ask("GET", path)
            except Unreachable:
                if self.out_of_time:
                    raise
                time.sleep(self.left(pause))
                pause *= 2
        return self.ask("GET", path)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Asks once. body: sent as JSON, but bytes as they are. Raises ShoalError."""
        raw = isinstance(body, bytes)
        data = body if raw or body is None else json.dumps(body).encode()
        headers = {**self.headers, "Content-Type": "application/octet-stream" if raw else "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.left(UPLOAD if raw else ANSWER)) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise refusal(error.code, error.read(), str(self), _REMEDY) from None
        except (OSError, http.client.HTTPException) as error:
            raise self.silent(error) from None
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise ClusterRefused(
                f"{self.address} does not answer as Ray's dashboard does: correct --ray-address"
            ) from None

    def silent(self, error: Exception) -> Unreachable:
        """The error for an address that nobody answers at."""
        reason = getattr(error, "reason", None) or error
        why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return Unreachable(f"{self} does not answer ({' '.join(str(why).split())[:160]}): correct --ray-address")

    def job(self, name: str) -> Object:
        """What Ray says of a job. Raises NotFound, ShoalError."""
        if not name:  # the path of a list
            raise InvalidInput(f"NAME {quote(name)} names no job: {self.hint('list')} shows the jobs")
        try:
            found: Object = self.get(f"/api/jobs/{escape(name, safe='')}")
        except NotFound:
            raise NotFound(f"there is no job {name} on {self}: {self.hint('list')} shows the jobs") from None
        return found

    def log(self, name: str) -> str:
        """All that a job has printed so far. Raises ShoalError."""
        return str((self.get(f"/api/jobs/{escape(name, safe='')}/logs") or {}).get("logs") or "")

    async def tail(self, name: str) -> AsyncGenerator[str, None]:
        """What a job prints, from its beginning to its end, in pieces of any length. Raises Unreachable."""
        import aiohttp

        url = f"{self.address}/api/jobs/{escape(name, safe='')}/logs/tail"
        try:
            async with (
                aiohttp.ClientSession(headers=self.headers, trust_env=True) as session,
                session.ws_connect(url, heartbeat=20.0, max_msg_size=0) as socket,
            ):
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        yield message.data
                if socket.close_code not in (1000, None):
                    raise Unreachable(f"{self} ended the log (code {socket.close_code}): try again")
        except (aiohttp.ClientError, OSError) as error:
            raise self.silent(error) from None


def _token(local: bool) -> str | None:
    """The token that Ray asks for, from where Ray's own clients take it, None for none.

    The one that Ray made for this machine's own clusters goes to other machines only if RAY_AUTH_MODE=token says so.
    """
    told, file = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if told is None and file is None and not local and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    where = "RAY_AUTH_TOKEN"
    if told is None:
        path = Path(file or _DEFAULT_TOKEN).expanduser()
        where = str(path)
        try:
            told = path.read_text("utf-8")
        except (OSError, ValueError) as error:
            if file is None:
                return None
            why = getattr(error, "strerror", None) or "it is not text"
            raise InvalidInput(f"RAY_AUTH_TOKEN_PATH={file} cannot be read ({why}): correct or unset it") from None
    token = told.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidInput(f"{where} cannot be sent as a token: write printable ASCII without spaces to it")
    return token or None
