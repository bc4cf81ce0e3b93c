"""The HTTP service: the OpenAI API's paths, and what watches over them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.jobs.serve.answer import Call, follow, usage
from shoal.jobs.serve.apart import LARGE, ReaderApart, Refused
from shoal.jobs.serve.api import (
    Asked,
    Chat,
    ChatAsked,
    Completion,
    CompletionAsked,
    ErrorAnswer,
    Model,
    Models,
)
from shoal.jobs.serve.chat import chat_call
from shoal.jobs.serve.client import Client, ModelInfo
from shoal.jobs.serve.completions import completion_call
from shoal.jobs.serve.gate import Gate, Settings
from shoal.jobs.serve.reading import Read, Reader, check_model
from shoal.jobs.serve.refusal import problem
from shoal.jobs.serve.stream import Emit, EventStream, while_connected
from shoal.jobs.serve.text import Piece, TokenNames, joined
from shoal.workers.engine.request import Finish, Load
from shoal.workers.errors import ClusterRefused, ShoalError

__all__ = ["Settings", "make_app"]

_READY_SECONDS = 5.0  # for the engines to say how they are
# "default" also keeps FastAPI from promising a 422, which is a 400 here.
_WORDS: dict[int | str, str] = {
    "default": "an error",
    400: "a value that cannot be used",
    401: "no token of this service",
    404: "another model than the one served",
    408: "the body did not arrive in time",
    413: "too large a body",
    429: "too much at once: try again after Retry-After seconds",
    500: "a mistake of the service",
    503: "shutting down, or without engines",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": words} for status, words in _WORDS.items()
}
_CALL = {**_ERRORS, 200: {"description": "the answer, or its chunks", "content": {"text/event-stream": {}}}}


def make_app(client: Client, info: ModelInfo, tokenizer: CorpusTokenizer, settings: Settings) -> FastAPI:
    """The service of one model.

    Its health is its client's: while ``client`` raises ClusterRefused, since it shuts down or its engines are gone,
    calls and /readyz answer 503.
    """
    app = FastAPI(title="Shoal", docs_url=None, redoc_url=None, redirect_slashes=False)
    service = Service(client, info, tokenizer, settings)
    app.state.service = service
    app.router.route_class = _route(service)
    app.add_middleware(Gate, settings=settings)
    for kind in (RequestValidationError, HTTPException, Refused, ShoalError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.post("/v1/completions", response_model=Completion, responses=_CALL)(service.completions)
    app.post("/v1/chat/completions", response_model=Chat, responses=_CALL)(service.chat)
    app.get("/v1/models", responses={401: _ERRORS[401]})(service.models)
    app.get("/v1/models/{name:path}", responses={key: _ERRORS[key] for key in (401, 404, "default")})(service.model)
    app.get("/healthz")(service.healthz)
    app.get("/readyz", responses={503: _ERRORS[503]}, response_model=dict[str, str])(service.readyz)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    """Errors nobody foresaw are logged by the server with their traceback; the client gets a sentence."""
    return (error.problem if isinstance(error, Refused) else problem(error)).response()


def _route(service: Service) -> type[APIRoute]:
    """Routes that let a large body be read apart; FastAPI reads all others."""
    large = {"completions": service.large_completions, "chat": service.large_chat}

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            usual, apart = super().get_route_handler(), large.get(self.name)

            async def handle(request: Request) -> Response:
                if apart and "json" in request.headers.get("content-type", ""):
                    body = await request.body()
                    if len(body) > LARGE:
                        return await apart(body, request)
                return await usual(request)

            return handle

    return Route


class Service:
    """The paths. Methods' docstrings are the API's own documentation."""

    def __init__(self, client: Client, info: ModelInfo, tokenizer: CorpusTokenizer, settings: Settings) -> None:
        self._client, self._info, self._tokenizer, self._settings = client, info, tokenizer, settings
        self._look: asyncio.Task[Load] | None = None
        self._names = TokenNames(tokenizer)
        self._reader = Reader(info, tokenizer, settings.most_answers)
        self.apart = ReaderApart(self._reader)
        self._model = Model(
            id=info.name,
            created=info.created,
            context_length=info.context,
            parameters=info.parameters,
            step=info.step,
        )

    async def completions(self, asked: CompletionAsked, request: Request) -> Response:
        """Continue prompts. With stream=true the answer is a stream of events, ended by ``data: [DONE]``."""
        return await self._complete(await asyncio.to_thread(self._reader.completions, asked), request)

    async def chat(self, asked: ChatAsked, request: Request) -> Response:
        """Continue a conversation. With stream=true the answer is a stream of events, ended by ``data: [DONE]``."""
        return await self._converse(await asyncio.to_thread(self._reader.chat, asked), request)

    async def large_completions(self, body: bytes, request: Request) -> Response:
        """completions, of a large body."""
        return await self._complete(await self.apart.body("completions", body), request)

    async def large_chat(self, body: bytes, request: Request) -> Response:
        """chat, of a large body."""
        return await self._converse(await self.apart.body("chat", body), request)

    async def _complete(self, read: Read, request: Request) -> Response:
        call = completion_call(read, self._info, self._tokenizer.eos, self._names)
        return await self._answer(read.asked, call, request)

    async def _converse(self, read: Read, request: Request) -> Response:
        call = chat_call(read, self._info, self._tokenizer.eos, self._names)
        return await self._answer(read.asked, call, request)

    async def models(self) -> Models:
        """The models: the one that is served."""
        return Models(data=[self._model])

    async def model(self, name: str) -> Model:
        """A model by its name."""
        check_model(name, self._info)
        return self._model

    async def healthz(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    async def readyz(self) -> Any:
        """Calls can be taken: the engines answer, and are not shutting down."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                if self._look is None or self._look.done():
                    self._look = asyncio.create_task(self._client.load())
                await asyncio.shield(self._look)  # however many ask, the engines are asked once at a time
        except TimeoutError:
            late = ClusterRefused(f"the engines did not answer within {_READY_SECONDS:g} s: see their logs")
            return problem(late).response()
        return {"status": "ready"}

    async def _answer(self, asked: Asked, call: Call, request: Request) -> Response:
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)

            async def events(emit: Emit) -> None:
                await self._stream(call, asked.n or 1, with_usage, emit)

            return EventStream(events, self._settings.slow_reader_seconds, self._settings.heartbeat_seconds)
        answer = await while_connected(request.receive, self._whole(call, asked.n or 1))
        if answer is None:
            return Response(status_code=499)  # nobody reads it
        return Response(answer.model_dump_json(), media_type="application/json")

    async def _whole(self, call: Call, n: int) -> BaseModel:
        pieces: list[list[Piece]] = [[] for _ in call.asks]
        ends = [Finish.stop for _ in call.asks]

        async def tell(index: int, piece: Piece, finish: Finish | None) -> None:
            pieces[index].append(piece)
            ends[index] = finish or ends[index]

        costs = await follow(self._client, self._tokenizer, call.asks, tell)
        answers = list(zip(map(joined, pieces), ends, strict=True))
        return call.form.answer(answers, usage(call.asks, costs, n))

    async def _stream(self, call: Call, n: int, with_usage: bool, emit: Emit) -> None:
        async def tell(index: int, piece: Piece, finish: Finish | None) -> None:
            await emit(_lines(call.form.chunks(index, piece, finish)))

        costs = await follow(self._client, self._tokenizer, call.asks, tell)
        if with_usage:
            await emit(_lines([call.form.last(usage(call.asks, costs, n))]))


def _lines(chunks: Sequence[BaseModel]) -> list[str]:
    return [chunk.model_dump_json() for chunk in chunks]
