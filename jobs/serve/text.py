"""Tokens in, text out, a piece at a time: whole characters only, and never a stop string or what may become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.workers.engine.request import Token

UNKNOWN = "\ufffd"  # what bytes that are no UTF-8 decode to
_UNSURE = 3  # bytes, at most, of a character that is not complete
_SHORT, _LONG = 8, 64  # tokens after which the window moves on: between characters, and in any case

LONGEST_STOP = 256  # characters of a stop string


class Decoder:
    """The text of tokens, as they come: a character as soon as it is complete.

    Bytes that are no character (U+FFFD) come with what follows them, or after a while. All pieces together are the
    tokenizer's own text of all tokens; only a leading space stays, which some tokenizers drop, since these tokens
    follow a prompt. Tokens without text (bos, eos, ids that have no name) are passed over.
    """

    def __init__(self, tokenizer: CorpusTokenizer) -> None:
        self._tokenizer = tokenizer
        # The text of a token may depend on those before it, so a few are decoded again with every new one.
        self._context = _letter(tokenizer)
        self._fresh: list[int] = []
        self._given = len(tokenizer.decode(self._context))  # characters of the window's text

    def push(self, token: int) -> str:
        """The text that ``token`` completes."""
        if token in (self._tokenizer.bos, self._tokenizer.eos) or self._tokenizer.tokenizer.id_to_token(token) is None:
            return ""
        self._fresh.append(token)
        text = self._text()
        broken = len(text) - len(text.rstrip(UNKNOWN))  # characters at the end that the next token may change
        if len(self._fresh) >= _LONG:
            broken = min(broken, _UNSURE)  # no text is that long in coming: these bytes never were any
        given, self._given = self._given, max(self._given, len(text) - broken)
        piece = text[given : self._given]
        if len(self._fresh) >= (_LONG if broken else _SHORT):
            unsure = len(text) - self._given
            self._context, self._fresh = self._fresh, []
            self._given = max(0, len(self._text()) - unsure)
        return piece

    def end(self) -> str:
        """What is left when no token follows: characters that stayed incomplete."""
        text = self._text()
        given, self._given = self._given, len(text)
        return text[given:]

    def _text(self) -> str:
        return self._tokenizer.decode(self._context + self._fresh)


def _letter(tokenizer: CorpusTokenizer) -> list[int]:
    return [int(token) for token in tokenizer.encode(["a"])[0][1:-1]]


class _Matcher:
    """How much of one stop string the end of a text is (Knuth, Morris and Pratt)."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._shorter = [0]  # of each beginning: its longest end, other than itself, that is a beginning too
        for char in string[1:]:
            self._shorter.append(self._next(self._shorter[-1], char))

    def step(self, char: str) -> None:
        self.matched = self._next(self.matched, char)

    def _next(self, matched: int, char: str) -> int:
        while matched and char != self.string[matched]:
            matched = self._shorter[matched - 1]
        return matched + (char == self.string[matched])


class StopStrings:
    """Holds back the end of a text while it may become one of ``strings`` (each of one character or more).

    The text ends before the stop string that is complete first, whatever pieces it comes in; of several that are
    complete at the same character, before the longest.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._matchers = [_Matcher(string) for string in strings]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is free to go, and whether a stop string is complete; nothing may be pushed after that."""
        if not self._matchers:
            return text, False
        whole = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            for matcher in self._matchers:
                matcher.step(char)
            complete = [len(m.string) for m in self._matchers if m.matched == len(m.string)]
            if complete:
                self._held = ""
                return whole[: end - max(complete)], True
        free = len(whole) - max(matcher.matched for matcher in self._matchers)
        self._held = whole[free:]
        return whole[:free], False

    def end(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True)
class Spot:
    """A token, and how many characters of the answer stand before it."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Piece:
    """Text of an answer, and the tokens that begin in it."""

    text: str = ""
    spots: tuple[Spot, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.spots)


def joined(pieces: Iterable[Piece]) -> Piece:
    """Pieces that follow each other, as one."""
    pieces = list(pieces)
    return Piece("".join(piece.text for piece in pieces), tuple(spot for piece in pieces for spot in piece.spots))


class TextStream:
    """An answer's tokens in, its printable text out, up to the first of the strings ``stop``.

    skip: a text that is left out where the answer begins with it. used: tokens taken, with those of a stop string.
    stopped: a stop string is complete; tokens after it are not taken.
    """

    def __init__(self, tokenizer: CorpusTokenizer, stop: Sequence[str] = (), skip: str = "") -> None:
        self.used = 0
        self.stopped = False
        self._decoder = Decoder(tokenizer)
        self._stop = StopStrings(stop)
        self._skip = skip
        self._seen = 0  # characters decoded
        self._given = 0  # of those, characters that were given out
        self._waiting: list[Spot] = []

    def push(self, tokens: Iterable[Token]) -> Piece:
        """What is certain after more tokens."""
        parts = []
        for token in tokens:
            if self.stopped:
                break
            self.used += 1
            self._waiting.append(Spot(token, self._seen))
            parts.append(self._free(self._decoder.push(token.id)))
        return self._give("".join(parts))

    def end(self) -> Piece:
        """The rest, when no token follows."""
        if self.stopped:
            return Piece()
        text = self._free(self._decoder.end())
        return self._give(text if self.stopped else text + self._stop.end(), last=True)

    def _free(self, text: str) -> str:
        if self._skip and text:
            text, self._skip = text.removeprefix(self._skip), ""
        self._seen += len(text)
        free, self.stopped = self._stop.push(text)
        return free

    def _give(self, text: str, last: bool = False) -> Piece:
        self._given += len(text)
        everything = last and not self.stopped
        count = sum(everything or spot.offset < self._given for spot in self._waiting)
        spots, self._waiting = self._waiting[:count], self._waiting[count:]
        return Piece(text, tuple(spots))


class TokenNames:
    """What a single token stands for, as lists of probabilities show it."""

    def __init__(self, tokenizer: CorpusTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = _letter(tokenizer)
        self._known: dict[int, bytes] = {}

    def raw(self, token: int) -> bytes:
        """Its bytes, part of a character as they may be; of bos and eos, their names; none of an id without a name."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """Its text, or ``bytes:\\xe2\\x82`` where that is no whole character."""
        found = self.raw(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _find(self, token: int) -> bytes:
        name = self._tokenizer.tokenizer.id_to_token(token)
        if name is None or token in (self._tokenizer.bos, self._tokenizer.eos):
            return (name or "").encode()
        text = self._tokenizer.decode([*self._before, token])[len(self._tokenizer.decode(self._before)) :]
        if UNKNOWN not in text:
            return text.encode()
        if len(name) == 6 and name.startswith("<0x"):
            return bytes.fromhex(name[3:5])
        return bytes(_BYTES[char] for char in name) if all(char in _BYTES for char in name) else text.encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes a byte as the Latin-1 character where that is visible, the others as U+0100 onwards."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()
