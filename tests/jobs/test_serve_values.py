"""What is asked for, and what comes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serve_source import TEXTS, Stand, asynchronous, events, small_tokenizer, stand

from shoal.jobs.serve.http import Settings

USER = {"role": "user", "content": "what swims?"}


def text_of(stream: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one answer in a stream of completions or of chat."""
    choices = [choice for event in stream for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)


@asynchronous
async def test_a_completion_and_its_usage() -> None:
    async with stand() as s:
        answer = (await s.complete(max_tokens=5)).json()
        again = (await s.complete(max_tokens=5)).json()
    [choice] = answer["choices"]
    prompt = small_tokenizer().encode(["A shoal"])[0][:-1]
    assert s.source.asked[0].prompt == tuple(prompt)  # bos and the text
    assert any("shoal" + choice["text"][:8] in text for text in TEXTS)
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert (answer["object"], answer["model"]) == ("text_completion", "shoal-test")
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 5, "total_tokens": len(prompt) + 5}
    assert answer["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": len(prompt) - 1}
    assert again["id"] != answer["id"]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]], ["A shoal", "ü"], [[5], [6, 7]]])
@asynchronous
async def test_prompts_of_every_kind(prompt: Any) -> None:
    async with stand() as s:
        answer = (await s.complete(prompt, max_tokens=3)).json()
    tokenizer = small_tokenizer()
    several = prompt if isinstance(prompt[0], list | str) else [prompt]
    expected = [tuple(tokenizer.prompt(p)) if isinstance(p, str) else tuple(p) for p in several]
    assert sorted(request.prompt for request in s.source.asked) == sorted(expected)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(several)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


@asynchronous
async def test_the_end_of_a_text_ends_an_answer() -> None:
    async with stand(context=256) as s:
        answer = (await s.complete(max_tokens=200)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"].endswith(".")
    assert answer["usage"]["completion_tokens"] == s.source.told.total() < 200


@asynchronous
async def test_default_number_of_tokens() -> None:
    async with stand(context=40) as s:
        await s.complete()
        await s.complete([2] * 30)  # ten are left
        await s.chat(USER)
    assert [request.sampling.max_tokens for request in s.source.asked] == [16, 10, 40 - len(s.source.asked[2].prompt)]


@pytest.mark.parametrize("call", ["completion", "chat"])
@pytest.mark.parametrize("seed", range(6))
@asynchronous
async def test_a_stream_is_the_answer_in_pieces(call: str, seed: int) -> None:
    keys = {"seed": seed, "max_tokens": 60, "stop": "群れ", "n": 2, "temperature": 1.5}
    async with stand(context=256) as s:
        ask = s.complete if call == "completion" else lambda **k: s.chat(USER, **k)
        whole = (await ask(**keys)).json()
        response = await ask(**keys, stream=True, stream_options={"include_usage": True})
        bare = events((await ask(**keys, stream=True)).text)
    assert response.headers["content-type"].startswith("text/event-stream")
    stream = events(response.text)
    for choice in whole["choices"]:
        text = choice["text"] if call == "completion" else choice["message"]["content"]
        assert text == text_of(stream, choice["index"]) == text_of(bare, choice["index"])
        ends = [c["finish_reason"] for e in stream for c in e["choices"] if c["index"] == choice["index"]]
        assert ends == [None] * (len(ends) - 1) + [choice["finish_reason"]]
    assert stream[-1]["choices"] == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [stream[-1]["usage"][key] for key in counts] == [whole["usage"][key] for key in counts]
    assert all(event["usage"] is None for event in [*stream[:-1], *bare])
    assert len({event["id"] for event in stream}) == 1
    if call == "chat":
        assert stream[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


@asynchronous
async def test_a_stream_gives_text_as_it_comes() -> None:
    async with stand() as s:
        s.source.pause_after = 3
        body = {"model": "shoal-test", "prompt": "A shoal", "max_tokens": 5, "stream": True, "temperature": 0}
        async with s.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            early = ""
            while s.source.told.total() < 3 or early != small_tokenizer().decode(first_tokens(s, 3)):
                line = await anext(lines)
                early += json.loads(line[6:])["choices"][0]["text"] if line else ""
            s.source.resume()
            assert [line async for line in lines][-2:] == ["data: [DONE]", ""]


def first_tokens(s: Stand, count: int) -> list[int]:
    """What the source says first, at temperature 0."""
    request, tokens = s.source.asked[0], list(s.source.asked[0].prompt)
    for place in range(count):
        tokens.append(s.source.choose(request, tokens, place).id)
    return tokens[len(request.prompt) :]


@asynchronous
async def test_stop_strings_end_the_work_too() -> None:
    async with stand(context=256) as s:
        answer = (await s.complete(max_tokens=200, stop=["xyz", "er: wh"])).json()
        [choice] = answer["choices"]
        assert choice["text"] == " of fish.\nus"
        assert choice["finish_reason"] == "stop"
        await s.source.until(lambda: not s.source.running)
        assert s.source.cancelled == [s.source.asked[0].id]
        assert answer["usage"]["completion_tokens"] == s.source.told.total() < 20


@asynchronous
async def test_tokens_after_a_stop_string_do_not_count() -> None:
    """An engine may bring several tokens at once."""
    async with stand(context=256) as s:
        single = (await s.complete(max_tokens=200, stop="er: wh", logprobs=0)).json()
        s.source.batch = 7
        several = (await s.complete(max_tokens=200, stop="er: wh", logprobs=0)).json()
    assert several["choices"] == single["choices"]
    assert several["usage"]["completion_tokens"] == single["usage"]["completion_tokens"]


@asynchronous
async def test_echo() -> None:
    async with stand() as s:
        keys = {"max_tokens": 4, "temperature": 0}
        plain = (await s.complete("A shöal", **keys)).json()["choices"][0]["text"]
        echoed = (await s.complete(["A shöal", "ü"], **keys, echo=True, n=2)).json()["choices"]
        streamed = await s.complete("A shöal", **keys, echo=True, stream=True)
        ids = (await s.complete(list(s.source.asked[0].prompt), **keys, echo=True)).json()["choices"][0]
    assert [choice["text"] for choice in echoed[:2]] == ["A shöal" + plain] * 2
    assert all(choice["text"].startswith("ü") for choice in echoed[2:])
    assert text_of(events(streamed.text)) == ids["text"] == "A shöal" + plain


@asynchronous
async def test_seeds() -> None:
    async with stand() as s:
        await s.complete(["a", "b"], n=2, seed=-5, max_tokens=1)
        assert sorted((r.prompt, r.sampling.seed) for r in s.source.asked) == sorted(
            (tuple(small_tokenizer().prompt(p)), seed) for p in "ab" for seed in (-5, -4)
        )
        s.source.asked.clear()
        answers = [(await s.complete(max_tokens=40, temperature=1.5, seed=seed)).json() for seed in (1, 1, 2)]
        texts = [answer["choices"][0]["text"] for answer in answers]
        assert texts[0] == texts[1] != texts[2]
        s.source.asked.clear()
        for _ in range(3):
            await s.complete(max_tokens=1)
        drawn = {request.sampling.seed for request in s.source.asked}
        assert len(drawn) == 3  # without a seed each call has one of its own, which the engine is told
        await s.complete(max_tokens=1, seed=2**63 - 1, n=3)


@asynchronous
async def test_sampling_values_reach_the_engine() -> None:
    async with stand() as s:
        await s.complete(max_tokens=2, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, logprobs=4, seed=3)
        await s.complete(temperature=None, top_p=None, top_k=None, min_p=None, seed=None, n=None, stop=None, user="me")
    first, second = (request.sampling for request in s.source.asked)
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.logprobs) == (0.5, 0.9, 3, 0.1, 4)
    assert (second.temperature, second.top_p, second.top_k, second.min_p, second.logprobs) == (1.0, 1.0, 0, 0.0, None)
    assert first.stop_tokens == (small_tokenizer().eos,)


@asynchronous
async def test_logprobs_of_completions() -> None:
    async with stand(context=256) as s:
        keys = {"prompt": "user: what swims?", "max_tokens": 9, "logprobs": 3, "temperature": 0}
        answer = (await s.complete(**keys)).json()["choices"][0]
        parts = [e["choices"][0]["logprobs"] for e in events((await s.complete(**keys, stream=True)).text)]
        none = (await s.complete(max_tokens=2, logprobs=0)).json()["choices"][0]["logprobs"]
    found = answer["logprobs"]
    assert [len(found[key]) for key in found] == [4] * 4  # a space, the halves of a fish, a full stop
    assert {key: [entry for part in parts for entry in part[key]] for key in found} == found
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 3
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert top.get(token, logprob) == logprob <= max(top.values()) <= 0
    assert "\ufffd" not in answer["text"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert answer["text"][offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in found["tokens"])
    assert none["top_logprobs"] == [{}, {}]


@asynchronous
async def test_logprobs_of_chat() -> None:
    async with stand(context=256) as s:
        keys = {"max_tokens": 30, "logprobs": True, "top_logprobs": 2, "seed": 1}
        answer = (await s.chat(USER, **keys)).json()["choices"][0]
        stream = events((await s.chat(USER, **keys, stream=True)).text)
        plain = (await s.chat(USER, max_tokens=2, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    content = answer["logprobs"]["content"]
    raw = b"".join(bytes(entry["bytes"]) for entry in content)
    assert raw.decode().removeprefix(" ").startswith(answer["message"]["content"])
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    scores = [choice["logprobs"] for event in stream for choice in event["choices"]]
    assert [entry for part in scores if part for entry in part["content"]] == content
    assert [entry["top_logprobs"] for entry in plain] == [[], []]


@asynchronous
async def test_a_conversation_is_lines_of_text() -> None:
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "swims?"}]
    async with stand(context=256) as s:
        answer = await s.chat(
            {"role": "developer", "content": "Be brief.\nVery."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello", "refusal": None, "tool_calls": []},
            {"role": "user", "content": parts},
        )
    lines = "system: Be brief.\nVery.\nuser: hi\nassistant: hello\nuser: what swims?\nassistant:"
    assert s.source.asked[0].prompt == tuple(small_tokenizer().prompt(lines))
    [choice] = answer.json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a shoal of fish."}  # the space before it is gone
    assert choice["finish_reason"] == "stop"  # before the next line of the user


@asynchronous
async def test_paths_models_and_methods() -> None:
    async with stand(Settings()) as s:
        models = (await s.http.get("/v1/models")).json()
        assert models["data"] == [(await s.http.get("/v1/models/shoal-test")).json()]
        assert models["data"][0]["context_length"] == 128
        for response, status in [
            (await s.http.get("/v1/models/other/model"), 404),
            (await s.http.get("/v1/nothing"), 404),
            (await s.http.get("/v1/completions"), 405),
            (await s.http.delete("/v1/models"), 405),
            (await s.http.post("/v1/completions", json={"model": "other", "prompt": "a"}), 404),
        ]:
            assert response.status_code == status
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["code"] == "model_not_found"
        documented = json.dumps((await s.http.get("/openapi.json")).json())
        assert '"422"' not in documented
