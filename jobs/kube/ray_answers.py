"""What Ray's dashboard means by an answer other than 200, in one sentence, whichever way the answer came."""

from __future__ import annotations

from shoal.jobs.kube.api import Unreachable
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, ShoalError, last_line


def refusal(status: int, body: bytes, ray: str, token: str) -> ShoalError:
    """The error for an answer of Ray. ray: how a person knows this Ray. token: what to do about its token."""
    said = last_line(body[-2000:].decode(errors="replace"))
    if status == 401:
        return ClusterRefused(f"{ray} asks for a token, and none was sent: {token}")
    if status == 403:
        return ClusterRefused(f"{ray} does not take the token that it was sent: {token}")
    if status == 404:
        return NotFound(f"{ray} does not know it ({said})")
    if status in (429, 502, 503, 504) or "No available agent" in said:  # it begins a while after the dashboard
        return Unreachable(f"{ray} cannot do it now ({said}): try again")
    if status == 400:
        return InvalidInput(f"{ray} finds it invalid ({said}): correct that")
    return ClusterRefused(f"{ray} refused it ({said}): the logs of its dashboard say more")
