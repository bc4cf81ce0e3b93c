"""The gRPC service as a client sees it: a real server on a free port, real channels, tokens when the test says."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificate import make_certificate
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ports import free_port
from serve_channel import PROMPT, answered, in_a_loop, refused, rest, service
from serve_parrot import Parrot, noted
from serve_source import PATIENCE, Source, small_tokenizer

from shoal.cluster.serving import Listen
from shoal.jobs.serve.gate import Settings
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2 as pb
from shoal.jobs.serve.proto.shoal.v1 import inference_pb2_grpc
from shoal.jobs.serve.rpc import SERVICE, RpcServer
from shoal.workers.engine.request import Load, Request, Sampling
from shoal.workers.errors import ClusterRefused

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Code = grpc.StatusCode


@in_a_loop
async def test_an_answer_is_text_and_tokens_as_they_come_and_its_cost_at_the_end() -> None:
    async with service() as it:
        text, tokens, last = await answered(it.generate(max_tokens=10, temperature=0))
        assert text == small_tokenizer().decode(tokens)
        assert len(text) > 5
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        prompt = it.source.asked[0].prompt
        assert list(prompt) == small_tokenizer().encode([PROMPT])[0][:-1].tolist()
        assert last.usage.prompt_tokens == len(prompt)
        assert last.usage.completion_tokens == len(tokens) == 10
        assert last.usage.cached_tokens == 0
        _, _, again = await answered(it.generate(max_tokens=10, temperature=0))
        assert again.usage.cached_tokens == len(prompt) - 1


@in_a_loop
async def test_the_first_tokens_arrive_before_the_last_are_made() -> None:
    async with service() as it:
        it.source.pause_after = 8
        call = it.generate(max_tokens=12, temperature=0)
        first = await call.read()
        assert first.text and not first.finish_reason
        assert max(it.source.told.values()) <= 8
        it.source.resume()
        _, tokens, last = await answered(call)
        assert len(first.tokens) + len(tokens) == last.usage.completion_tokens == 12


@in_a_loop
async def test_the_seed_that_is_told_gives_the_same_answer_again() -> None:
    async with service() as it:
        # Hot, for at temperature 1 the chain is so sure of itself that two seeds in forty give the same 30 tokens.
        _, tokens, last = await answered(it.generate(max_tokens=30, temperature=5))
        _, _, other = await answered(it.generate(max_tokens=30, temperature=5))
        _, again, told = await answered(it.generate(max_tokens=30, temperature=5, seed=last.seed))
        assert (again, told.seed) == (tokens, last.seed)
        assert last.seed != other.seed
        assert [request.sampling.seed for request in it.source.asked] == [last.seed, other.seed, last.seed]


@in_a_loop
async def test_token_ids_are_taken_as_they_are_and_what_is_left_out_has_the_documented_default() -> None:
    async with service() as it:
        await answered(it.generate(tokens=pb.Tokens(ids=[5, 6, 7])))
        asked = it.source.asked[0]
        assert asked.prompt == (5, 6, 7)
        eos = small_tokenizer().eos
        assert asked.sampling == Sampling(16, seed=asked.sampling.seed, stop_tokens=(eos,))
        given: dict[str, Any] = {
            "max_tokens": 3,
            "temperature": 0.5,
            "top_k": 4,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": -8,
            "logprobs": 2,
        }
        await answered(it.generate(**given, stop_tokens=[9]))
        assert it.source.asked[1].sampling == Sampling(**given, stop_tokens=(eos, 9))


@in_a_loop
async def test_without_max_tokens_an_answer_ends_where_the_context_does() -> None:
    async with service(context=20) as it:
        _, tokens, last = await answered(it.generate(tokens=pb.Tokens(ids=[5] * 17), temperature=0))
        assert len(tokens) == last.usage.completion_tokens == 3


@in_a_loop
async def test_logprobs_are_there_when_asked_for_and_only_then() -> None:
    async with service() as it:
        plain = [token for response in await rest(it.generate(max_tokens=6, seed=1)) for token in response.tokens]
        assert plain and all(not token.HasField("logprob") and not token.top for token in plain)
        seen = [token for r in await rest(it.generate(max_tokens=6, logprobs=3, seed=1)) for token in r.tokens]
        assert len(seen) == 6
        for token in seen:
            assert token.logprob < 0 and len(token.top) == 3
            assert [t.logprob for t in token.top] == sorted((t.logprob for t in token.top), reverse=True)
        bare = [token for r in await rest(it.generate(max_tokens=6, logprobs=0, seed=1)) for token in r.tokens]
        assert bare and all(token.HasField("logprob") and not token.top for token in bare)


@in_a_loop
async def test_an_answer_ends_before_a_stop_text_and_the_engine_with_it() -> None:
    async with service() as it:
        whole, _, _ = await answered(it.generate(max_tokens=100, temperature=0))
        stop = whole[10:14]
        text, _, last = await answered(it.generate(max_tokens=100, temperature=0, stop=[stop, "nothing"]))
        assert text == whole[: whole.index(stop)]
        assert last.finish_reason == pb.FINISH_REASON_STOP
        assert 0 < last.usage.completion_tokens < 30
        await it.source.until(lambda: len(it.source.cancelled) == 1)


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ({"text": ""}, Code.INVALID_ARGUMENT, "the prompt is empty: set text or tokens"),
        ({"tokens": pb.Tokens()}, Code.INVALID_ARGUMENT, "the prompt is empty: set text or tokens"),
        ({"max_tokens": 0}, Code.INVALID_ARGUMENT, "max_tokens=0 is out of range: set it to 1 or more"),
        ({"top_p": float("nan")}, Code.INVALID_ARGUMENT, "top_p=nan is out of range"),
        ({"temperature": -1}, Code.INVALID_ARGUMENT, "temperature=-1.0 is out of range"),
        ({"logprobs": 21}, Code.INVALID_ARGUMENT, "logprobs=21 is out of range: set it to 0 to 20"),
        ({"stop": ["a"] * 5}, Code.INVALID_ARGUMENT, "stop holds 5 texts"),
        ({"stop": [""]}, Code.INVALID_ARGUMENT, "of 1 to 256 characters"),
        ({"max_tokens": 1000}, Code.INVALID_ARGUMENT, "longer than the context"),
        ({"model": "other"}, Code.NOT_FOUND, "model='other' is not served here: set model to 'shoal-test'"),
    ],
)  # fmt: skip
@in_a_loop
async def test_what_cannot_be_is_refused_in_a_sentence(asked: dict[str, Any], code: Any, says: str) -> None:
    async with service() as it:
        error = await refused(it.generate(**asked))
        assert error.code() is code
        assert says in error.details()


@in_a_loop
async def test_a_full_queue_says_when_to_come_back() -> None:
    async with service(sequences=1, waiting=0) as it:
        it.source.pause_after = 1
        first = it.generate(max_tokens=12, temperature=0)
        await it.source.until(lambda: bool(it.source.running))
        error = await refused(it.generate())
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["retry-after"] == "1"
        it.source.resume()
        assert (await answered(first))[2].usage.completion_tokens == 12
        assert (await answered(it.generate(max_tokens=12, temperature=0)))[2].usage.completion_tokens == 12


@in_a_loop
async def test_a_fault_shows_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    async with service() as it:
        it.source.info = None  # type: ignore[assignment]  # any mistake of ours
        error = await refused(it.generate())
        assert (error.code(), error.details()) == (Code.INTERNAL, "the service failed: its log says why")
        assert "AttributeError" in caplog.text


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
@in_a_loop
async def test_a_client_that_gives_up_frees_the_engine_at_once(how: str) -> None:
    async with service() as it:
        it.source.pause_after = 8
        async with grpc.aio.insecure_channel(it.listen.grpc) as channel:
            request = pb.GenerateRequest(text=PROMPT, sampling=pb.Sampling(max_tokens=100, temperature=0))
            timeout = 1.5 if how == "deadline" else None
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout)
            await call.read()
            if how == "cancel":
                call.cancel()
            elif how == "deadline":
                assert (await refused(call)).code() is Code.DEADLINE_EXCEEDED
            else:
                await channel.close()
            await it.source.until(lambda: len(it.source.cancelled) == 1)
        assert it.intake.running == 0


@in_a_loop
async def test_a_client_that_reads_nothing_is_given_up_and_holds_nobody_up(tmp_path: Path) -> None:
    listen, settings = Listen(grpc_port=free_port()), Settings(slow_reader_seconds=1.0)
    parrot = Parrot(tmp_path)  # unlike the other source it never comes to an end by itself
    server = RpcServer(parrot, Source(small_tokenizer()).info, small_tokenizer(), settings, listen)
    await server.start()
    # A window that does not grow: the connection takes in 64 KiB that nobody reads, then it is full.
    async with grpc.aio.insecure_channel(listen.grpc, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        slow = stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=pb.Sampling(max_tokens=100_000_000)))
        await slow.read()
        responses = await rest(stub.Generate(pb.GenerateRequest(text=PROMPT)))
        assert responses[-1].usage.completion_tokens == 16
        async with asyncio.timeout(PATIENCE):
            while noted(tmp_path)[-1] != "cancelled":
                await asyncio.sleep(0.02)
        error = await refused(slow)
        assert error.code() is Code.ABORTED
        assert "nothing was read for 1 s" in error.details()
    await server.stop(0)


@in_a_loop
async def test_draining_refuses_new_requests_tells_watchers_and_lets_the_old_ones_end() -> None:
    async with service() as it:
        watch = it.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        it.source.pause_after = 8
        old = it.generate(max_tokens=12, temperature=0)
        await old.read()
        await it.server.refuse()
        draining = asyncio.create_task(it.intake.drain(30))
        assert (await watch.read()).status == NOT_SERVING
        assert (await it.health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        error = await refused(it.generate())
        assert error.code() is Code.UNAVAILABLE
        assert "about to end" in error.details()
        assert not draining.done()
        it.source.resume()
        assert (await answered(old))[2].usage.completion_tokens == 12
        assert await draining == 0


@in_a_loop
async def test_draining_gives_up_after_its_time_and_says_on_how_many() -> None:
    async with service() as it:
        it.source.pause_after = 1
        calls = [it.generate(max_tokens=20, temperature=0) for _ in range(2)]
        await it.source.until(lambda: len(it.source.running) == 2)
        assert await it.intake.drain(0.05) == 2
        await it.server.stop(0)
        for call in calls:
            assert (await refused(call)).code() in (Code.CANCELLED, Code.UNAVAILABLE)
        await it.source.until(lambda: len(it.source.cancelled) == 2)


@in_a_loop
async def test_stopping_waits_for_answers_and_not_for_those_who_watch() -> None:
    async with service() as it:
        watch = it.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        it.source.pause_after = 8
        call = it.generate(max_tokens=12, temperature=0)
        first = await call.read()
        stopping = asyncio.create_task(it.server.stop(PATIENCE))
        it.source.resume()
        _, tokens, last = await answered(call)
        assert len(first.tokens) + len(tokens) == last.usage.completion_tokens == 12
        async with asyncio.timeout(PATIENCE / 2):
            await stopping


@in_a_loop
async def test_engines_that_are_gone_are_unavailable() -> None:
    async with service() as it:
        it.source.closed = True
        assert (await refused(it.generate())).code() is Code.UNAVAILABLE
        assert (await refused(it.stub.GetLoad(pb.GetLoadRequest()))).code() is Code.UNAVAILABLE


@in_a_loop
async def test_a_token_is_asked_for_by_everything_but_health() -> None:
    async with service(Settings(tokens=("first", "second"))) as it:
        assert (await it.health.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status == SERVING
        wrong: Sequence[Any] = [
            None, (("authorization", "first"),), (("authorization", "Bearer firs"),), (("authorization", "Bearer "),),
            (("authorization-bin", b"Bearer first"),),
        ]  # fmt: skip
        for metadata in wrong:
            for call in (
                it.generate(metadata=metadata),
                it.stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata),
                it.stub.GetLoad(pb.GetLoadRequest(), metadata=metadata),
                reflected(it.channel, metadata, list_services=""),
            ):
                assert (await refused(call)).code() is Code.UNAUTHENTICATED
        assert not it.source.asked
        watch = it.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await refused(watch)).code() is Code.UNAUTHENTICATED
        # Also before its request has come: who has no token holds no place among the calls.
        silent = it.channel.stream_unary("/shoal.v1.Inference/Generate")()
        async with asyncio.timeout(PATIENCE / 2):
            assert await silent.code() is Code.UNAUTHENTICATED
        for token in ("first", "second"):
            metadata = (("authorization", f"Bearer {token}"),)
            assert (await answered(it.generate(metadata=metadata)))[1]


@in_a_loop
async def test_model_and_load_are_told() -> None:
    async with service() as it:
        told = await it.stub.GetModelInfo(pb.GetModelInfoRequest(model="shoal-test"))
        info = it.source.info
        assert {name: getattr(told, name) for name in pb.GetModelInfoResponse.DESCRIPTOR.fields_by_name} == vars(info)
        assert (await refused(it.stub.GetModelInfo(pb.GetModelInfoRequest(model="x")))).code() is Code.NOT_FOUND
        load = await it.stub.GetLoad(pb.GetLoadRequest())
        assert (load.capacity, load.running) == (it.source.sequences, 0)


def test_the_load_that_engines_tell_has_a_place_for_every_figure() -> None:
    figures = {field.name for field in fields(Load)} - {"expert_tokens"}
    assert set(pb.GetLoadResponse.DESCRIPTOR.fields_by_name) == figures


def reflected(channel: Any, metadata: Any = None, **what: str) -> Any:
    request = reflection_pb2.ServerReflectionRequest(**what)
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    return stub.ServerReflectionInfo(iter([request]), metadata=metadata)


@in_a_loop
async def test_reflection_describes_the_service() -> None:
    async with service() as it:
        listed = await reflected(it.channel, list_services="").read()
        names = {found.name for found in listed.list_services_response.service}
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        described = await reflected(it.channel, file_containing_symbol=SERVICE).read()
        assert list(described.file_descriptor_response.file_descriptor_proto) == [pb.DESCRIPTOR.serialized_pb]


@in_a_loop
async def test_a_message_that_is_too_large_is_refused() -> None:
    async with service(Settings(largest_body=10_000)) as it:
        error = await refused(it.generate("fish " * 3000))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert not it.source.asked


@in_a_loop
async def test_tls_and_nothing_but_tls(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    listen = Listen(grpc_port=free_port(), certificate=made.certificate, key=made.key)
    async with service(listen=listen) as it:
        authority = grpc.ssl_channel_credentials(made.certificate.read_bytes())
        async with grpc.aio.secure_channel(listen.grpc, authority) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            assert (await stub.GetModelInfo(pb.GetModelInfoRequest())).name == "shoal-test"
        assert (await refused(it.generate())).code() is Code.UNAVAILABLE


@in_a_loop
async def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = Listen(grpc_port=taken.getsockname()[1])
        with pytest.raises(ClusterRefused, match=rf"--grpc-port {listen.grpc_port} cannot be listened on at 127.0.0.1"):
            async with service(listen=listen):
                pass


@in_a_loop
async def test_requests_have_ids_of_their_own() -> None:
    async with service() as it:
        await asyncio.gather(*(answered(it.generate(max_tokens=3)) for _ in range(8)))
        asked: list[Request] = it.source.asked
        assert len({request.id for request in asked}) == 8
