"""How answers are written, whichever call asked for them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

from pydantic import BaseModel

from shoal.jobs.serve.api import FinishReason, Usage
from shoal.jobs.serve.client import ModelInfo
from shoal.jobs.serve.text import Piece
from shoal.workers.engine.request import Finish

_LEAST = -9999.0  # the API's value for "unlikely beyond telling"; JSON has no infinity


class Form(Protocol):
    """Answers written as completions, or as chat."""

    def chunks(self, index: int, piece: Piece, finish: Finish | None) -> Sequence[BaseModel]:
        """More of answer ``index``, for a stream. It is called in the order of the pieces."""
        ...

    def last(self, usage: Usage) -> BaseModel:
        """The chunk with the usage that ends a stream."""
        ...

    def answer(self, answers: Sequence[tuple[Piece, Finish]], usage: Usage) -> BaseModel:
        """All answers complete, for a call without a stream."""
        ...


class Fields(TypedDict):
    """What every answer and chunk of a call begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(frozen=True)
class Head:
    """A call's name (unique) and time, and the model that answers it."""

    id: str
    created: int
    info: ModelInfo

    def fields(self) -> Fields:
        return {
            "id": self.id,
            "created": self.created,
            "model": self.info.name,
            "system_fingerprint": f"step-{self.info.step}",
        }


def new_head(prefix: str, info: ModelInfo) -> Head:
    """A head with a name of its own that begins with ``prefix``."""
    return Head(f"{prefix}-{secrets.token_hex(16)}", int(time.time()), info)


def least(logprob: float) -> float:
    """A logarithm of a probability as JSON can hold it."""
    return max(logprob, _LEAST)


def reason(finish: Finish | None) -> FinishReason | None:
    """An ending in the API's words."""
    return None if finish is None else ("stop" if finish is Finish.stop else "length")
