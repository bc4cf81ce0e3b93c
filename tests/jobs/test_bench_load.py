"""The load generator: what it measures of a server is what that server did."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from random import Random

import pytest
from bench_server import MIX, TEXT, Server, serving
from hypothesis import given
from hypothesis import strategies as st

from shoal.jobs.bench.load import (
    Answer,
    Limits,
    Prompt,
    Prompts,
    Shape,
    Target,
    Text,
    ask,
    clock,
    closed_loop,
    figures,
    open_loop,
    parse_mix,
    spread,
)
from shoal.jobs.data.tokenizer import train_tokenizer
from shoal.workers.errors import InvalidInput, UsageError

SLACK = 0.5  # seconds that a busy machine may take from one end of a connection to the other


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as own:
        yield own


def one(target: Target, prompt: Prompt) -> Answer:
    async def ask_one() -> Answer:
        async with target.connect() as session:
            return await ask(session, target, prompt, clock())

    return asyncio.run(ask_one())


# One request


def test_times_and_tokens_are_those_that_the_server_served(server: Server) -> None:
    server.first, server.gap, server.piece, server.blank = 0.3, 0.08, 2, True  # ten pieces: longer than SLACK
    answer = one(Target(server.url, "fish", temperature=0.5), Prompt("a b c d e", 20, seed=7))
    (seen,) = server.seen
    assert answer.error == ""
    assert (answer.tokens, answer.chunks, answer.prompt_tokens) == (20, 10, 2)
    served = seen.written[0] - seen.arrived
    assert served >= 0.3
    # it cannot be read before it is written: below, the bounds are exact; above, they are the machine's
    assert answer.sent <= seen.arrived
    assert seen.written[0] <= answer.first <= seen.written[0] + SLACK
    assert served <= answer.ttft <= served + 2 * SLACK
    assert seen.written[-1] <= answer.last <= answer.end <= seen.written[-1] + SLACK
    assert answer.tpot == pytest.approx((seen.written[-1] - seen.written[0]) / 19, abs=SLACK / 19)
    assert answer.seconds == pytest.approx(answer.ttft + 19 * (answer.tpot or 0))
    assert seen.body == {
        "model": "fish", "prompt": "a b c d e", "max_tokens": 20, "seed": 7, "temperature": 0.5, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_where_the_server_does_not_count_its_pieces_are_counted(server: Server) -> None:
    server.usage = False
    answer = one(Target(server.url, "fish"), Prompt("a", 5, 0))
    assert (answer.tokens, answer.chunks, answer.error) == (5, 5, "")


def test_an_answer_of_one_token_has_no_time_a_token(server: Server) -> None:
    answer = one(Target(server.url, "fish"), Prompt("a", 1, 0))
    assert (answer.tokens, answer.tpot, answer.error) == (1, None, "")
    found = figures([answer], answer.sent)
    assert found["tpot_ms"] == {}
    assert found["output_tokens_per_second"] == pytest.approx(1 / (answer.end - answer.sent))


@pytest.mark.parametrize(
    ("fail", "error", "says"),
    [
        (429, "429", "no room"),
        (503, "503", "no room"),
        ("cut", "connection", ""),
        ("error", "broken", "gone"),
        ("json", "broken", ""),
        ("end", "broken", "finish_reason"),
    ],
)
def test_what_goes_wrong_has_a_name(server: Server, fail: int | str, error: str, says: str) -> None:
    server.fail = [fail]
    answer = one(Target(server.url, "fish"), Prompt("a", 4, 0))
    assert answer.error == error
    assert says in answer.said
    assert answer.tokens == 0


def test_a_request_that_takes_too_long_is_given_up(server: Server) -> None:
    server.first = 60.0
    answer = one(Target(server.url, "fish", timeout=0.3), Prompt("a", 4, 0))
    assert answer.error == "timeout"
    assert 0.3 <= answer.end - answer.sent < 30


# Loads


async def _at_once(due: float) -> Answer:
    """An answer that takes no time."""
    now = clock()
    return Answer(due, now, now, now, now, 1, 1, 1)


def test_a_closed_loop_keeps_so_many_requests_in_flight_and_no_more(server: Server) -> None:
    server.first = 0.05
    target = Target(server.url, "fish")

    async def load() -> list[Answer]:
        async with target.connect() as session:
            return await closed_loop(lambda due: ask(session, target, Prompt("a", 2, 0), due), 5, Limits(requests=23))

    answers = asyncio.run(load())
    assert [answer.error for answer in answers] == [""] * 23
    assert server.most == 5
    assert len(server.seen) == 23


def test_a_closed_loop_ends_with_its_time_and_waits_for_what_is_in_flight(server: Server) -> None:
    server.first = 0.1
    target = Target(server.url, "fish")

    async def load() -> tuple[float, list[Answer]]:
        async with target.connect() as session:
            begin = clock()
            ask_one = partial(ask, session, target, Prompt("a", 2, 0))
            return begin, await closed_loop(ask_one, 2, Limits(seconds=1.0))

    begin, answers = asyncio.run(load())
    assert all(not answer.error and answer.sent - begin < 1.0 + SLACK for answer in answers)
    assert max(answer.end for answer in answers) - begin >= 1.0
    assert len(answers) >= 4


def test_clients_of_a_server_that_fails_at_once_do_not_hammer_it(server: Server) -> None:
    server.fail = [503] * 1000
    target = Target(server.url, "fish")

    async def load() -> list[Answer]:
        async with target.connect() as session:
            return await closed_loop(lambda due: ask(session, target, Prompt("a", 2, 0), due), 2, Limits(seconds=0.5))

    answers = asyncio.run(load())
    assert 2 <= len(answers) <= 12


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    def gaps(seed: int) -> list[float]:
        begin = clock()
        answers = asyncio.run(open_loop(_at_once, 2000.0, Limits(requests=1500), Random(seed)))
        due = [answer.due for answer in answers]
        assert all(answer.sent >= answer.due >= begin for answer in answers)
        return [b - a for a, b in pairwise(due)]

    first = gaps(1)
    mean = statistics.fmean(first)
    assert mean == pytest.approx(1 / 2000, rel=0.1)
    assert statistics.stdev(first) == pytest.approx(mean, rel=0.15)  # exponential gaps: as wide as they are long
    short = sum(gap < mean for gap in first) / len(first)
    assert short == pytest.approx(1 - 1 / 2.718281828, abs=0.05)
    assert gaps(1) == pytest.approx(first, abs=1e-6)
    assert gaps(2) != pytest.approx(first, abs=1e-6)


def test_arrivals_do_not_wait_for_answers(server: Server) -> None:
    server.together = 20
    target = Target(server.url, "fish", timeout=60.0)

    async def load() -> list[Answer]:
        async with target.connect() as session:
            send = lambda due: ask(session, target, Prompt("a", 1, 0), due)  # noqa: E731
            return await open_loop(send, 100.0, Limits(requests=20), Random(0))

    answers = asyncio.run(load())
    assert [answer.error for answer in answers] == [""] * 20
    assert server.most == 20


def test_an_open_loop_ends_with_its_time() -> None:
    answers = asyncio.run(open_loop(_at_once, 500.0, Limits(seconds=0.4), Random(0)))
    assert len(answers) == pytest.approx(200, abs=60)
    assert max(a.due for a in answers) - min(a.due for a in answers) <= 0.4


@given(st.lists(st.floats(0, 100), min_size=2, max_size=50))
def test_percentiles_lie_between_the_values(seconds: list[float]) -> None:
    found = spread(seconds)
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    for p in (50, 90, 99):
        assert found[f"p{p}"] == pytest.approx(1e3 * cuts[p - 1], abs=1e-6)
    assert found["mean"] == pytest.approx(1e3 * statistics.fmean(seconds), abs=1e-6)


def test_rates_count_what_was_answered_and_errors_are_counted_by_kind() -> None:
    good = [Answer(0.0, 0.5 * i, 0.5 * i + 2, 0.5 * i + 1, 0.5 * i + 2, 10, 6, 6) for i in range(4)]
    bad = [Answer(0.0, 0.0, 0.1, error=kind) for kind in ("429", "timeout", "429")]
    found = figures([*good, *bad], 0.0)
    assert (found["requests"], found["failed"], found["errors"]) == (7, 3, {"429": 2, "timeout": 1})
    assert found["seconds"] == 3.5
    assert found["output_tokens_per_second"] == pytest.approx(24 / 3.5)
    assert found["requests_per_second"] == pytest.approx(4 / 3.5)
    assert found["ttft_ms"]["p50"] == pytest.approx(1000)
    assert found["tpot_ms"]["p99"] == pytest.approx(200)
    assert found["request_ms"]["mean"] == pytest.approx(2000)
    assert found["late_ms"]["p99"] > 1000


# Prompts


def test_a_mix_is_read_and_its_weights_are_kept() -> None:
    mix = parse_mix("8:4*3, 20:12")
    assert mix == MIX
    prompts = Prompts(Text.of(TEXT), mix, "0")
    drawn = [prompts.next() for _ in range(2000)]
    long = [prompt for prompt in drawn if prompt.output == 12]
    assert len(long) / 2000 == pytest.approx(0.25, abs=0.05)
    assert {len(prompt.text) for prompt in long} == {80}
    assert {len(prompt.text) for prompt in drawn if prompt.output == 4} == {32}
    assert all(prompt.text in TEXT for prompt in drawn)
    assert len({prompt.text for prompt in long}) > 50


@pytest.mark.parametrize("mix", ["", "8", "8:", "8:4*", "0:4", "8:0", "8:4*0", "8:4,", "8:4*-1", "a:b", "8:4:2"])
def test_a_mix_that_is_none_is_refused(mix: str) -> None:
    with pytest.raises(UsageError, match="write it like 128:32"):
        parse_mix(mix)


def test_a_prompt_has_as_many_tokens_as_asked_for() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    starts = [start for start, _ in tokenizer.tokenizer.encode(TEXT, add_special_tokens=False).offsets]
    text = Text.of(TEXT, starts)
    assert text.tokens == len(starts)
    prompts = Prompts(text, [Shape(20, 1)], "0")
    for _ in range(50):
        cut = prompts.next().text
        assert cut in TEXT
        # at its two ends a piece may be read in other tokens than in its place
        assert len(tokenizer.encode([cut])[0]) - 2 == pytest.approx(20, abs=3)


def test_a_text_shorter_than_a_prompt_is_refused() -> None:
    Prompts(Text.of("x" * 80), [Shape(20, 1)], "0").next()
    with pytest.raises(InvalidInput, match=r"prompts of 20 tokens.*has 19.*longer --text"):
        Prompts(Text.of("x" * 76), [Shape(20, 1)], "0")
