"""Chat: a conversation written out as text, which the model continues.

The models are base models, trained on text and not on conversations, so the conversation is plain text too:

    system: You answer in one sentence.
    user: What is a shoal?
    assistant:

Each message is a line (or more, where its text has several), a developer's message is a system's, and the answer is
what the model writes after the last colon, without the space before it, up to a line that begins with ``user:``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.jobs.serve.answer import Call, asks, fitted
from shoal.jobs.serve.api import (
    Chat,
    ChatAsked,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Message,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from shoal.jobs.serve.client import ModelInfo
from shoal.jobs.serve.form import Head, least, new_head, reason
from shoal.jobs.serve.text import Piece, TokenNames
from shoal.workers.engine.request import Finish

NEXT_TURN = "\nuser:"


def conversation(messages: Sequence[Message]) -> str:
    """The prompt of a conversation."""
    roles = {"developer": "system"}
    lines = [f"{roles.get(message.role, message.role)}: {message.text()}" for message in messages]
    return "\n".join([*lines, "assistant:"])


async def chat_call(asked: ChatAsked, info: ModelInfo, tokenizer: CorpusTokenizer, names: TokenNames) -> Call:
    """Raises Refusal for a conversation that does not fit."""
    [encoded] = await asyncio.to_thread(tokenizer.encode, [conversation(asked.messages)])
    prompt = fitted(encoded[:-1].tolist(), asked, info.context, info)
    head, logprobs = new_head("chatcmpl", info), (asked.top_logprobs or 0) if asked.logprobs else None
    stop = (*asked.stops(), NEXT_TURN)
    wanted = asks(head.id, [prompt], asked, logprobs, (tokenizer.eos,), stop, skip=" ")
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
