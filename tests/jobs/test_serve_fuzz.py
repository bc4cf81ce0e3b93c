"""Whatever is sent to the documented paths, the service does not fail."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from serve_source import PATIENCE, Source, small_tokenizer, stand

from shoal.jobs.serve.api import Asked, ChatAsked, CompletionAsked
from shoal.jobs.serve.http import Settings, make_app

_source = Source(small_tokenizer())
SCHEMA = schemathesis.openapi.from_dict(make_app(_source, _source.info, small_tokenizer(), Settings()).openapi())
PATHS: dict[str, type[Asked]] = {"/v1/completions": CompletionAsked, "/v1/chat/completions": ChatAsked}
MESSAGE = {"role": "user", "content": "A shoal"}
examples = settings(
    max_examples=500 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" else 40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # a failure is told as it is: to shrink it asks too many questions
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A service in a thread of its own: schemathesis knows nothing of event loops."""
    found: list[str] = []
    ready, done = threading.Event(), threading.Event()

    async def serve() -> None:
        async with stand(Settings(largest_body=100_000, most_answers=8), sequences=8) as s:
            found.append(s.url)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(PATIENCE)
    yield found[0]
    done.set()
    thread.join(PATIENCE)


def check(response: Any) -> None:
    """The answer is not a failure of the service, and an error is one of its own."""
    assert response.status_code < 500
    assert '"server_error"' not in response.text  # as a stream says that has begun
    assert response.status_code != 422
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", PATHS)
def test_bodies_by_the_schema_and_against_it(url: str, path: str, mode: GenerationMode) -> None:
    statuses = set()

    @examples
    @given(SCHEMA[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "shoal-test"
        response = case.call(base_url=url)
        check(response)
        statuses.add(response.status_code)

    ask()
    if mode is GenerationMode.NEGATIVE:
        assert 400 in statuses
    # And the service is unharmed.
    words: dict[str, Any] = {"prompt": "A shoal"} if path == "/v1/completions" else {"messages": [MESSAGE]}
    answer = httpx.post(f"{url}{path}", json={"model": "shoal-test", "max_tokens": 4, **words})
    assert answer.status_code == 200, answer.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("path", PATHS)
def test_any_value_at_any_key(url: str, path: str) -> None:
    """All other keys are right, so that one wrong value meets the code behind the schema."""
    right = {"prompt": "A shoal"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}

    @examples
    @given(st.sampled_from(sorted(PATHS[path].model_fields)), JSON, st.booleans())
    def ask(key: str, value: Any, stream: bool) -> None:
        body = {"model": "shoal-test", **right, "stream": stream, key: value}
        try:
            request = httpx.Request(
                "POST", url + path, content=json.dumps(body), headers={"Content-Type": "application/json"}
            )
        except UnicodeEncodeError:  # half of a surrogate pair is no body that can be sent
            return
        with httpx.Client(timeout=PATIENCE) as client:
            check(client.send(request))

    ask()


@pytest.mark.parametrize("path", PATHS)
def test_any_bytes(url: str, path: str) -> None:
    @examples
    @given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "a/b; charset=x", ""]))
    def ask(body: bytes, kind: str) -> None:
        response = httpx.post(url + path, content=body, headers={"Content-Type": kind}, timeout=PATIENCE)
        check(response)
        assert response.status_code == 400

    ask()
