"""gRPC: shoal.v1.Inference over a Client, with health checks and reflection, on a server of its own."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import logging
import math
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shoal.cluster.serving import Listen
from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.jobs.serve.answer import Ask, follow
from shoal.jobs.serve.client import Client, ModelInfo
from shoal.jobs.serve.gate import Settings
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2 as pb
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2_grpc
from shoal.jobs.serve.reading import encode_prompt, too_long
from shoal.jobs.serve.text import LONGEST_STOP, Piece
from shoal.workers.engine.request import Busy, Finish, Request, Sampling, Token
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
MAX_TOKENS = 16  # new tokens when a request does not say; OpenAI's default for completions
MOST_STOPS = 4
OTHERS = 64  # calls beside those that generate: health, load, refusals
RETRY_SECONDS = 1  # what a client is told to wait while the queue is full
# Bytes of a sentence; details travel in HTTP/2 trailers, which peers bound at 8 KiB, and a byte may take three there.
LONGEST_DETAILS = 2000
FINISH = {Finish.stop: pb.FINISH_REASON_STOP, Finish.length: pb.FINISH_REASON_LENGTH}

CHECK = f"/{health.SERVICE_NAME}/Check"

OPTIONS = {
    "grpc.so_reuseport": 0,  # a port that another process listens on is an error, not half of the calls
    # a client that vanished without closing its connection answers no ping, and its calls are cancelled
    "grpc.keepalive_time_ms": 20_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.min_ping_interval_without_data_ms": 5_000,  # of a client's own pings
    "grpc.max_concurrent_streams": 1024,
}


class _SlowReader(Exception):
    """The client takes nothing in; the engine's request is ended first, as the status would wait for it too."""


class _Gone(Exception):
    """The client is not there any more: nobody is left to tell."""


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """shoal.v1.Inference; what its calls do and which statuses they end with stands in inference.proto."""

    def __init__(self, client: Client, info: ModelInfo, tokenizer: CorpusTokenizer, settings: Settings) -> None:
        self.client, self.info, self.tokenizer, self.settings = client, info, tokenizer, settings
        self.answering: set[asyncio.Task[Any]] = set()  # what gRPC does for a call, to its status

    async def Generate(self, call: pb.GenerateRequest, context: Any) -> None:
        """Streams an answer. A call that ends early, for whatever reason, closes the generator and so the request."""
        task = asyncio.current_task()
        assert task is not None
        self.answering.add(task)
        task.add_done_callback(self.answering.discard)
        async with _statuses(context):
            await self._answer(call, context)

    async def _answer(self, call: pb.GenerateRequest, context: Any) -> None:
        self._check_model(call.model)
        request = await self._request(call)
        last = pb.GenerateResponse()

        async def tell(_index: int, piece: Piece, finish: Finish | None) -> None:
            response = _response(piece)
            if finish is None:
                await self._write(context, response)
            else:
                last.MergeFrom(response)
                last.finish_reason = FINISH[finish]

        cost = (await follow(self.client, self.tokenizer, [Ask(request, _stops(call))], tell))[0]
        last.seed = request.sampling.seed
        last.usage.prompt_tokens = len(request.prompt)
        last.usage.completion_tokens = cost.used
        last.usage.cached_tokens = cost.cached
        await self._write(context, last)

    async def GetModelInfo(self, call: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        """What is served."""
        async with _statuses(context):
            self._check_model(call.model)
        i = self.info
        return pb.GetModelInfoResponse(
            name=i.name, context=i.context, vocab=i.vocab, step=i.step, parameters=i.parameters, created=i.created
        )

    async def GetLoad(self, call: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        """How busy the engines are."""
        async with _statuses(context):
            load = await self.client.load()
        return pb.GetLoadResponse(
            **{name: getattr(load, name) for name in pb.GetLoadResponse.DESCRIPTOR.fields_by_name}
        )

    async def _write(self, context: Any, response: pb.GenerateResponse) -> None:
        """Waits until the client can take more.

        Raises _SlowReader when it reads nothing for too long, _Gone when it went away.
        """
        try:
            async with asyncio.timeout(self.settings.slow_reader_seconds):
                await context.write(response)
        except TimeoutError:
            raise _SlowReader(
                f"nothing was read for {self.settings.slow_reader_seconds:g} s: read the responses as they come"
            ) from None
        except grpc.aio.BaseError:
            raise _Gone from None

    def _check_model(self, name: str) -> None:
        if name and name != self.info.name:
            raise NotFound(f"model={name!r} is not served here: set model to {self.info.name!r}, or leave it out")

    async def _request(self, call: pb.GenerateRequest) -> Request:
        """Raises InvalidInput."""
        prompt = await self._prompt(call)
        room = max(1, self.info.context - len(prompt))  # a prompt without room is refused by the engine
        return Request(uuid.uuid4().hex, prompt, _sampling(call.sampling, min(MAX_TOKENS, room), self.tokenizer.eos))

    async def _prompt(self, call: pb.GenerateRequest) -> tuple[int, ...]:
        context = self.info.context
        if call.WhichOneof("prompt") == "tokens":
            if len(call.tokens.ids) > context:  # before millions of them are copied
                raise too_long(str(len(call.tokens.ids)), context)
            ids = tuple(call.tokens.ids)
        elif call.text:
            # a long text takes a while to encode, in which others shall not wait
            ids = tuple(await asyncio.to_thread(encode_prompt, self.tokenizer, call.text, context))
        else:
            ids = ()
        if not ids:
            raise InvalidInput("the prompt is empty: set text or tokens")
        return ids


def _response(piece: Piece) -> pb.GenerateResponse:
    return pb.GenerateResponse(text=piece.text, tokens=[_token(spot.token) for spot in piece.spots])


def _token(token: Token) -> pb.Token:
    logprob = None if math.isnan(token.logprob) else token.logprob
    return pb.Token(id=token.id, logprob=logprob, top=[pb.TopToken(id=i, logprob=p) for i, p in token.top])


def _sampling(asked: pb.Sampling, max_tokens: int, eos: int) -> Sampling:
    """What was asked for, and defaults for the rest. Raises InvalidInput."""
    given = {field.name: value for field, value in asked.ListFields()}
    stop_tokens = (eos, *given.pop("stop_tokens", ()))
    return Sampling(**{"max_tokens": max_tokens, "seed": secrets.randbits(63), **given}, stop_tokens=stop_tokens)


def _stops(call: pb.GenerateRequest) -> tuple[str, ...]:
    stops = tuple(call.stop)
    if len(stops) > MOST_STOPS or not all(0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise InvalidInput(
            f"stop holds {len(stops)} texts, the longest of {max(map(len, stops))} characters: "
            f"give up to {MOST_STOPS} of 1 to {LONGEST_STOP} characters"
        )
    return stops


@asynccontextmanager
async def _statuses(context: Any) -> AsyncIterator[None]:
    """Ends the call with the status of what is raised in the block."""
    try:
        yield
    except _Gone:
        pass
    except Exception as error:
        code = _code(error)
        details = str(error)
        if code is grpc.StatusCode.INTERNAL:
            log.exception("a gRPC call failed")
            details = "the service failed: its log says why"
        trailing = (("retry-after", str(RETRY_SECONDS)),) if isinstance(error, Busy) else ()
        cut = details.encode(errors="replace")[:LONGEST_DETAILS].decode(errors="ignore")
        await context.abort(code, cut, trailing)


def _code(error: Exception) -> grpc.StatusCode:
    kinds = (
        (InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound, grpc.StatusCode.NOT_FOUND),
        (Busy, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ClusterRefused, grpc.StatusCode.UNAVAILABLE),
        (_SlowReader, grpc.StatusCode.ABORTED),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


class _Guard(grpc.aio.ServerInterceptor):
    """Asks every call for a bearer token, but for Health/Check, which ends at once; a Watch lasts."""

    def __init__(self, tokens: Collection[str]) -> None:
        self.tokens = [token.encode() for token in tokens]
        # For a stream of messages it does not wait for the first one: a call without a token holds no place.
        self.refusal = grpc.stream_unary_rpc_method_handler(self._refuse)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if details.method == CHECK:
            return await continuation(details)
        shown = [value for key, value in details.invocation_metadata if key == "authorization"]
        scheme, _, given = (shown[0] if shown else "").partition(" ")
        # all are compared, each in constant time, so that the time taken tells nothing about any token
        known = [hmac.compare_digest(given.encode(errors="replace"), token) for token in self.tokens]
        return await continuation(details) if any(known) and scheme.lower() == "bearer" else self.refusal

    async def _refuse(self, _request: object, context: Any) -> None:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED,
            "the bearer token is missing or wrong: send the metadata authorization: Bearer TOKEN",
        )


class _Malformed:
    """Stands where a message should, which the bytes that came are not."""


class _Parser(grpc.aio.ServerInterceptor):
    """Refuses bytes that are no message of the call with INVALID_ARGUMENT; gRPC itself would call it its own fault."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        kind = next((k for k in ("unary_unary", "unary_stream") if getattr(handler, k, None)), None)
        if kind is None or not inspect.iscoroutinefunction(answer := getattr(handler, kind)):
            return handler

        def parse(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except Exception:  # what it raises depends on protobuf's implementation
                return _Malformed()

        async def checked(request: Any, context: Any) -> Any:
            if isinstance(request, _Malformed):
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"the message of {details.method} cannot be parsed: send what inference.proto, or reflection, says",
                )
            return await answer(request, context)

        return handler._replace(request_deserializer=parse, **{kind: checked})


class RpcServer:
    """The server of the service, its health and its reflection."""

    def __init__(
        self, client: Client, info: ModelInfo, tokenizer: CorpusTokenizer, settings: Settings, listen: Listen
    ) -> None:
        """Made and used in one event loop. Raises ClusterRefused when the port cannot be listened on."""
        self.ended = False
        self.health = health.aio.HealthServicer()
        self.server = grpc.aio.server(
            interceptors=[*([] if settings.tokens is None else [_Guard(settings.tokens)]), _Parser()],
            options=list({**OPTIONS, "grpc.max_receive_message_length": settings.largest_body}.items()),
            maximum_concurrent_rpcs=settings.most_calls + OTHERS,
        )
        self.service = InferenceService(client, info, tokenizer, settings)
        inference_pb2_grpc.add_InferenceServicer_to_server(self.service, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)
        try:
            if listen.certificate and listen.key:
                self.server.add_secure_port(listen.grpc, _credentials(listen.certificate, listen.key))
            else:
                self.server.add_insecure_port(listen.grpc)
        except RuntimeError:
            raise ClusterRefused(
                f"--grpc-port {listen.grpc_port} cannot be listened on at {listen.host}: "
                f"choose another one with --grpc-port"
            ) from None

    async def start(self) -> None:
        """Begins to answer."""
        await self.health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await self.server.start()

    async def refuse(self) -> None:
        """Tells those who watch the health that the service is about to end."""
        await self.health.enter_graceful_shutdown()

    async def stop(self, seconds: float) -> None:
        """Gives answers ``seconds`` to reach their clients, and ends. Who watches the health does so for ever."""
        self.ended = True
        if self.service.answering:
            await asyncio.wait(self.service.answering, timeout=seconds)
        await self.server.stop(0)


def _credentials(certificate: Path, key: Path) -> Any:
    return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
