"""Drawing tokens: as often as they should come, from any logits, and what is told of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.workers.engine.request import Sampling, Token
from shoal.workers.engine.sampling import NO_TOKEN, choose, uniform


def test_logits_that_are_not_numbers_give_no_token() -> None:
    logits = torch.tensor([[1.0, torch.nan, 0.0], [1.0, 2.0, 0.0], [torch.inf, 0.0, 0.0]])
    samplings = [Sampling(1, temperature=t, logprobs=1) for t in (1.0, 0.0, 0.0)]
    assert [token.id for token in choose(logits, samplings, [0, 0, 0])] == [NO_TOKEN, 1, NO_TOKEN]


def _drawn(logits: torch.Tensor, **options: Any) -> Iterator[Token]:
    many = 4000
    samplings = [Sampling(1, seed=seed, **options) for seed in range(many)]
    return iter(choose(logits.expand(many, -1), samplings, [0] * many))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_p": 0.6}, 2),  # 0.4 + 0.3
        ({"min_p": 0.3}, 3),  # of 0.4: 0.12
        ({"top_k": 4, "top_p": 0.7, "min_p": 0.1}, 2),  # 0.4 + 0.3 of 0.95
        ({"temperature": 0.5}, 5),
        ({"top_p": 1e-9}, 1),
    ],
)
def test_tokens_come_as_often_as_they_should(options: dict[str, Any], kept: int) -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    logits = p.log() + 3
    tempered = torch.softmax(p.log() / options.get("temperature", 1.0), -1)
    best = tempered.argsort(descending=True)[:kept]
    want = torch.zeros(5, dtype=torch.float64)
    want[best] = tempered[best] / tempered[best].sum()
    got = torch.zeros(5, dtype=torch.float64)
    for token in _drawn(logits, **options):
        got[token.id] += 1 / 4000
    assert ((got == 0) == (want == 0)).all()
    assert (got - want).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations at most


@given(st.integers(1, 700), st.sampled_from([0.1, 1.0, 20.0]), st.floats(0.01, 100), st.integers(0, 2**32))
@settings(deadline=None)
def test_a_token_is_where_the_running_total_exceeds_the_number(
    vocab: int, spread: float, temperature: float, seed: int
) -> None:
    """Of logits half of which are impossible, the first, the last and whole stretches among them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (3, vocab)).astype(np.float32)
    logits[rng.random((3, vocab)) < 0.5] = -np.inf
    logits[:, : rng.integers(vocab)] = -np.inf
    logits[:, rng.integers(vocab)] = 1.0
    samplings = [Sampling(1, temperature=temperature, seed=seed + i) for i in range(3)]
    tokens = choose(torch.from_numpy(logits), samplings, [4, 5, 6])
    for row, token, sampling, place in zip(logits, tokens, samplings, [4, 5, 6], strict=True):
        total = np.exp((row - row.max()).astype(np.float64) / temperature).cumsum()
        want = np.searchsorted(total, uniform(sampling.seed, place) * total[-1], side="right")
        assert token.id == want


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=9), st.floats(0, 100), st.integers(0, 12)
)
@settings(deadline=None)
def test_any_logits_give_a_token(logits: list[float], temperature: float, top_k: int) -> None:
    sampling = Sampling(1, temperature=temperature, top_k=top_k, top_p=0.9, min_p=0.01, logprobs=3)
    (token,) = choose(torch.tensor([logits]), [sampling], [7])
    assert 0 <= token.id < len(logits)
    if temperature == 0:
        assert logits[token.id] == max(logits)


def test_logprobs_are_those_of_the_model() -> None:
    """Whatever temperature and top_k do to the choice."""
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    (token,) = choose(logits, [Sampling(1, temperature=5.0, top_k=2, seed=3, logprobs=2)], [0])
    exact = torch.log_softmax(logits[0], -1)
    assert token.logprob == pytest.approx(exact[token.id].item())
    assert [i for i, _ in token.top] == [1, 2]
    assert [p for _, p in token.top] == pytest.approx(exact[[1, 2]].tolist())
    (token,) = choose(logits, [Sampling(1, logprobs=None)], [0])
    assert math.isnan(token.logprob) and token.top == ()
