"""From prompts to answers: one engine request for each answer, followed together."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.jobs.serve.api import LARGEST_SEED, Asked, PromptDetails, Usage
from shoal.jobs.serve.client import Client
from shoal.jobs.serve.form import Form
from shoal.jobs.serve.intake import Intake
from shoal.jobs.serve.reading import Prompt
from shoal.jobs.serve.text import Piece, TextStream, joined
from shoal.workers.engine.request import Finish, Request, Sampling
from shoal.workers.errors import ClusterRefused


@dataclass(frozen=True)
class Ask:
    """One answer to be had. stop, skip: as TextStream takes them."""

    request: Request
    stop: tuple[str, ...] = ()
    skip: str = ""


@dataclass(frozen=True)
class Call:
    """What a call comes to: the answers to be had (those to one prompt together), and how they are written."""

    asks: tuple[Ask, ...]
    form: Form


def asks(
    name: str,
    prompts: Sequence[Prompt],
    asked: Asked,
    logprobs: int | None,
    stop_tokens: tuple[int, ...],
    stop: Sequence[str],
    skip: str = "",
) -> tuple[Ask, ...]:
    """``n`` answers to each prompt; those to one prompt stand together.

    Answer i to a prompt is drawn with seed + i, so that one prompt's answers differ and each can be had again. A call
    without a seed gets one here, not in an engine: another engine that takes over then goes on with the same tokens.
    """
    seed = secrets.randbelow(LARGEST_SEED) if asked.seed is None else asked.seed
    found: list[Ask] = []
    for prompt in prompts:
        for i in range(asked.n or 1):
            sampling = Sampling(
                max_tokens=prompt.most,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_k=asked.top_k or 0,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                min_p=asked.min_p or 0.0,
                seed=seed + i,
                logprobs=logprobs,
                stop_tokens=stop_tokens,
            )
            found.append(Ask(Request(f"{name}-{len(found)}", prompt.tokens, sampling), tuple(stop), skip))
    return tuple(found)


@dataclass(frozen=True)
class Cost:
    """What an answer took. used: new tokens. cached: prompt tokens that were not computed."""

    used: int
    cached: int


Tell = Callable[[int, Piece, Finish | None], Awaitable[None]]


async def follow(client: Client, tokenizer: CorpusTokenizer, asks: Sequence[Ask], tell: Tell) -> list[Cost]:
    """Have all answers, and tell of each piece as it comes: the answer's index, the piece, its finish with the last.

    While ``tell`` is awaited, nothing more is taken from that answer's engine request. Whatever ends this early
    (cancellation, an error of one of them) cancels all requests. Raises what ``Client.generate`` raises.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_follow(client, tokenizer, ask, i, tell)) for i, ask in enumerate(asks)]
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]


async def _follow(client: Client, tokenizer: CorpusTokenizer, ask: Ask, index: int, tell: Tell) -> Cost:
    text = TextStream(tokenizer, ask.stop, ask.skip)
    cached = 0
    async with aclosing(client.generate(ask.request)) as outputs:
        async for output in outputs:
            cached = max(cached, output.cached)
            piece = text.push(output.tokens)
            if text.stopped and not output.finish and isinstance(client, Intake):
                client.stopped(ask.request.id)
            if output.finish or text.stopped:
                await tell(index, joined((piece, text.end())), Finish.stop if text.stopped else output.finish)
                return Cost(text.used, cached)
            if piece:
                await tell(index, piece, None)
    raise ClusterRefused("the engine gave up the answer, as it does when it shuts down: send the request again")


def usage(asks: Sequence[Ask], costs: Sequence[Cost], n: int) -> Usage:
    """Tokens of a call with ``n`` answers to each prompt."""
    prompts = sum(len(ask.request.prompt) for ask in asks[::n])
    used = sum(cost.used for cost in costs)
    cached = PromptDetails(cached_tokens=sum(cost.cached for cost in costs[::n]))
    return Usage(
        prompt_tokens=prompts, completion_tokens=used, total_tokens=prompts + used, prompt_tokens_details=cached
    )
