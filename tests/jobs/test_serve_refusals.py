"""Values that cannot be honoured are refused, each with a sentence that says what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError
from serve_source import asynchronous, stand

from shoal.jobs.serve.api import Asked, ChatAsked, CompletionAsked
from shoal.workers.errors import InvalidInput

USER = {"role": "user", "content": "what swims?"}

COMPLETION: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "prompt is empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt is empty"),
    ({"prompt": [[1], []]}, "prompt", "prompt is empty"),
    ({"prompt": None}, "prompt", "prompt with None cannot be used: set prompt to a text, a list of texts"),
    ({"prompt": ["a", 1]}, "prompt", "set prompt to a text, a list of texts"),
    ({"prompt": [1, 320]}, "prompt", "token id 320: give ids from 0 to 319"),
    ({"prompt": [-1]}, "prompt", "token id -1: give ids from 0 to 319"),
    ({"prompt": [True]}, "prompt", "set prompt to"),
    ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
    ({"prompt": "a" * 1000}, None, "the prompt has 1001 tokens and the model's context is 128"),
    ({"prompt": [5] * 100, "max_tokens": 29}, "max_tokens", "together 129, and the model's context is 128: set"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0 is out of range: set max_tokens to at least 1"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens=1.5 is not a whole number"),
    ({"max_tokens": "5"}, "max_tokens", "max_tokens='5' is not a whole number"),
    ({"max_tokens": 10**30}, "max_tokens", "the model's context is 128"),
    ({"temperature": 2.1}, "temperature", "temperature=2.1 is out of range: set temperature to at most 2"),
    ({"temperature": -1}, "temperature", "set temperature to at least 0"),
    ({"temperature": float("nan")}, "temperature", "temperature=nan is out of range"),
    ({"temperature": float("inf")}, "temperature", "temperature=inf is out of range"),
    ({"temperature": True}, "temperature", "temperature=True is not a number"),
    ({"top_p": 0}, "top_p", "top_p=0 is out of range: set top_p to more than 0"),
    ({"top_k": -1}, "top_k", "set top_k to at least 0"),
    ({"min_p": 1.1}, "min_p", "set min_p to at most 1"),
    ({"n": 0}, "n", "set n to at least 1"),
    ({"n": 129}, "n", "set n to at most 128"),
    ({"n": 22, "prompt": ["a", "b", "c"]}, "n", "n=22 answers to each of 3 prompts are 66, and a call may ask for 64"),
    ({"seed": 2**63}, "seed", "set seed to at most 9223372036854775807"),
    ({"seed": 1.0}, "seed", "seed=1.0 is not a whole number"),
    ({"stop": list("abcde")}, "stop", "a list of up to 4 texts"),
    ({"stop": ["a", ""]}, "stop", "stop='' would end every answer"),
    ({"stop": "a" * 257}, "stop", "longer than 256 characters: shorten it"),
    ({"stop": 3}, "stop", "a text, or a list of up to 4 texts"),
    ({"logprobs": 21}, "logprobs", "set logprobs to at most 20"),
    ({"logprobs": True}, "logprobs", "logprobs=True is not a whole number"),
    ({"echo": True, "logprobs": 1}, "echo", "leave one of them out"),
    ({"stream": "yes"}, "stream", "stream='yes' is not true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "usage", "usage=True is no key here"),
    ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty=0.5 cannot be honoured here"),
    ({"best_of": 2}, "best_of", "best_of=2 cannot be honoured here"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "cannot be honoured here"),
    ({"suffix": "."}, "suffix", "cannot be honoured here"),
    ({"max_token": 5}, "max_token", "max_token=5 is no key here: did you mean max_tokens"),
    ({"messages": [USER]}, "messages", "is no key here: leave it out"),
    ({"model": 3}, "model", "model=3 is not a text"),
]  # fmt: skip


@asynchronous
async def test_refused_completions() -> None:
    async with stand() as s:
        for change, param, sentence in COMPLETION:
            body = json.dumps({"model": "shoal-test", "prompt": "A shoal", **change})
            response = await s.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
            assert_refused(response, change, param, sentence)
        assert not s.source.asked


CHAT: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "messages has 0 items: give 1 or more"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "messages.0.role='tool' is not one of its values"),
    ({"messages": [{"role": "user"}]}, "messages", "messages.0.content is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages", "messages.0.content with None"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "a list of parts"),
    ({"messages": [{**USER, "name": "me"}]}, "name", "name='me' cannot be honoured here"),
    ({"messages": [{**USER, "contents": "a"}]}, "contents", "contents='a' is no key here: did you mean content"),
    ({"messages": "hi"}, "messages", "messages='hi' is not a list"),
    ({"messages": ["hi"]}, "messages", "messages.0='hi' cannot be used"),
    ({"messages": [{"role": "user", "content": "a" * 1000}]}, None, "context is 128"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "set max_completion_tokens only"),
    ({"max_completion_tokens": 500}, "max_tokens", "context is 128"),
    ({"top_logprobs": 3}, "top_logprobs", "set logprobs"),
    ({"logprobs": 3}, "logprobs", "logprobs=3 is not true or false"),
    ({"tools": [{"type": "function"}]}, "tools", "cannot be honoured here"),
    ({"response_format": {"type": "json_object"}}, "response_format", "cannot be honoured here"),
    ({"prompt": "a"}, "prompt", "is no key here"),
]  # fmt: skip


@asynchronous
async def test_refused_chats() -> None:
    async with stand() as s:
        for change, param, sentence in CHAT:
            response = await s.http.post(
                "/v1/chat/completions", json={"model": "shoal-test", "messages": [USER], **change}
            )
            assert_refused(response, change, param, sentence)
        assert not s.source.asked


def assert_refused(response: Any, change: dict[str, Any], param: str | None, sentence: str) -> None:
    assert response.status_code == 400, (change, response.text)
    error = response.json()["error"]
    assert sentence in error["message"], change
    assert (error["type"], error["param"]) == ("invalid_request_error", param), change
    assert "\n" not in error["message"]


MANY = 10_000


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionAsked, {"prompt": ["a"] + [1] * MANY}),
        (CompletionAsked, {"prompt": [1.5] * MANY}),
        (CompletionAsked, {"prompt": [["a"] * MANY] * 10}),
        (CompletionAsked, {"prompt": "a", "stop": [1] * MANY}),
        (ChatAsked, {"messages": ["hi"] * MANY}),
        (ChatAsked, {"messages": [{"role": "user", "content": [1] * MANY}] * MANY}),
    ],
)
def test_work_for_a_wrong_body_does_not_grow_with_its_mistakes(schema: type[Asked], body: dict[str, Any]) -> None:
    """pydantic makes an object of each mistake it notes: of a few megabytes of body, gigabytes."""
    with pytest.raises(ValidationError) as found:
        schema.model_validate({"model": "shoal-test", **body})
    assert found.value.error_count() < 10


@asynchronous
async def test_keys_that_ask_for_nothing_are_taken() -> None:
    nothing: dict[str, Any] = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "stream": False,
        "tools": None, "best_of": 1, "suffix": None, "metadata": {"a": "b"}, "stream_options": None,
    }  # fmt: skip
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    async with stand() as s:
        assert (await s.complete(**nothing)).status_code == 200
        assert (await s.chat(USER, **{**nothing, **chat}, max_completion_tokens=3, max_tokens=3)).status_code == 200


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "the body is not JSON"),
        (b'{"model": "shoal-test", "prompt": "\xff"}', "send a JSON object in UTF-8"),
        (b"", "the body is not a JSON object"),
        (b"[]", "the body is not a JSON object"),
        (b'"a"', "the body is not a JSON object"),
        (b"[" * 100_000, "send a JSON object in UTF-8"),
        (b'{"n": ' + b"1" * 10_000 + b"}", "send a JSON object in UTF-8"),
        (b'{"\\ud800": 1}', "is no key here"),
    ],
)
@asynchronous
async def test_bodies_that_are_no_json_object(body: bytes, sentence: str) -> None:
    async with stand() as s:
        for path in ("/v1/completions", "/v1/chat/completions"):
            response = await s.http.post(path, content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 400
            assert sentence in response.json()["error"]["message"]
        form = await s.http.post("/v1/completions", data={"model": "shoal-test", "prompt": "a"})
        assert form.status_code == 400
        assert "'Content-Type: application/json'" in form.json()["error"]["message"]


@asynchronous
async def test_what_the_engine_refuses_is_the_clients_mistake() -> None:
    """The service checks first, but the engine has the last word."""
    async with stand() as s:
        s.source.limit = 1
        response = await s.complete(max_tokens=5)
    assert response.status_code == 400
    assert InvalidInput.__name__ not in response.text
