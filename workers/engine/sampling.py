"""Choosing tokens: each from one uniform number that its request's seed and its place in the answer decide.

So a token does not depend on what else is in the batch, and a request that is computed again gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from shoal.workers.engine.request import Sampling, Token

NO_TOKEN = -1  # where the logits are not numbers
ROWS = 64  # rows whose probabilities, float64, exist at one time
BLOCK = 128  # tokens whose weights are summed before a token is looked for among them
_MASK = (1 << 64) - 1


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) for the token at ``place`` of an answer: two rounds of SplitMix64's mixing function."""
    x = seed & _MASK
    for step in (0x9E3779B97F4A7C15, (place + 1) * 0xD1B54A32D192ED03):
        x = (x + step) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) / (1 << 53)


def choose(logits: Tensor, samplings: Sequence[Sampling], places: Sequence[int]) -> list[Token]:
    """A token for each row of ``logits [N, V]``, as that row's sampling says. places: its place in the answer.

    A row that holds a NaN or +inf gives ``NO_TOKEN``. The host waits once, for all rows; again for
    log-probabilities, where a row asks for them.
    """
    best, ids = logits.max(-1)  # NaN, where there is one
    for draw, drawn in ((_draw_any, _rows(samplings, cut=False)), (_draw_likely, _rows(samplings, cut=True))):
        for rows in (drawn[start : start + ROWS] for start in range(0, len(drawn), ROWS)):
            draws = Draws.of([samplings[i] for i in rows], [places[i] for i in rows], logits)
            index = to_device(torch.tensor(rows), logits.device)
            ids = ids.index_copy(0, index, draw(_wide(logits.index_select(0, index)), draws))
    return _with_logprobs(logits, ids.masked_fill(~torch.isfinite(best), NO_TOKEN), samplings)


@dataclass(frozen=True)
class Draws:
    """How rows of logits are drawn from: columns ``[n, 1]`` float64 on their device. number: uniform in [0, 1)."""

    number: Tensor
    temperature: Tensor
    top_k: Tensor
    min_p: Tensor
    top_p: Tensor

    @staticmethod
    def of(samplings: Sequence[Sampling], places: Sequence[int], logits: Tensor) -> Draws:
        """All columns in one copy, which nothing waits for."""
        vocab = logits.shape[-1]
        rows = [
            (uniform(s.seed, place), s.temperature, s.top_k or vocab, s.min_p, s.top_p)
            for s, place in zip(samplings, places, strict=True)
        ]
        return Draws(*to_device(torch.tensor(rows, dtype=torch.float64), logits.device).split(1, dim=1))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, which the host does not wait for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _rows(samplings: Sequence[Sampling], cut: bool) -> list[int]:
    """Rows that are drawn from all tokens, or, with ``cut``, from the likely ones, which takes a sort."""
    drawn = ((i, s) for i, s in enumerate(samplings) if s.temperature > 0)
    return [i for i, s in drawn if cut == (s.top_k > 0 or s.top_p < 1 or s.min_p > 0)]


def _wide(logits: Tensor) -> Tensor:
    """Logits as at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _weights(logits: Tensor, temperature: Tensor, out: Tensor | None = None) -> Tensor:
    """What probabilities at each row's temperature are in proportion to: float64, 1 for the likeliest token."""
    gap = logits - logits.amax(-1, keepdim=True)  # at most 0: no temperature makes infinities of it
    return torch.div(gap, temperature, out=out).exp_()


def _found(total: Tensor, target: Tensor) -> Tensor:
    """Where running totals ``[n, m]`` first exceed ``[n, 1]``: never behind the last that grows, whatever rounding."""
    at = torch.searchsorted(total, target.contiguous(), right=True)
    last = torch.searchsorted(total, total[:, -1:].contiguous())
    return torch.minimum(at, last).clamp(max=total.shape[-1] - 1)  # of totals that are not numbers too


def _draw_any(logits: Tensor, draws: Draws) -> Tensor:
    """Inverse-transform sampling over all tokens in the order of their ids: first among blocks of them, then among the
    tokens of a block, since PyTorch has one multiprocessor compute the running totals of a row."""
    n, vocab = logits.shape
    weights = logits.new_empty(n, -(-vocab // BLOCK), BLOCK, dtype=torch.float64)
    flat = weights.view(n, -1)
    _weights(logits, draws.temperature, flat[:, :vocab])
    flat[:, vocab:] = 0
    ends = weights.sum(-1).cumsum(-1)
    target = draws.number * ends[:, -1:]
    block = _found(ends, target)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0)
    inside = weights.gather(1, block[..., None].expand(n, 1, BLOCK))[:, 0].cumsum(-1)
    return (block * BLOCK + _found(inside, target - before))[:, 0]


def _draw_likely(logits: Tensor, draws: Draws) -> Tensor:
    """Inverse-transform sampling among the likely tokens; of equally likely ones the lower ids are kept."""
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    p = _weights(ordered, draws.temperature)
    place = torch.arange(p.shape[-1], device=p.device)
    kept = place < draws.top_k
    kept &= p >= draws.min_p * p[:, :1]
    # top_p counts the mass of what the other two leave
    p = p * kept
    total = p.cumsum(-1)
    kept &= total - p < draws.top_p * total[:, -1:]
    kept[:, 0] = True
    # Drawn in the order of ids, as without a cut: rounding may swap the places of two that are equally likely.
    total = torch.zeros_like(p).scatter_(-1, ids, p * kept).cumsum(-1)
    return _found(total, draws.number * total[:, -1:])[:, 0]


def _with_logprobs(logits: Tensor, ids: Tensor, samplings: Sequence[Sampling]) -> list[Token]:
    tokens = [Token(i) for i in ids.tolist()]  # waits for all that was computed
    asked = [i for i, s in enumerate(samplings) if s.logprobs is not None]
    for some in (asked[start : start + ROWS] for start in range(0, len(asked), ROWS)):
        rows = to_device(torch.tensor(some), logits.device)
        logprobs = torch.log_softmax(_wide(logits[rows]), -1)
        most = min(logits.shape[-1], max(samplings[i].logprobs or 0 for i in some))
        best, which = (x.tolist() for x in logprobs.topk(most, dim=-1))
        own = logprobs.gather(-1, ids[rows][:, None].clamp(min=0))[:, 0].tolist()
        for row, i in enumerate(some):
            count = samplings[i].logprobs or 0
            tokens[i] = Token(tokens[i].id, own[row], tuple(zip(which[row][:count], best[row][:count], strict=True)))
    return tokens


def accepted(guesses: Sequence[int], tokens: Sequence[Token]) -> int:
    """How many guesses came true: ``tokens`` are what was chosen after the last token and after each guess."""
    return next(
        (n for n, (guess, token) in enumerate(zip(guesses, tokens, strict=False)) if guess != token.id), len(guesses)
    )


def spans(sizes: Sequence[int]) -> list[slice]:
    """Slices of consecutive runs of these sizes."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return [slice(a, b) for a, b in pairwise(ends)]
