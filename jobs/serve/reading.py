"""From the body of a call to prompts of token ids: parsed, checked, encoded. Plain functions, for any process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.jobs.recipe_errors import quote
from shoal.jobs.serve.api import Asked, ChatAsked, CompletionAsked, Message
from shoal.jobs.serve.client import ModelInfo
from shoal.jobs.serve.refusal import Refusal
from shoal.workers.errors import NotFound

DEFAULT_TOKENS = 16  # new tokens of a completion that does not say
Kind = Literal["completions", "chat"]

# Characters a token of context whose tokens are counted before a longer text is encoded: no text is read much further
# than the context reaches. Tokens at the cut may be other ones than in the whole.
COUNTED, AT_THE_CUT = 8, 16


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and new tokens at most."""

    tokens: tuple[int, ...]
    most: int


@dataclass(frozen=True)
class Read:
    """A call that can be answered. asked: without its prompts or messages, which are in ``prompts``. echoed: the text
    to begin each of its answers with, none unless it asks for that."""

    asked: Asked
    prompts: tuple[Prompt, ...]
    echoed: tuple[str, ...] = ()


class Reader:
    """Reads calls to one model. most_answers: of a call."""

    def __init__(self, info: ModelInfo, tokenizer: CorpusTokenizer, most_answers: int) -> None:
        self.info, self.tokenizer, self.most_answers = info, tokenizer, most_answers

    def body(self, kind: Kind, body: bytes) -> Read:
        """A call's JSON. Raises what FastAPI raises for a body, and Refusal and NotFound as the others here do."""
        try:
            value = json.loads(body)
        except json.JSONDecodeError as error:
            at = {"type": "json_invalid", "loc": ("body", error.pos), "input": {}, "ctx": {"error": error.msg}}
            raise RequestValidationError([at]) from None
        except Exception:  # no UTF-8, or nested too deeply
            raise HTTPException(400, "There was an error parsing the body") from None
        model: type[CompletionAsked | ChatAsked] = CompletionAsked if kind == "completions" else ChatAsked
        try:
            asked = model.model_validate(value, from_attributes=True)  # as FastAPI does: the same sentences
        except ValidationError as error:
            details = error.errors(include_url=False)
            raise RequestValidationError([{**detail, "loc": ("body", *detail["loc"])} for detail in details]) from None
        return self.completions(asked) if isinstance(asked, CompletionAsked) else self.chat(asked)

    def completions(self, asked: CompletionAsked) -> Read:
        """Raises Refusal for prompts that are empty, do not fit, or hold ids that are not in the vocabulary."""
        prompts = asked.prompts()
        self.check(asked, len(prompts))
        found = [self._encoded(p) if isinstance(p, str) else self._known(p, asked) for p in prompts]
        fits = tuple(fitted(tokens, asked, DEFAULT_TOKENS, self.info) for tokens in found)
        echoed: list[str] = []
        if asked.echo:
            texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts]
            echoed = [text for text in texts for _ in range(asked.n or 1)]
        return Read(asked.model_copy(update={"prompt": ""}), fits, tuple(echoed))

    def chat(self, asked: ChatAsked) -> Read:
        """Raises Refusal for a conversation that does not fit."""
        self.check(asked, 1)
        prompt = fitted(self._encoded(conversation(asked.messages)), asked, self.info.context, self.info)
        return Read(asked.model_copy(update={"messages": []}), (prompt,))

    def check(self, asked: Asked, prompts: int) -> None:
        """Raises NotFound for another model, Refusal for too many answers."""
        check_model(asked.model, self.info)
        n = asked.n or 1
        if n * prompts > self.most_answers:
            raise Refusal(
                f"n={n} answers to each of {prompts} prompts are {n * prompts}, and a call may ask for "
                f"{self.most_answers}: make several calls",
                "n",
            )

    def _encoded(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text, self.info.context)

    def _known(self, prompt: list[int], asked: Asked) -> list[int]:
        fitted(prompt, asked, DEFAULT_TOKENS, self.info)  # before millions of ids are looked at
        wrong = next((token for token in prompt if not 0 <= token < self.info.vocab), None)
        if wrong is not None:
            raise Refusal(
                f"prompt holds the token id {quote(wrong)}: give ids from 0 to {self.info.vocab - 1}", "prompt"
            )
        return prompt


def check_model(name: str, info: ModelInfo) -> None:
    """Raises NotFound for another model than the one served."""
    if name != info.name:
        raise NotFound(f"the model {quote(name)} is not served here: ask for {info.name!r}")


def conversation(messages: Sequence[Message]) -> str:
    """The prompt of a conversation: see ``jobs/serve/chat.py``."""
    roles = {"developer": "system"}
    lines = [f"{roles.get(message.role, message.role)}: {message.text()}" for message in messages]
    return "\n".join([*lines, "assistant:"])


def encode_prompt(tokenizer: CorpusTokenizer, text: str, context: int) -> list[int]:
    """bos and the text's tokens, without eos: it goes on.

    Raises Refusal for a text whose beginning alone has more tokens than the context, before the rest is encoded.
    """
    size = COUNTED * max(context, 1)
    while size < len(text):
        count = len(tokenizer.prompt(text[:size]))
        if count > context + AT_THE_CUT:
            raise too_long(f"more than {context}", context)
        size *= 4
    return tokenizer.prompt(text)


def fitted(tokens: Sequence[int], asked: Asked, default: int, info: ModelInfo) -> Prompt:
    """A prompt with its room in the context: ``default`` new tokens, or what is left, where the call says nothing.

    Raises Refusal when it does not fit.
    """
    room, most = info.context - len(tokens), asked.most()
    if room < 1:
        raise too_long(str(len(tokens)), info.context)
    if most is not None and most > room:
        raise Refusal(
            f"the prompt has {len(tokens)} tokens and max_tokens is {most}, together {len(tokens) + most}, and the "
            f"model's context is {info.context}: set max_tokens to {room} or less, or shorten the prompt",
            "max_tokens",
            code="context_length_exceeded",
        )
    return Prompt(tuple(tokens), min(default, room) if most is None else most)


def too_long(count: str, context: int) -> Refusal:
    """What is said of a prompt of ``count`` tokens."""
    return Refusal(
        f"the prompt has {count} tokens and the model's context is {context}, with the answer: "
        f"shorten the prompt to {context - 1} tokens or fewer",
        code="context_length_exceeded",
    )
