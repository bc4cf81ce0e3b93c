"""A gRPC server of the service on a free port, over a source of tokens, and a client's way to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from ports import free_port
from serve_source import Source, small_tokenizer

from shoal.cluster.serving import Listen
from shoal.jobs.serve.gate import Settings
from shoal.jobs.serve.intake import Intake
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2 as pb
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2_grpc
from shoal.jobs.serve.rpc import RpcServer

PROMPT = "A shoal of fish"


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, in an event loop of its own."""

    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


@dataclass
class Service:
    """A running server, and a client's way to it."""

    source: Source
    intake: Intake
    server: RpcServer
    listen: Listen
    channel: Any

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceStub(self.channel)

    @property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)

    def generate(self, text: str = PROMPT, *, metadata: Any = None, **fields: Any) -> Any:
        """A call; ``Sampling``'s fields by name, those of the request as they are."""
        own = {name: fields.pop(name) for name in ("model", "stop", "tokens") if name in fields}
        prompt: dict[str, Any] = {} if "tokens" in own else {"text": text}
        request = pb.GenerateRequest(**prompt, **own, sampling=pb.Sampling(**fields))
        return self.stub.Generate(request, metadata=metadata)


@asynccontextmanager
async def service(settings: Settings | None = None, listen: Listen | None = None, **how: Any) -> AsyncIterator[Service]:
    """A server on a free port, with a channel to it. how: the Source's options."""
    listen = listen or Listen(grpc_port=free_port())
    source = Source(small_tokenizer(), **how)
    intake = Intake(source)
    server = RpcServer(intake, source.info, small_tokenizer(), settings or Settings(), listen)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(listen.grpc) as channel:
            yield Service(source, intake, server, listen, channel)
    finally:
        await server.stop(0)


async def refused(call: Any) -> Any:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "read"):
            await rest(call)
        else:
            await call
    return caught.value


async def rest(call: Any) -> list[Any]:
    """The responses that were not read yet."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def answered(call: Any) -> tuple[str, list[int], Any]:
    """Text, token ids and last response of a call."""
    responses = await rest(call)
    assert [bool(r.finish_reason) for r in responses] == [False] * (len(responses) - 1) + [True]
    assert [r.HasField("usage") for r in responses] == [False] * (len(responses) - 1) + [True]
    return "".join(r.text for r in responses), [t.id for r in responses for t in r.tokens], responses[-1]
