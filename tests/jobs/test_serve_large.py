"""Large bodies: read in a process of their own, to the same answers, while the service goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_source import PATIENCE, TEXTS, Stand, asynchronous, events, small_tokenizer, stand
from test_serve_refusals import CHAT, COMPLETION, USER

from shoal.jobs.serve.apart import LARGE
from shoal.jobs.serve.reading import encode_prompt
from shoal.jobs.serve.refusal import Refusal

PADDING = " " * (LARGE + 1)  # JSON may end with spaces
BODY = 4 << 20


async def post(s: Stand, path: str, body: str | bytes, kind: str = "application/json") -> Any:
    return await s.http.post(path, content=body, headers={"Content-Type": kind})


@asynchronous
async def test_a_large_body_is_refused_as_a_small_one_is() -> None:
    async with stand() as s:
        completions = [{"model": "shoal-test", "prompt": "A shoal", **change} for change, _, _ in COMPLETION]
        chats = [{"model": "shoal-test", "messages": [USER], **change} for change, _, _ in CHAT]
        other = [{"model": "another", "prompt": "a"}]
        for path, bodies in (("/v1/completions", completions + other), ("/v1/chat/completions", chats)):
            for body in bodies:
                small = await post(s, path, text := json.dumps(body))
                large = await post(s, path, text + PADDING)
                assert (large.status_code, large.json()) == (small.status_code, small.json()), body
        for wrong in (b'{"a" 1', b'{"model": "shoal-test", "prompt": "\xff"}', b"[]", b"[" * 10_000, b'"a"'):
            small = await post(s, "/v1/completions", wrong)
            large = await post(s, "/v1/completions", wrong + PADDING.encode())
            assert (large.status_code, large.json()) == (small.status_code, small.json()), wrong
        form = await post(s, "/v1/completions", "prompt=a" + PADDING, "application/x-www-form-urlencoded")
        assert form.status_code == 400
        assert not s.source.asked


@asynchronous
async def test_a_large_body_is_answered_as_a_small_one_is() -> None:
    completion = {"model": "shoal-test", "prompt": ["A shoal", "The tide"], "n": 2, "seed": 3, "echo": True}
    ids = {"model": "shoal-test", "prompt": [5, 6, 7], "logprobs": 2, "temperature": 0}
    chat = {"model": "shoal-test", "messages": [USER], "seed": 3, "max_tokens": 9, "logprobs": True}
    async with stand() as s:
        for path, body in (("completions", completion), ("completions", ids), ("chat/completions", chat)):
            found = []
            for text in (json.dumps(body), json.dumps(body) + PADDING):
                response = await post(s, f"/v1/{path}", text)
                assert response.status_code == 200, response.text
                found.append(response.json()["choices"])
            assert found[0] == found[1]
            stream = await post(s, f"/v1/{path}", json.dumps({**body, "stream": True}) + PADDING)
            texts = [choice for event in events(stream.text) for choice in event["choices"]]
            assert {choice["index"] for choice in texts} == {choice["index"] for choice in found[0]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", '{"model": "shoal-test", "prompt": [' + ",".join(["[]"] * (BODY // 3 - 20)) + "]}"),
        ("/v1/completions", '{"model": "shoal-test", "prompt": [' + ",".join(["7"] * (BODY // 2 - 20)) + "]}"),
        ("/v1/completions", json.dumps({"model": "shoal-test", "prompt": "A shoal of fish. " * (BODY // 17 - 9)})),
        (
            "/v1/chat/completions",
            '{"model": "shoal-test", "messages": ['
            + ",".join(['{"role": "user", "content": "a"}'] * (BODY // 33 - 9))
            + "]}",
        ),
    ],
    ids=["empty lists", "token ids", "a text", "messages"],
)
@asynchronous
async def test_others_are_answered_while_megabytes_are_read(path: str, body: str) -> None:
    """The worst bodies that are let in, read by a process that stands still until the others have their answers."""
    async with stand() as s:
        await s.complete("A shoal", user="x" * LARGE)  # starts the process
        assert s.apart.pid
        reader = psutil.Process(s.apart.pid)
        reader.suspend()
        try:
            large = asyncio.create_task(post(s, path, body))
            assert (await s.complete("The tide", max_tokens=3)).status_code == 200
            assert (await s.http.get("/readyz")).status_code == 200
            assert not large.done()
        finally:
            reader.resume()
        response = await large
        assert response.status_code == 400
        assert any(why in response.text for why in ("context is 128", "prompt is empty")), response.text[:300]


def test_a_text_that_no_context_could_hold_is_not_encoded_whole() -> None:
    tokenizer = CountingTokenizer()
    with pytest.raises(Refusal, match="more than 100 tokens"):
        encode_prompt(tokenizer, "A shoal of fish. " * 100_000, 100)  # type: ignore[arg-type]
    assert tokenizer.characters < 10_000


class CountingTokenizer:
    """The small one, and how many characters it was given."""

    characters = 0

    def prompt(self, text: str) -> list[int]:
        self.characters += len(text)
        return small_tokenizer().prompt(text)


@given(st.integers(0, 60), st.lists(st.sampled_from([*TEXTS, "a", " ", "\n", "é", "🐟"]), max_size=40))
def test_a_text_is_refused_early_only_if_it_is_too_long(context: int, parts: list[str]) -> None:
    tokenizer, text = small_tokenizer(), "".join(parts)
    whole = tokenizer.prompt(text)
    try:
        assert encode_prompt(tokenizer, text, context) == whole
    except Refusal as refusal:
        assert len(whole) > context
        assert f"more than {context} tokens" in str(refusal)


@asynchronous
async def test_a_reader_that_dies_is_replaced() -> None:
    async with stand() as s:
        assert (await s.complete("A shoal", user="x" * LARGE)).status_code == 200
        first = s.apart.pid
        assert first
        os.kill(first, signal.SIGSTOP)
        waiting = asyncio.create_task(s.complete("A shoal", user="x" * LARGE))
        while psutil.Process(first).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)
        os.kill(first, signal.SIGKILL)
        lost = await waiting
        if lost.status_code != 200:  # it may have been sent after the end
            assert (lost.status_code, lost.json()["error"]["code"]) == (503, "unavailable")
            assert "Retry-After" in lost.headers
        assert (await s.complete("A shoal", user="x" * LARGE)).status_code == 200
        assert s.apart.pid != first


HOLDER = """
import asyncio, sys
sys.path.insert(0, "tests/jobs")
from serve_source import small_tokenizer
from shoal.jobs.serve.apart import ReaderApart
from shoal.jobs.serve.client import ModelInfo
from shoal.jobs.serve.reading import Reader
apart = ReaderApart(Reader(ModelInfo("m", 128, 320, 1, 1, 1), small_tokenizer(), 64))
asyncio.run(apart.body("completions", b'{"model": "m", "prompt": "a"}'))
print(apart.pid, flush=True)
sys.stdin.read()
"""


def test_the_reader_ends_with_whoever_started_it() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdin
    reader = psutil.Process(int(holder.stdout.readline()))
    holder.kill()
    holder.communicate()
    until = time.monotonic() + PATIENCE
    with contextlib.suppress(psutil.NoSuchProcess):
        while reader.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.01)
