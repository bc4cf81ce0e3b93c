"""What an engine keeps of a sequence from step to step: its pages as an array, and the n-grams that it guesses from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.workers.engine.pages import PageList
from shoal.workers.engine.sequence import Ngrams

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@given(st.lists(st.integers(0, 1000)), st.lists(st.none() | st.integers(0, 1000), max_size=50))
def test_a_page_list_is_a_list_and_an_array(first: list[int], changes: list[int | None]) -> None:
    """Appended to, and, for each None, taken from at its beginning."""
    pages, whole, seen = PageList(first), list(first), []
    for page in changes:
        seen.append((list(whole), pages.array))
        if page is not None:
            pages.append(page)
            whole.append(page)
        elif whole:
            assert pages.popleft() == whole.pop(0)
    assert list(pages) == pages.array.tolist() == whole
    assert list(reversed(pages)) == whole[::-1]
    assert [pages[i] for i in range(len(pages))] == whole
    for before, array in seen:  # what a step was given does not change under it
        assert array.tolist() == before


def newest(tokens: list[int], from_: int) -> list[int]:
    """What followed the last earlier time that the end stood there, by looking; not before the token at ``from_``."""
    for size in Ngrams.SIZES:
        for at in range(len(tokens) - 1, max(from_, size) - 1, -1):
            if tokens[at - size : at] == tokens[-size:]:
                return tokens[at : at + 3]
    return []


@given(TOKENS, TOKENS, st.integers(1, 20), st.integers(1, 5))
def test_guesses_follow_the_newest_place_once_the_beginning_is_learned(
    prompt: list[int], answer: list[int], known: int, at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ngrams, "NEWEST", known)
        patch.setattr(Ngrams, "AT_ONCE", at_once)
        tokens = list(prompt)
        ngrams = Ngrams(tokens)
        for token in answer:
            tokens.append(token)
            guess = ngrams.propose(3)
            assert (
                not guess
                or any(  # it has followed the same two tokens somewhere
                    tokens[at - 2 : at] == tokens[-2:] and tokens[at : at + 3] == guess for at in range(2, len(tokens))
                )
            )
        for _ in range(known):
            ngrams.propose(3)
        assert ngrams.propose(3) == newest(tokens, max(1, len(prompt) - known))


def test_a_long_beginning_is_learned_a_little_at_a_time() -> None:
    """Of 50,000 tokens a guess looks at some hundred, and none is forgotten."""
    prompt = list(range(50_000))
    ngrams = Ngrams([*prompt, 47_000, 47_001])
    guesses = [ngrams.propose(2) for _ in range(1 + Ngrams.NEWEST // Ngrams.AT_ONCE)]
    assert guesses[0] == []
    assert guesses[-1] == [47_002, 47_003]
