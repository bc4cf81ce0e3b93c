"""Tokens to text: whole characters as soon as they are certain, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_source import TEXTS, small_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers

from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.jobs.serve.text import Decoder, StopStrings, TextStream, TokenNames, joined
from shoal.workers.engine.request import Token

ANY_TOKENS = st.lists(st.integers(0, small_tokenizer().size + 5), max_size=80)
WORDS = st.text(st.sampled_from("aé€🐟魚 \n"), max_size=30)


def pieces(tokenizer: CorpusTokenizer, tokens: Iterable[int]) -> list[str]:
    """What each token completes, and the rest."""
    decoder = Decoder(tokenizer)
    return [*(decoder.push(token) for token in tokens), decoder.end()]


def with_byte_fallback() -> CorpusTokenizer:
    """Tokens as Llama's: words that begin with ▁, and <0x..> for the bytes of all other characters."""
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefg", "▁a", "▁b", "ab"]
    bpe = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [("▁", "a"), ("▁", "b"), ("a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return CorpusTokenizer(tokenizer, bos=0, eos=1)


@given(ANY_TOKENS)
def test_pieces_are_the_text_of_all_tokens(tokens: list[int]) -> None:
    tokenizer = small_tokenizer()
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(t for t in tokens if t < tokenizer.size)


@given(st.one_of(st.sampled_from(TEXTS), st.text(max_size=60)))
def test_a_character_is_given_with_the_token_that_completes_it(text: str) -> None:
    tokenizer = small_tokenizer()
    tokens = [int(t) for t in tokenizer.encode([text])[0][1:-1]]
    whole = codecs.getincrementaldecoder("utf-8")()  # Python's own, over the bytes of the tokens
    names = TokenNames(tokenizer)
    expected = [whole.decode(names.raw(token)) for token in tokens]
    given_out = pieces(tokenizer, tokens)
    # A text's own U+FFFD cannot be told from half a character, and comes with the next token.
    if "\ufffd" in text:
        assert "".join(given_out) == text
    else:
        assert given_out == [*expected, ""]


@given(ANY_TOKENS)
def test_only_what_may_become_a_character_is_held_back(tokens: list[int]) -> None:
    tokenizer = small_tokenizer()
    decoder, out = Decoder(tokenizer), ""
    for i, token in enumerate(tokens):
        out += decoder.push(token)
        so_far = tokenizer.decode(t for t in tokens[: i + 1] if t < tokenizer.size)
        assert so_far.startswith(out)
        assert set(so_far[len(out) :]) <= {"\ufffd"}


@given(WORDS)
def test_byte_fallback_and_words_with_spaces(text: str) -> None:
    tokenizer = with_byte_fallback()
    tokens = [int(t) for t in tokenizer.encode([text])[0][1:-1]]
    assert "".join(pieces(tokenizer, tokens)) == (f" {text}" if tokens else "")


def test_the_first_word_keeps_its_space() -> None:
    """It follows a prompt, though the tokenizer drops it at the beginning of a text."""
    tokenizer = with_byte_fallback()
    word = tokenizer.tokenizer.get_vocab()["▁a"]
    assert tokenizer.decode([word]) == "a"
    assert pieces(tokenizer, [word, word]) == [" a", " a", ""]


@dataclass(frozen=True)
class Counted(CorpusTokenizer):
    """Notes how many tokens it is asked to decode."""

    asked: list[int] = field(default_factory=list)

    def decode(self, tokens: Iterable[int]) -> str:
        tokens = list(tokens)
        self.asked.append(len(tokens))
        return super().decode(tokens)


@pytest.mark.parametrize("kind", ["letters", "broken bytes"])
def test_work_for_a_token_does_not_grow_with_the_text(kind: str) -> None:
    plain = small_tokenizer()
    names = TokenNames(plain)
    wanted = b"a" if kind == "letters" else b"\xff"
    token = next(t for t in range(plain.size) if names.raw(t) == wanted)
    counted = Counted(plain.tokenizer, plain.bos, plain.eos)
    found = pieces(counted, [token] * 1000)
    assert max(map(len, found)) <= 64  # an answer of broken bytes is not held back to its end
    assert "".join(found) == wanted.decode(errors="replace") * 1000
    assert max(counted.asked) <= 2 * 64
    assert len(counted.asked) <= 2 * 1000 + 10


def stopped(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first complete stop string, found the slow way."""
    for end in range(1, len(text) + 1):
        ends = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(ends)], True
    return text, False


@settings(max_examples=300)
@given(
    st.lists(st.text("ab", max_size=6), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_in_any_pieces(parts: list[str], stops: list[str]) -> None:
    whole, expected = "".join(parts), stopped("".join(parts), stops)
    search, out, done = StopStrings(stops), "", False
    for i, part in enumerate(parts):
        free, done = search.push(part)
        out += free
        assert expected[0].startswith(out)
        if done:
            break
        seen = "".join(parts[: i + 1])
        held = seen[len(out) :]
        # Exactly what may become a stop string is held back: nothing more, and all of it.
        begun = [k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])]
        assert len(held) == max(begun, default=0), (whole, stops)
    assert (out + ("" if done else search.end()), done) == expected


def stream(tokens: Sequence[int], stop: Sequence[str], at_once: int, skip: str = "") -> tuple[TextStream, list]:
    text = TextStream(small_tokenizer(), stop, skip)
    found = []
    for i in range(0, len(tokens), at_once):
        found.append(text.push(Token(token) for token in tokens[i : i + at_once]))
        if text.stopped:
            break
    return text, [*found, text.end()]


@given(
    st.sampled_from(TEXTS),
    st.lists(st.sampled_from(["群れ", "ee", "🐠🐡", " tide t", "é", "."]), max_size=4),
    st.integers(1, 7),
)
def test_an_answer_does_not_depend_on_how_tokens_come(text: str, stop: list[str], at_once: int) -> None:
    tokenizer = small_tokenizer()
    tokens = [int(t) for t in tokenizer.encode([text])[0][1:-1]]
    stream_, found = stream(tokens, stop, at_once)
    answer = joined(found)
    assert (answer.text, stream_.stopped) == stopped(text, stop)
    if stream_.stopped:
        # The token that completed the stop string is the last that was used.
        used = tokenizer.decode(tokens[: stream_.used])
        assert stopped(used, stop)[1]
        assert not stopped(tokenizer.decode(tokens[: stream_.used - 1]), stop)[1]
    else:
        assert stream_.used == len(tokens) == len(answer.spots)


@given(st.sampled_from(TEXTS), st.integers(1, 7))
def test_tokens_come_with_the_text_they_begin_in(text: str, at_once: int) -> None:
    tokens = [int(t) for t in small_tokenizer().encode([text])[0][1:-1]]
    _, found = stream(tokens, [text[len(text) // 2 :][:4]], at_once)
    end = 0
    for piece in found:
        for spot in piece.spots:
            assert end <= spot.offset < end + len(piece.text)
        end += len(piece.text)
    raw = b"".join(TokenNames(small_tokenizer()).raw(spot.token.id) for piece in found for spot in piece.spots)
    assert raw.startswith(
        "".join(piece.text for piece in found).encode()
    )  # the last one may go on into the stop string


def test_what_leads_an_answer_is_skipped_once() -> None:
    tokens = [int(t) for t in small_tokenizer().encode(["  a"])[0][1:-1]]
    _, found = stream(tokens, [], 1, skip=" ")
    assert joined(found).text == " a"


def test_names_of_tokens() -> None:
    tokenizer = small_tokenizer()
    names = TokenNames(tokenizer)
    assert {names.raw(token) for token in range(tokenizer.size)} >= {bytes([byte]) for byte in range(256)}
    half = next(t for t in range(tokenizer.size) if names.raw(t) == b"\xe2")
    assert names.text(half) == "bytes:\\xe2"
    assert names.text(tokenizer.eos) == "<|eos|>"
    assert names.raw(tokenizer.size + 3) == b""
    fallback = with_byte_fallback()
    assert TokenNames(fallback).raw(fallback.tokenizer.get_vocab()["<0xE2>"]) == b"\xe2"
    assert TokenNames(fallback).text(fallback.tokenizer.get_vocab()["▁a"]) == " a"
