"""The tokenizer of a corpus: an existing ``tokenizer.json``, or byte-level BPE trained on the corpus itself."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from shoal.workers.data.manifest import Tokens
from shoal.workers.errors import InvalidInput, NotFound

BOS, EOS = "<|bos|>", "<|eos|>"
# Names that published tokenizers give to the two, the first that is found is taken. DeepSeek's bars are U+FF5C.
BOS_NAMES = (
    BOS,
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<\uff5cbegin▁of▁sentence\uff5c>",
    "<|startoftext|>",
    "[BOS]",
    "[CLS]",
)
EOS_NAMES = (
    EOS,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<\uff5cend▁of▁sentence\uff5c>",
    "<|endoftext|>",
    "[EOS]",
    "[SEP]",
)
SETTINGS = "tokenizer_config.json"  # of Hugging Face, beside tokenizer.json
SMALLEST = 256 + 2  # every byte, bos and eos


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer with its bos and eos. ``size`` is the largest id plus one; ``added`` names tokens it had not."""

    tokenizer: Tokenizer
    bos: int
    eos: int
    added: tuple[str, ...] = ()

    @cached_property
    def size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest type that holds every id."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: the library's own pickling forgets that special tokens in a text are plain text."""
        return _revived, (self.tokenizer.to_str(), self.bos, self.eos, self.added)

    def name(self, token: int) -> str:
        """The token of an id of the vocabulary."""
        name = self.tokenizer.id_to_token(token)
        if name is None:
            raise ValueError(f"{token} is not in the vocabulary")
        return name

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Each text as bos, its tokens, eos: ``[tokens]`` uint16 or uint32. Special tokens in a text are plain text."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        dtype = self.dtype
        return [np.array([self.bos, *encoding.ids, self.eos], dtype) for encoding in encodings]

    def prompt(self, text: str) -> list[int]:
        """A text as a model continues it: bos and its tokens, without eos."""
        tokens: list[int] = self.encode([text])[0][:-1].tolist()
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, without their bos and eos."""
        ends = (self.bos, self.eos)
        return self.tokenizer.decode([int(t) for t in tokens if t not in ends], skip_special_tokens=False)


def load_tokenizer(path: Path, ends: tuple[str, str] | None = None) -> CorpusTokenizer:
    """Read a ``tokenizer.json``. ends: its bos and eos; None: what ``tokenizer_config.json`` beside it says, else they
    are found by their common names, and added where it has none.

    Raises NotFound when there is no such file, InvalidInput when it is not a tokenizer.
    """
    if not path.is_file():
        raise NotFound(f"{path} does not exist: give an existing tokenizer.json, or none to train one")
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception
        why = str(error).splitlines()[0]
        raise InvalidInput(f"{path} is not a tokenizer.json ({why}): give one that tokenizers wrote") from None
    known = ((ends[0],), (ends[1],)) if ends else _said_beside(path)
    bos, eos = ((*first, *names) for first, names in zip(known, (BOS_NAMES, EOS_NAMES), strict=True))
    added = tuple(names[0] for names in (bos, eos) if all(tokenizer.token_to_id(name) is None for name in names))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    return _ready(tokenizer, added, bos, eos)


def settings_of(path: Path) -> bytes | None:
    """The ``tokenizer_config.json`` beside a ``tokenizer.json``, None where there is none that can be read.

    It goes wherever its tokenizer goes: without it, another program may take other tokens for bos and eos.
    """
    try:
        return (path.parent / SETTINGS).read_bytes()
    except OSError:
        return None


def _said_beside(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of bos and of eos in the ``tokenizer_config.json`` beside a file, none or one of each."""
    try:
        said = json.loads(settings_of(path) or b"{}")
    except ValueError:
        said = {}
    found = (said.get(key) if isinstance(said, dict) else None for key in ("bos_token", "eos_token"))
    names = (each.get("content") if isinstance(each, dict) else each for each in found)
    bos, eos = ((name,) if isinstance(name, str) and name else () for name in names)
    return bos, eos


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> CorpusTokenizer:
    """Train byte-level BPE with ids 0 and 1 for bos and eos. The same texts give the same file, bit by bit."""
    if vocabulary < SMALLEST:
        raise InvalidInput(f"--vocab {vocabulary} does not hold 256 bytes, bos and eos: set it to {SMALLEST} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _ready(tokenizer, ())


def _revived(text: str, bos: int, eos: int, added: tuple[str, ...]) -> CorpusTokenizer:
    tokenizer = Tokenizer.from_str(text)
    _as_we_use_it(tokenizer)
    return CorpusTokenizer(tokenizer, bos, eos, added)


def _as_we_use_it(tokenizer: Tokenizer) -> None:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that spells out a special token is still a text


def _ready(
    tokenizer: Tokenizer, added: tuple[str, ...], bos: Sequence[str] = BOS_NAMES, eos: Sequence[str] = EOS_NAMES
) -> CorpusTokenizer:
    _as_we_use_it(tokenizer)
    return CorpusTokenizer(tokenizer, _first(tokenizer, bos), _first(tokenizer, eos), added)


def _first(tokenizer: Tokenizer, names: Sequence[str]) -> int:
    return next(index for name in names if (index := tokenizer.token_to_id(name)) is not None)


class Sample:
    """The texts with the smallest hashes, about ``limit`` bytes of them: a fair sample that no order changes.

    A long text counts, and is kept, with its first 1/16 of ``limit`` only, so that none fills the sample alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._heap: list[tuple[int, str]] = []  # largest hash first
        self._keys: set[int] = set()
        self._bytes = 0

    def add(self, text: str, digest: bytes) -> None:
        """Offer a text with its SHA-256; a text that is in the sample already is not taken twice."""
        key = -int.from_bytes(digest)
        if key in self._keys:
            return
        text = text[: max(1, self.limit // 16)]
        heapq.heappush(self._heap, (key, text))
        self._keys.add(key)
        self._bytes += len(text)
        while self._bytes - len(self._heap[0][1]) >= self.limit:
            dropped, last = heapq.heappop(self._heap)
            self._keys.remove(dropped)
            self._bytes -= len(last)

    def texts(self) -> list[str]:
        """The sample in the order of the hashes."""
        return [text for _, text in sorted(self._heap, reverse=True)]
