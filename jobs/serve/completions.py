"""Completions: prompts of text or token ids, each continued."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.jobs.serve.answer import Call, asks
from shoal.jobs.serve.api import Completion, CompletionAsked, CompletionChoice, CompletionLogprobs, Usage
from shoal.jobs.serve.client import ModelInfo
from shoal.jobs.serve.form import Head, least, new_head, reason
from shoal.jobs.serve.reading import Read
from shoal.jobs.serve.text import Piece, TokenNames
from shoal.workers.engine.request import Finish


def completion_call(read: Read, info: ModelInfo, eos: int, names: TokenNames) -> Call:
    """What a call for completions comes to."""
    asked = read.asked
    assert isinstance(asked, CompletionAsked)
    head = new_head("cmpl", info)
    form = _CompletionForm(head, names, asked.logprobs is not None, read.echoed)
    return Call(asks(head.id, read.prompts, asked, asked.logprobs, (eos,), asked.stops()), form)


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
