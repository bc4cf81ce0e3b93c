"""What is asked and answered over HTTP: the OpenAI API's completions and chat completions, as far as they go here.

A call means here what it means there, or it is refused. So a key that is not of the API is refused (a misspelt one
would change nothing, silently), and so is a key that this service cannot honour, unless its value would change nothing
(``presence_penalty=0``, ``tools=[]``, or null). ``top_k`` and ``min_p`` are additions.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from shoal.jobs.recipe_errors import plain, quote
from shoal.jobs.serve.refusal import Refusal
from shoal.jobs.serve.text import LONGEST_STOP
from shoal.workers.engine.request import MOST_LOGPROBS

MOST_STOPS = 4
SMALLEST_SEED, LARGEST_SEED = -(2**63), 2**63 - 1

# Keys that may be given as long as they ask for nothing: null, or one of these values.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
# Keys that say something about the caller only: taken, and not used.
_ABOUT_CALLER = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "parallel_tool_calls",
)
# Keys of an answer's message, which comes back as it was given when a conversation goes on.
_NOTHING_SAID: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("refusal", "audio", "function_call", "tool_calls", "annotations", "name"), ([],)
)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character: send whole characters") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Count = Annotated[int, Field(ge=1)]


# A list is refused at its first wrong entry: a body may hold a million of them.
Texts = Annotated[list[Text], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


class _Body(BaseModel):
    """Keys that are not fields are refused, unless they ask for nothing, or are of no use here."""

    # strict: a number in quotes is a mistake, and true is no number.
    model_config = ConfigDict(strict=True, extra="forbid")
    nothing: ClassVar[dict[str, tuple[Any, ...]]] = {}
    unused: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _only_keys_that_mean_something(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        found = {}
        for key, value in body.items():
            if key in cls.model_fields:
                found[key] = value
            elif key in cls.nothing:
                if value is not None and value not in cls.nothing[key]:
                    raise Refusal(f"{key}={quote(value)} cannot be honoured here: leave {key} out", key, "unsupported")
            elif key not in cls.unused:
                near = get_close_matches(key[:99], cls.model_fields, n=1)
                remedy = f"did you mean {near[0]}" if near else "leave it out"
                name = plain(key)
                raise Refusal(f"{name}={quote(value)} is no key here: {remedy}", name, "unknown_parameter")
        return found


class StreamOptions(_Body):
    """include_usage: end the stream with a chunk that has no choices, and the usage."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Asked(_Body):
    """What both calls have in common. null stands for a key's default."""

    nothing = _NOTHING
    unused = _ABOUT_CALLER

    model: Text
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token; default 1")
    top_p: float | None = Field(None, gt=0, le=1, description="keep the likeliest tokens up to this mass; default 1")
    top_k: int | None = Field(None, ge=0, description="keep the k likeliest tokens; default 0: all")
    min_p: float | None = Field(None, ge=0, le=1, description="drop tokens below this share of the likeliest")
    n: int | None = Field(None, ge=1, le=128, description="answers to each prompt; default 1")
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=SMALLEST_SEED, le=LARGEST_SEED, description="the same seed, the same tokens")
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Asked:
        if "" in self.stops():
            raise Refusal("stop='' would end every answer at once: give texts of one character or more", "stop")
        if any(len(stop) > LONGEST_STOP for stop in self.stops()):
            raise Refusal(f"a stop text is longer than {LONGEST_STOP} characters: shorten it", "stop")
        if self.stream_options and not self.stream:
            raise Refusal("stream_options without stream=true means nothing: set stream=true too", "stream_options")
        return self

    def stops(self) -> tuple[str, ...]:
        """The stop strings, none or more."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def most(self) -> int | None:
        """New tokens at most, None where the call leaves it open."""
        return self.max_tokens


class CompletionAsked(Asked):
    """POST /v1/completions. A prompt of text is put after the model's bos; token ids are taken as they are.

    max_tokens: 16 by default, fewer where the context ends. logprobs: how many of the likeliest tokens are shown beside
    each chosen one. echo: the answer begins with the prompt.
    """

    prompt: Text | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def _scores_answers_only(self) -> CompletionAsked:
        if self.echo and self.logprobs is not None:
            raise Refusal(
                "echo with logprobs needs the prompt's, which are not computed: leave one of them out", "echo"
            )
        return self

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each a text or token ids. Raises Refusal for an empty one."""
        prompt = self.prompt
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        prompts: list[Any] = [prompt] if one else list(prompt)
        if not prompts or not all(prompts):
            raise Refusal("prompt is empty: give one character or one token id, or more", "prompt")
        return prompts


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One message of a conversation."""

    nothing = _NOTHING_SAID

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]

    def text(self) -> str:
        """Its content, the parts one after the other."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsked(Asked):
    """POST /v1/chat/completions. max_tokens is max_completion_tokens' older name; by default the context is the end."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _chat_agrees(self) -> ChatAsked:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise Refusal(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ: "
                "they are the same limit, set max_completion_tokens only",
                "max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal("top_logprobs without logprobs=true means nothing: set logprobs", "top_logprobs")
        return self

    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class PromptDetails(BaseModel):
    """cached_tokens: prompt tokens that were not computed, since the cache had them."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a call. A prompt counts once, whatever ``n`` is; the tokens of a stop string count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    """What all answers and chunks begin with. system_fingerprint: the step of the checkpoint that answers."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """One entry a token. text_offset: characters of the answer (without the prompt) before the token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or in a chunk a part of it; finish_reason is null before the last part."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(Answer):
    """An answer to a completion call, or a chunk of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    """A token with the natural logarithm of its probability; -9999 stands for anything below."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    """The answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class Chat(Answer):
    """An answer to a chat call."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatDelta(BaseModel):
    """More of an answer's message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """More of one answer; finish_reason is null before the last part."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Answer):
    """A chunk of an answer to a chat call."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class Model(BaseModel):
    """The served model. context_length: tokens of prompt and answer together. step: of its checkpoint."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["shoal"] = "shoal"
    context_length: int
    parameters: int
    step: int


class Models(BaseModel):
    """All models there are: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """message: one sentence. param: the key it is about. code: a name that programs may look for."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every status from 400 on answers."""

    error: ErrorDetail
