"""What a public HTTP service meets: strangers, crowds, clients that vanish, dawdle or send too much, its own end."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from serve_source import PATIENCE, Source, Stand, asynchronous, events, stand

from shoal.jobs.serve.http import Settings
from shoal.workers.engine.request import Request, Token

BODY = {"model": "shoal-test", "prompt": "A shoal", "max_tokens": 60, "temperature": 0}
CHAT = {"model": "shoal-test", "messages": [{"role": "user", "content": "hi"}], "n": 2, "temperature": 0}
PATHS = [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)]


def request_bytes(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """A whole HTTP request."""
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: shoal\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of an answer, which has no other keys."""
    [(key, error)] = response.json().items()
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    found: dict[str, Any] = error
    return found


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer secret-", 401),
        ("Bearer secret-on", 401),
        ("Bearer secret-one2", 401),
        ("Basic secret-one", 401),
        ("secret-one", 401),
        ("Bearer sécret-one", 401),
        ("Bearer secret-one", 200),
        ("bearer  secret-two", 200),
    ],
)
@asynchronous
async def test_bearer_tokens(header: str | None, status: int) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    async with stand(Settings(tokens=("secret-one", "secret-two"))) as s:
        responses = [
            await s.http.post("/v1/completions", json=BODY, headers=headers),
            await s.http.post("/v1/chat/completions", json=CHAT, headers=headers),
            await s.http.get("/v1/models", headers=headers),
            await s.http.get("/openapi.json", headers=headers),
        ]
        for response in responses:
            assert response.status_code == status
            if status == 401:
                assert error_of(response)["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert "secret" not in response.text
        if status == 401:
            assert (await s.http.get("/v1/nothing", headers=headers)).status_code == 401  # tells strangers nothing
            assert not s.source.asked
        for path in ("/healthz", "/readyz"):
            assert (await s.http.get(path, headers=headers)).status_code == 200


@asynchronous
async def test_a_stranger_is_refused_before_the_body_is_sent() -> None:
    async with stand(Settings(tokens=("secret",))) as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: shoal\r\nContent-Length: 1000\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
        writer.close()


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_full_queue_is_429_and_its_place_comes_free(stream: bool) -> None:
    async with stand(sequences=1, waiting=1) as s:
        s.source.pause_after = 0
        taken = [asyncio.create_task(s.complete(max_tokens=3)) for _ in range(2)]
        await s.source.until(lambda: len(s.source.running) == 2)
        refused = await s.complete(max_tokens=3, stream=stream)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert error_of(refused)["code"] == "busy"
        s.source.resume()
        assert [(await task).status_code for task in taken] == [200, 200]
        assert (await s.complete(max_tokens=3, stream=stream)).status_code == 200


@asynchronous
async def test_a_call_that_does_not_fit_whole_takes_no_place() -> None:
    async with stand(sequences=2, waiting=1) as s:
        s.source.pause_after = 0
        refused = await s.complete(n=4, max_tokens=3)
        assert refused.status_code == 429
        await s.source.until(lambda: not s.source.running)
        assert len(s.source.cancelled) == 3


@asynchronous
async def test_calls_at_once_have_a_limit() -> None:
    async with stand(Settings(most_calls=2)) as s:
        s.source.pause_after = 0
        taken = [asyncio.create_task(s.complete(max_tokens=3)) for _ in range(2)]
        await s.source.until(lambda: len(s.source.running) == 2)
        assert error_of(refused := await s.complete())["code"] == "busy"
        assert refused.status_code == 429
        assert (await s.http.get("/v1/models")).status_code == 200
        s.source.resume()
        assert [(await task).status_code for task in taken] == [200, 200]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 3])
@asynchronous
async def test_who_hangs_up_is_forgotten_at_once(path: str, stream: bool, tokens: int) -> None:
    """Before the first token and after it, with one answer or several."""
    async with stand() as s:
        s.source.pause_after = tokens
        body = {**dict(PATHS)[path], "n": 3, "stream": stream}
        _, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(request_bytes(body, path))
        await s.source.until(lambda: len(s.source.running) == 3 and s.source.told.total() == 3 * tokens)
        writer.close()
        await s.source.until(lambda: len(s.source.cancelled) == 3)  # nobody lets the source go on
        assert not s.source.running
        s.source.resume()
        assert (await s.complete()).status_code == 200


@asynchronous
async def test_who_hangs_up_while_waiting_gives_up_the_place() -> None:
    async with stand(sequences=1, waiting=1) as s:
        s.source.pause_after = 0
        first = asyncio.create_task(s.complete(max_tokens=3))
        await s.source.until(lambda: len(s.source.running) == 1)
        _, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(request_bytes(BODY))
        await s.source.until(lambda: len(s.source.running) == 2)
        writer.close()
        await s.source.until(lambda: len(s.source.running) == 1)
        second = asyncio.create_task(s.complete(max_tokens=3))
        await s.source.until(lambda: len(s.source.running) == 2)
        s.source.resume()
        assert [(await task).status_code for task in (first, second)] == [200, 200]


def slow_socket(port: int) -> socket.socket:
    """A connection that takes in little at a time."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", port))
    slow.setblocking(False)
    return slow


LONG = {**BODY, "prompt": [5], "max_tokens": 100_000, "stream": True, "logprobs": 20, "temperature": 2}


class Endless(Source):
    """Never says that the text ends."""

    def choose(self, request: Request, context: list[int], place: int) -> Token:
        return Token(40 + place % 26, -1.0, tuple((token, -1.0) for token in range(20, 40)))


@asynchronous
async def test_a_slow_reader_waits_alone() -> None:
    async with stand(source=Endless, context=200_000) as s:
        loop, slow = asyncio.get_running_loop(), slow_socket(s.port)
        await loop.sock_sendall(slow, request_bytes(LONG))
        await s.source.until(lambda: bool(s.source.asked))
        [name] = [request.id for request in s.source.asked]
        # Others are served, until the slow one's source stands still for the time of several of their calls.
        still = 0
        while still < 5:
            before = s.source.told[name]
            assert (await s.complete([5], max_tokens=100)).status_code == 200
            still = still + 1 if s.source.told[name] == before else 0
        stopped_at = s.source.told[name]
        assert stopped_at < 50_000
        # Once it reads, its answer goes on.
        while s.source.told[name] == stopped_at:
            await loop.sock_recv(slow, 1 << 16)
        slow.close()
        await s.source.until(lambda: not s.source.running)


@asynchronous
async def test_who_reads_nothing_is_given_up() -> None:
    async with stand(Settings(slow_reader_seconds=0.2), source=Endless, context=200_000) as s:
        slow = slow_socket(s.port)
        await asyncio.get_running_loop().sock_sendall(slow, request_bytes({**LONG, "n": 2}))
        await s.source.until(lambda: len(s.source.cancelled) == 2)
        assert (await s.complete([5])).status_code == 200
        slow.close()


@asynchronous
async def test_signs_of_life_while_a_stream_waits() -> None:
    async with stand(Settings(heartbeat_seconds=0.02)) as s:
        s.source.pause_after = 0
        async with s.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            lines = response.aiter_lines()
            assert [await anext(lines) for _ in range(4)] == [": waiting", ""] * 2
            s.source.resume()
            rest = "\n".join([line async for line in lines])
        assert events(rest)[-1]["choices"][0]["finish_reason"]


async def chunks(count: int, size: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * size


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@asynchronous
async def test_large_bodies(path: str) -> None:
    limit = 200_000
    json_type = {"Content-Type": "application/json"}
    async with stand(Settings(largest_body=limit)) as s:
        body = json.dumps(dict(PATHS)[path])
        fits = await s.http.post(path, content=body.ljust(limit), headers=json_type)
        assert fits.status_code == 200
        for content in (body.ljust(limit + 1), body.ljust(3_000_000), chunks(30, 100_000)):  # the last: no length given
            response = await s.http.post(path, content=content, headers=json_type)
            assert response.status_code == 413
            assert "200000 bytes" in error_of(response)["message"]


@asynchronous
async def test_a_large_body_that_is_announced_is_not_sent() -> None:
    async with stand(Settings(largest_body=1000)) as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: shoal\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 413 Request Entity Too Large\r\n"
        writer.close()


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "9" * 5000])
@asynchronous
async def test_lengths_that_are_none(length: str) -> None:
    async with stand() as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{{}}".encode())
        writer.write_eof()
        status = (await reader.readline()).split()
        assert not status or status[1].startswith(b"4")
        writer.close()
        assert (await s.complete()).status_code == 200


@asynchronous
async def test_a_body_that_does_not_come() -> None:
    async with stand(Settings(slow_sender_seconds=0.5)) as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(request_bytes(BODY)[:-5])
        assert (await reader.readline()).split()[1] == b"408"
        writer.close()
        _, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(request_bytes(BODY)[:-5])
        writer.close()  # and one that goes away halfway
        assert (await s.complete()).status_code == 200
        assert len(s.source.asked) == 1


@asynchronous
async def test_two_calls_on_one_connection() -> None:
    async with stand() as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(request_bytes({**BODY, "max_tokens": 2}) * 2)
        for _ in range(2):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert head.startswith("http/1.1 200")
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            assert json.loads(await reader.readexactly(length))["usage"]["completion_tokens"] == 2
        writer.close()


@asynchronous
async def test_shutting_down() -> None:
    async with stand() as s:
        assert (await s.http.get("/readyz")).json() == {"status": "ready"}
        s.source.closed = True
        for response in [
            await s.complete(),
            await s.complete(stream=True),
            await s.chat({"role": "user", "content": "hi"}),
            await s.http.get("/readyz"),
        ]:
            assert response.status_code == 503
            assert error_of(response)["type"] == "server_error"
            assert "Retry-After" in response.headers
        assert (await s.http.get("/healthz")).status_code == 200
        assert (await s.http.get("/v1/models")).status_code == 200


@asynchronous
async def test_engines_that_give_up_an_answer() -> None:
    async with stand() as s:
        s.source.pause_after = 2
        whole = asyncio.create_task(s.complete(max_tokens=9))
        stream = asyncio.create_task(s.complete(max_tokens=9, stream=True))
        await s.source.until(lambda: s.source.told.total() == 4)
        s.source.closed = True
        s.source.resume()
        assert (await whole).status_code == 503
        *pieces, last = events((await stream).text)
        assert pieces
        assert last["error"]["type"] == "server_error"


class Faulty(Source):
    """Fails at its fourth token, as code with a mistake in it does."""

    def choose(self, request: Request, context: list[int], place: int) -> Token:
        if place == 3:
            raise ZeroDivisionError("secret")
        return super().choose(request, context, place)


@asynchronous
async def test_a_mistake_of_the_service_is_500_without_its_details() -> None:
    async with stand(source=Faulty) as s:
        for response in [
            await s.complete(max_tokens=9),
            await s.complete(max_tokens=9, n=3),
            await s.chat({"role": "user", "content": "hi"}),
        ]:
            assert response.status_code == 500
            assert "secret" not in error_of(response)["message"]
        streamed = await s.complete(max_tokens=9, stream=True)
        *_, last = events(streamed.text)
        assert last["error"]["type"] == "server_error"
        assert "secret" not in streamed.text
        assert not s.source.running
        assert (await s.complete(max_tokens=3)).status_code == 200


@asynchronous
async def test_many_at_once() -> None:
    """Each gets its own answer, whatever else is in flight."""
    async with stand(sequences=8, waiting=1000) as s:

        async def ask(seed: int) -> str:
            keys = {"seed": seed, "max_tokens": 20, "temperature": 1.5}
            if seed % 2:
                stream = events((await s.complete(**keys, stream=True)).text)
                return "".join(event["choices"][0]["text"] for event in stream)
            text: str = (await s.complete(**keys)).json()["choices"][0]["text"]
            return text

        together = await asyncio.gather(*map(ask, range(100)))
        assert together == [await ask(seed) for seed in range(100)]


async def _raw(s: Stand, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
    writer.write(data)
    writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "data", [b"\x00\xff\n\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000 + b"\r\n\r\n"]
)
@asynchronous
async def test_what_is_not_http(data: bytes) -> None:
    async with stand() as s:
        answer = await _raw(s, data)
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        assert (await s.complete()).status_code == 200
