"""Chat: a conversation written out as text, which the model continues.

The models are base models, trained on text and not on conversations, so the conversation is plain text too:

    system: You answer in one sentence.
    user: What is a shoal?
    assistant:

Each message is a line (or more, where its text has several), a developer's message is a system's, and the answer is
what the model writes after the last colon, without the space before it, up to a line that begins with ``user:``.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.jobs.serve.answer import Call, asks
from shoal.jobs.serve.api import (
    Chat,
    ChatAsked,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from shoal.jobs.serve.client import ModelInfo
from shoal.jobs.serve.form import Head, least, new_head, reason
from shoal.jobs.serve.reading import Read
from shoal.jobs.serve.text import Piece, TokenNames
from shoal.workers.engine.request import Finish

NEXT_TURN = "\nuser:"


def chat_call(read: Read, info: ModelInfo, eos: int, names: TokenNames) -> Call:
    """What a call for the next message of a conversation comes to."""
    asked = read.asked
    assert isinstance(asked, ChatAsked)
    head, logprobs = new_head("chatcmpl", info), (asked.top_logprobs or 0) if asked.logprobs else None
    wanted = asks(head.id, read.prompts, asked, logprobs, (eos,), (*asked.stops(), NEXT_TURN), skip=" ")
    return Call(wanted, _ChatForm(head, names, logprobs is not None))


class _ChatForm:
    def __init__(self, head: Head, names: TokenNames, logprobs: bool) -> None:
        self._head, self._names, self._logprobs = head, names, logprobs
        self._begun: set[int] = set()

    def chunks(self, index: int, piece: Piece, finish: Finish | None) -> Sequence[ChatChunk]:
        """The role first, then text, then the reason of the end: each a chunk, as programs expect them."""
        found = []
        if index not in self._begun:
            self._begun.add(index)
            found.append(self._chunk(index, ChatDelta(role="assistant", content="")))
        if piece:
            found.append(self._chunk(index, ChatDelta(content=piece.text), self._scores(piece)))
        if finish:
            found.append(self._chunk(index, ChatDelta(), finish=finish))
        return found

    def last(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self._head.fields(), choices=[], usage=usage)

    def answer(self, answers: Sequence[tuple[Piece, Finish]], usage: Usage) -> Chat:
        choices = []
        for index, (piece, finish) in enumerate(answers):
            why, message = reason(finish) or "stop", ChatMessage(content=piece.text)
            choices.append(ChatChoice(index=index, message=message, logprobs=self._scores(piece), finish_reason=why))
        return Chat(**self._head.fields(), choices=choices, usage=usage)

    def _chunk(
        self, index: int, delta: ChatDelta, scores: ChatLogprobs | None = None, finish: Finish | None = None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=scores, finish_reason=reason(finish))
        return ChatChunk(**self._head.fields(), choices=[choice])

    def _scores(self, piece: Piece) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        content = []
        for token in (spot.token for spot in piece.spots):
            top = [self._score(other, value) for other, value in token.top]
            content.append(TokenLogprob(**dict(self._score(token.id, token.logprob)), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _score(self, token: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=self._names.text(token), logprob=least(logprob), bytes=list(self._names.raw(token)))
