"""Everything that goes wrong with a call, as the API says it: a status and ``{"error": {...}}`` with one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shoal.jobs.recipe_errors import BOUNDS, plain, quote
from shoal.workers.engine.request import Busy
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, ShoalError

RETRY_AFTER = {"Retry-After": "1"}


class Refusal(InvalidInput):
    """A value of a call that cannot be used. param: its key. code: a name that programs may look for."""

    def __init__(self, sentence: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Problem:
    """An error as it is answered."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> str:
        """The error object, in JSON on one line."""
        keys = ("message", "type", "param", "code")
        return json.dumps({"error": {key: getattr(self, key) for key in keys}})

    def response(self) -> JSONResponse:
        """The error as an answer of its own."""
        return JSONResponse(json.loads(self.body()), self.status, self.headers)


UNAUTHORISED = Problem(
    401,
    "the bearer token is missing or wrong: send the header 'Authorization: Bearer TOKEN' with a token of this service",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)
BROKEN = Problem(500, "the service failed, and its log says why: send the request again", "server_error")


def busy(sentence: str) -> Problem:
    """Too much at once: the same call may be taken a little later."""
    return Problem(429, sentence, "rate_limit_error", code="busy", headers=RETRY_AFTER)


def problem(error: Exception) -> Problem:
    """What ``error`` is to the client."""
    match error:
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return _plain_http(error)
        case Refusal():
            return Problem(400, str(error), param=error.param, code=error.code)
        case InvalidInput():
            return Problem(400, str(error))
        case NotFound():
            return Problem(404, str(error), param="model", code="model_not_found")
        case Busy():
            return busy(str(error))
        case ClusterRefused():
            return Problem(503, str(error), "server_error", code="unavailable", headers=RETRY_AFTER)
        case ShoalError():
            return Problem(500, str(error), "server_error")
        case _:
            return BROKEN


_HTTP = {
    400: "the body cannot be read: send a JSON object in UTF-8",
    404: "there is no such path: see /openapi.json for those there are",
    405: "the path does not take this method: see /openapi.json for those it takes",
}


def _plain_http(error: HTTPException) -> Problem:
    """Starlette's and FastAPI's own errors are a word or two; ours are a sentence already."""
    status, said = error.status_code, str(error.detail)
    short = said == HTTPStatus(status).phrase or status == 400
    return Problem(status, _HTTP.get(status, said) if short else said, headers=error.headers or {})


# Keys of several types: pydantic reports a failure of each type, a person needs one remedy.
_UNIONS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": "a text, or a list of up to 4 texts",
    "content": 'a text, or a list of parts {"type": "text", "text": …}',
}
_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_unicode": "a text in UTF-8",
    "list_type": "a list",
}


def _invalid(details: Sequence[Any]) -> Problem:
    """The most telling of pydantic's errors: one that speaks for itself first."""
    detail = min(details, key=lambda detail: detail["type"] != "value_error")
    path = detail["loc"][1:]  # without "body"
    if detail["type"] == "json_invalid":
        why = detail["ctx"]["error"]
        return Problem(400, f"the body is not JSON ({why} at character {path[0]}): send a JSON object in UTF-8")
    if not path:
        return Problem(400, "the body is not a JSON object: send one, with the header 'Content-Type: application/json'")
    return Problem(400, _sentence(detail, path), param=plain(path[0]))


def _sentence(detail: Any, path: Sequence[int | str]) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    union = next((i for i, part in enumerate(path) if part in _UNIONS), None)
    if union is not None:
        path = path[: union + 1]
    key = ".".join(plain(part) for part in path)
    if kind == "value_error":
        return f"{key} {context['error']}"
    if kind == "missing" and union is None:
        return f"{key} is missing and has no default: set {key}"
    if kind == "missing":
        return f"{key} is missing or incomplete: set {key} to {_UNIONS[str(path[-1])]}"
    if union is not None:
        return f"{key} with {quote(value)} cannot be used: set {key} to {_UNIONS[str(path[-1])]}"
    if kind in BOUNDS:
        bound, words = BOUNDS[kind]
        return f"{key}={quote(value)} is out of range: set {key} to {words} {context[bound]}"
    if kind == "too_short":
        return f"{key} has {context['actual_length']} items: give {context['min_length']} or more"
    if kind == "literal_error":
        return f"{key}={quote(value)} is not one of its values: set {key} to {context['expected']}"
    wanted = _KINDS.get(kind)
    if wanted:
        return f"{key}={quote(value)} is not {wanted}: set {key} to {wanted}"
    return f"{key}={quote(value)} cannot be used: {detail['msg']}"
