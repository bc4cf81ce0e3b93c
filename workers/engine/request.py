"""What an engine is asked and what it answers: plain data, without torch, so that any process may hold it.

What a step makes for each of its sequences is a named tuple: a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from shoal.workers.errors import ClusterRefused, InvalidInput

MOST_LOGPROBS = 20
MOST_STOPS = 64
NOT_FINITE = "the model computed numbers that are not finite: its weights or its precision are at fault"


class Busy(ClusterRefused):
    """The queue is full: the same request may be taken a little later."""


class EngineEnded(RuntimeError):
    """The engine does not run any more, by an error or because it was stopped."""


class Finish(StrEnum):
    """Why a request ended. error: the model's numbers were not finite."""

    stop = "stop"
    length = "length"
    error = "error"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    max_tokens: new tokens at most. temperature: 0 takes the likeliest token. top_k: keep the k likeliest tokens, 0 all.
    top_p: keep the likeliest tokens up to this mass. min_p: drop tokens less likely than this share of the likeliest.
    seed: the same seed gives the same tokens, whatever else is in the batch. logprobs: None for none, else how many of
    the likeliest tokens are reported beside the chosen one. stop_tokens: ids that end the text; they are not reported.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises InvalidInput with a sentence that names the key, the value and the remedy."""
        checks = (
            ("max_tokens", self.max_tokens, 1 <= self.max_tokens < 2**31, "1 or more, below 2^31"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "a number from 0 to 100"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (all tokens) or more, below 2^31"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("seed", self.seed, -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("stop_tokens", len(self.stop_tokens), len(self.stop_tokens) <= MOST_STOPS, f"{MOST_STOPS} ids at most"),
            ("logprobs", self.logprobs, 0 <= (self.logprobs or 0) <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
        )
        for name, value, fits, remedy in checks:
            if not fits:  # NaN fits nowhere
                raise InvalidInput(f"{name}={value} is out of range: set it to {remedy}")


@dataclass(frozen=True)
class Request:
    """A prompt of token ids (at least one), and what to do with it.

    id: unique among the requests in flight. generated: tokens of this request that were reported already, by an engine
    that is gone; they are computed again, not reported again, and count towards ``max_tokens``.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    generated: tuple[int, ...] = ()


class Token(NamedTuple):
    """A chosen token. logprob: natural logarithm of its probability under the model (temperature 1, nothing dropped),
    NaN unless asked for. top: the likeliest tokens with theirs, likeliest first."""

    id: int
    logprob: float = float("nan")
    top: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """News of a request: new tokens, in order; ``finish`` with the last of them. cached: tokens of the prompt that were
    not computed, because the prefix cache had them when it began; told with the first news."""

    request: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    cached: int = 0


@dataclass(frozen=True)
class Load:
    """How busy an engine is, now and since it started (totals).

    Of several ranks together: rebalances: how often copies of experts moved. rank_load: what the busiest rank with
    experts had to do of late, as a multiple of a fair share, the mean of all layers; 0 where that is not known.
    """

    waiting: int = 0
    running: int = 0
    capacity: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    steps_total: int = 0
    step_seconds_total: float = 0.0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    proposed_tokens_total: int = 0
    accepted_tokens_total: int = 0
    rebalances_total: int = 0
    rank_load: float = 0.0
    expert_tokens: tuple[tuple[int, ...], ...] = field(default=())


class Shape(NamedTuple):
    """Of a decode step, or what one needs at least. rows: tokens, 0 for none. pages: far pages that a row may have.
    compress: whether compressed rows may end."""

    rows: int = 0
    pages: int = 0
    compress: bool = False


UNSHAPED = Shape(1 << 30)
"""What a step needs that fits into no shape."""


@dataclass(frozen=True)
class Turn:
    """What a rank brings to the next step; or what all ranks do together.

    requests: under way. stop: whether to end instead. shape: what a step of fixed shape needs. moves: whether experts
    of a layer move before the step, which all ranks must have been told.
    """

    requests: int = 0
    stop: bool = False
    shape: Shape = Shape()  # noqa: RUF009
    moves: bool = False

    @classmethod
    def together(cls, turns: Sequence[Sequence[int]]) -> Turn:
        """Of all ranks, each as :meth:`numbers` has it: all requests, and what the largest shape needs."""
        requests, stops, moves, rows, pages, compress = zip(*turns, strict=True)
        return cls(sum(requests), any(stops), Shape(max(rows), max(pages), any(compress)), all(moves))

    def numbers(self) -> tuple[int, ...]:
        """To be told to other ranks."""
        return (self.requests, self.stop, self.moves, *self.shape)


@dataclass(frozen=True)
class Limits:
    """What an engine takes on. All counts are tokens unless said otherwise.

    sequences: requests computed together. step: tokens of one step, over all of them; a longer prompt is computed in
    chunks. waiting: requests in the queue; more are refused. pages: cache pages of l' tokens at most; 0 for as many as
    all sequences need at full context. speculate: n-gram guesses a sequence and step; 0 for none. graphs: decode steps
    in CUDA graphs, where that can be.
    """

    sequences: int = 32
    step: int = 512
    waiting: int = 256
    pages: int = 0
    speculate: int = 0
    prefix_cache: bool = True
    graphs: bool = True
