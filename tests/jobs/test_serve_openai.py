"""The service as programs meet it that know only the official client of the API."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from serve_source import Stand, asynchronous, small_tokenizer, stand

from shoal.jobs.serve.http import Settings

MODEL = "shoal-test"
HI: ChatCompletionMessageParam = {"role": "user", "content": "what swims?"}


def client(s: Stand, token: str = "any", strict: bool = True) -> AsyncOpenAI:
    """The official client, without retries that would hide a refusal.

    strict: whatever its types do not foresee is an error; they do not foresee a completion's chunk before the last.
    """
    return AsyncOpenAI(base_url=f"{s.url}/v1", api_key=token, max_retries=0, _strict_response_validation=strict)


@asynchronous
async def test_completions() -> None:
    async with stand() as s, client(s) as api:
        answer = await api.completions.create(
            model=MODEL, prompt=["A shoal", "ü"], n=2, max_tokens=5, logprobs=2, stop=["xyz"], seed=1, echo=False
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == s.source.told.total()
        found = answer.choices[0].logprobs
        assert found is not None
        assert found.tokens is not None
        assert "".join(found.tokens) == answer.choices[0].text
        keys: dict[str, Any] = {"model": MODEL, "prompt": "A shoal", "max_tokens": 5, "seed": 1}
        stream = await client(s, strict=False).completions.create(**keys, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
        assert text == answer.choices[0].text


@asynchronous
async def test_chat_that_goes_on() -> None:
    async with stand(context=256) as s, client(s) as api:
        first = await api.chat.completions.create(
            model=MODEL, messages=[HI], temperature=0, max_completion_tokens=20, logprobs=True, top_logprobs=2
        )
        message = first.choices[0].message
        assert first.choices[0].logprobs is not None
        assert first.choices[0].logprobs.content
        # Its answer goes back as it came, keys that are null and all.
        answered: ChatCompletionMessageParam = message.to_dict()  # type: ignore[assignment]
        stream = await api.chat.completions.create(
            model=MODEL,
            messages=[HI, answered, {"role": "user", "content": "where?"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 5, "min_p": 0.0},
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == len(s.source.asked[1].prompt)
    conversation = f"user: what swims?\nassistant: {message.content}\nuser: where?\nassistant:"
    assert s.source.asked[1].prompt == tuple(small_tokenizer().prompt(conversation))
    assert text
    assert s.source.asked[1].sampling.top_k == 5


@asynchronous
async def test_the_clients_own_helper_for_streams() -> None:
    async with stand(context=256) as s, client(s) as api:
        keys: dict[str, Any] = {"model": MODEL, "messages": [HI], "temperature": 0, "n": 2}
        async with api.chat.completions.stream(**keys) as stream:
            whole = await stream.get_final_completion()
        plain = await api.chat.completions.create(**keys)
    assert [c.message.content for c in whole.choices] == [c.message.content for c in plain.choices]
    assert [c.finish_reason for c in whole.choices] == [c.finish_reason for c in plain.choices]


@asynchronous
async def test_models() -> None:
    async with stand() as s, client(s) as api:
        assert [model.id async for model in api.models.list()] == [MODEL]
        assert (await api.models.retrieve(MODEL)).owned_by == "shoal"
        with pytest.raises(openai.NotFoundError):
            await api.models.retrieve("gpt-5")


@asynchronous
async def test_errors_are_those_the_client_knows() -> None:
    async with stand(Settings(tokens=("secret",)), sequences=1, waiting=0) as s, client(s, "secret") as api:
        with pytest.raises(openai.AuthenticationError):
            await client(s, "wrong").models.list()
        with pytest.raises(openai.NotFoundError, match="gpt-5") as unknown:
            await api.completions.create(model="gpt-5", prompt="a")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="context is 128") as long:
            await api.completions.create(model=MODEL, prompt="a", max_tokens=1000)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "max_tokens")
        with pytest.raises(openai.BadRequestError, match="tools="):
            await api.chat.completions.create(
                model=MODEL, messages=[HI], tools=[{"type": "function", "function": {"name": "f"}}]
            )
        with pytest.raises(openai.RateLimitError):
            await api.completions.create(model=MODEL, prompt="a", n=2)
        await s.source.until(lambda: not s.source.running)
        s.source.pause_after = 2
        stream = await api.chat.completions.create(model=MODEL, messages=[HI], temperature=0, stream=True)
        s.source.closed = True
        s.source.resume()
        with pytest.raises(openai.APIError, match="shut down"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError):
            await api.completions.create(model=MODEL, prompt="a")


@asynchronous
async def test_a_client_that_retries_gets_its_answer() -> None:
    """It waits as Retry-After says, and asks again."""
    async with stand(sequences=1, waiting=0) as s:
        s.source.pause_after = 0
        async with client(s).with_options(max_retries=5) as api:
            running = asyncio.create_task(api.completions.create(model=MODEL, prompt="a", max_tokens=2))
            await s.source.until(lambda: len(s.source.running) == 1)
            second = asyncio.create_task(api.completions.create(model=MODEL, prompt="b", max_tokens=2))
            await s.source.until(lambda: s.source.refused > 0)
            s.source.resume()
            assert (await running).choices
            assert (await second).choices


@asynchronous
async def test_closing_a_stream_cancels_it() -> None:
    async with stand() as s, client(s) as api:
        s.source.pause_after = 2
        stream = await api.chat.completions.create(model=MODEL, messages=[HI], temperature=0, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await s.source.until(lambda: len(s.source.cancelled) == 1)
