"""Completions: prompts of text or token ids, each continued."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.jobs.recipe_errors import quote
from shoal.jobs.serve.answer import Call, asks, fitted
from shoal.jobs.serve.api import Completion, CompletionAsked, CompletionChoice, CompletionLogprobs, Usage
from shoal.jobs.serve.client import ModelInfo
from shoal.jobs.serve.form import Head, least, new_head, reason
from shoal.jobs.serve.refusal import Refusal
from shoal.jobs.serve.text import Piece, TokenNames
from shoal.workers.engine.request import Finish

DEFAULT_TOKENS = 16


async def completion_call(
    asked: CompletionAsked, info: ModelInfo, tokenizer: CorpusTokenizer, names: TokenNames
) -> Call:
    """Raises Refusal for a prompt that is empty or does not fit, and for ids that are not in the vocabulary."""
    prompts = asked.prompts()
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    # In a thread, since a long text takes long and other calls go on meanwhile.
    encoded = iter(await asyncio.to_thread(tokenizer.encode, texts) if texts else [])
    fits = []
    for prompt in prompts:
        if isinstance(prompt, str):
            tokens = next(encoded)[:-1].tolist()  # bos and the text, without eos: it goes on
        else:
            tokens = _known(prompt, info)
        fits.append(fitted(tokens, asked, DEFAULT_TOKENS, info))
    head, n = new_head("cmpl", info), asked.n or 1
    echoed = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts for _ in range(n)] if asked.echo else []
    form = _CompletionForm(head, names, asked.logprobs is not None, echoed)
    return Call(asks(head.id, fits, asked, asked.logprobs, (tokenizer.eos,), asked.stops()), form)


def _known(prompt: list[int], info: ModelInfo) -> list[int]:
    wrong = next((token for token in prompt if not 0 <= token < info.vocab), None)
    if wrong is not None:
        raise Refusal(f"prompt holds the token id {quote(wrong)}: give ids from 0 to {info.vocab - 1}", "prompt")
    return prompt


class _CompletionForm:
    """echoed: what stands before each answer, where the call asks for it."""

    def __init__(self, head: Head, names: TokenNames, logprobs: bool, echoed: Sequence[str]) -> None:
        self._head, self._names, self._logprobs = head, names, logprobs
        self._before = dict(enumerate(echoed))  # what was not told yet

    def chunks(self, index: int, piece: Piece, finish: Finish | None) -> Sequence[Completion]:
        return [Completion(**self._head.fields(), choices=[self._choice(index, piece, finish)])]

    def last(self, usage: Usage) -> Completion:
        return Completion(**self._head.fields(), choices=[], usage=usage)

    def answer(self, answers: Sequence[tuple[Piece, Finish]], usage: Usage) -> Completion:
        choices = [self._choice(index, piece, finish) for index, (piece, finish) in enumerate(answers)]
        return Completion(**self._head.fields(), choices=choices, usage=usage)

    def _choice(self, index: int, piece: Piece, finish: Finish | None) -> CompletionChoice:
        text = self._before.pop(index, "") + piece.text
        return CompletionChoice(index=index, text=text, logprobs=self._scores(piece), finish_reason=reason(finish))

    def _scores(self, piece: Piece) -> CompletionLogprobs | None:
        if not self._logprobs:
            return None
        name = self._names.text
        return CompletionLogprobs(
            tokens=[name(spot.token.id) for spot in piece.spots],
            token_logprobs=[least(spot.token.logprob) for spot in piece.spots],
            top_logprobs=[{name(token): least(value) for token, value in spot.token.top} for spot in piece.spots],
            text_offset=[spot.offset for spot in piece.spots],
        )
