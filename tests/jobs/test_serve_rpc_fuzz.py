"""Whatever bytes and messages are sent over gRPC, the service does not fail."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serve_channel import PROMPT, Service, answered, in_a_loop, refused, service
from serve_source import PATIENCE

from shoal.jobs.serve.gate import Settings
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2 as pb

Code = grpc.StatusCode
EXAMPLES = 500 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" else 60
REFUSED = {Code.INVALID_ARGUMENT, Code.NOT_FOUND}
METHODS = ("Generate", "GetModelInfo", "GetLoad")

FLOAT = st.floats(width=32)
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(0, 8) | st.integers(0, 2**32 - 1),
        "temperature": st.floats(0, 2) | FLOAT,
        "top_k": st.integers(0, 2**32 - 1),
        "top_p": st.floats(0, 1) | FLOAT,
        "min_p": FLOAT,
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logprobs": st.integers(0, 2**32 - 1),
        "stop_tokens": st.lists(st.integers(0, 2**32 - 1), max_size=70),
    },
)
ASKED = st.fixed_dictionaries(
    {"sampling": SAMPLING},
    optional={
        "model": st.just("shoal-test") | st.text(max_size=5),
        "stop": st.lists(st.text(max_size=5), max_size=6),
        "text": st.text(max_size=300),
        "tokens": st.lists(st.integers(0, 330) | st.integers(0, 2**32 - 1), max_size=200),
    },
)


def request_of(asked: dict[str, Any]) -> pb.GenerateRequest:
    """A message with these fields; of text and tokens, which exclude each other, the last."""
    fields = {key: value for key, value in asked.items() if key not in ("sampling", "tokens")}
    request = pb.GenerateRequest(**fields, sampling=pb.Sampling(**asked["sampling"]))
    if "tokens" in asked:
        request.tokens.ids.extend(asked["tokens"])
    return request


async def status(it: Service, method: str, data: bytes) -> tuple[Any, str]:
    """How a call with these bytes ends, and in what words."""
    call = it.channel.unary_stream(f"/shoal.v1.Inference/{method}", request_serializer=bytes)(data, timeout=PATIENCE)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return await call.code(), ""


def many(test: Callable[..., Awaitable[None]], *strategies: Any) -> None:
    """Runs a check with many examples, over one service, which must answer as before at the end."""

    async def run() -> None:
        async with service(Settings(largest_body=100_000), sequences=8) as it:
            text, _, _ = await answered(it.generate(max_tokens=5, temperature=0))
            loop = asyncio.get_running_loop()

            @settings(
                max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck),
                phases=[Phase.explicit, Phase.generate],
            )  # fmt: skip
            @given(st.tuples(*strategies))
            def ask(drawn: tuple[Any, ...]) -> None:
                asyncio.run_coroutine_threadsafe(test(it, *drawn), loop).result(PATIENCE)  # type: ignore[arg-type]

            await asyncio.to_thread(ask)
            assert (await answered(it.generate(max_tokens=5, temperature=0)))[0] == text
            await it.source.until(lambda: not it.source.running)

    asyncio.run(run())


def test_any_bytes() -> None:
    async def ask(it: Service, method: str, data: bytes) -> None:
        code, words = await status(it, method, data)
        assert code in {Code.OK, *REFUSED}, (code, words)
        assert words or code is Code.OK

    many(ask, st.sampled_from(METHODS), st.binary(max_size=80))


def test_messages_with_damage() -> None:
    """Bytes of a good message, cut, doubled and changed: much of it is still parsed."""

    async def ask(it: Service, asked: dict[str, Any], at: float, byte: int, cut: bool) -> None:
        data = bytearray(request_of(asked).SerializeToString() or b"\0")
        place = int(at * (len(data) - 1))
        data[place] = byte
        code, words = await status(it, "Generate", bytes(data[:place] if cut else data))
        assert code in {Code.OK, *REFUSED}, (code, words)

    many(ask, ASKED, st.floats(0, 1), st.integers(0, 255), st.booleans())


def test_any_field() -> None:
    async def ask(it: Service, asked: dict[str, Any]) -> None:
        code, words = await status(it, "Generate", request_of(asked).SerializeToString())
        assert code in {Code.OK, *REFUSED}, (code, words)
        assert "\n" not in words

    many(ask, ASKED)


@in_a_loop
async def test_bytes_that_are_no_message_are_refused_in_a_sentence() -> None:
    """Before, gRPC answered that the service had failed."""
    async with service() as it:
        for method in METHODS:
            code, words = await status(it, method, b"\xff\xff\xff")
            assert (code, "cannot be parsed: send what" in words) == (Code.INVALID_ARGUMENT, True), words
        check = it.channel.unary_unary("/grpc.health.v1.Health/Check", request_serializer=bytes)
        assert (await refused(check(b"\xff\xff\xff"))).code() is Code.INVALID_ARGUMENT
        assert (await answered(it.generate(PROMPT, max_tokens=3)))[2].usage.completion_tokens > 0


@in_a_loop
async def test_bytes_without_a_token_are_not_parsed() -> None:
    async with service(Settings(tokens=("secret",))) as it:
        assert (await status(it, "Generate", b"\xff\xff\xff"))[0] is Code.UNAUTHENTICATED
