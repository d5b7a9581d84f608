"""Tokens to text, however the text is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from server.text import IncrementalDecoder, StopMatcher
from tests.api.dummy_engine import SPECIAL, DummyTokenizer

letters = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)
decode = DummyTokenizer().decode
few = settings(max_examples=60, deadline=None)


class WordTokenizer:
    """Like SentencePiece: a word's leading space shows only after another word; 0 is special."""

    WORDS = ("", "▁one", "▁two", "s", "▁", "é")

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.WORDS[token] for token in tokens).replace("▁", " ").removeprefix(" ")


def cut(text: str, at: list[int]) -> list[str]:
    edges = [0, *sorted(position % (len(text) + 1) for position in at), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def matched(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.matched:
            return out, True
    return out + matcher.flush(), False


@few
@given(letters, stops)
def test_stops_by_definition(text: str, stops: list[str]) -> None:
    """The first moment at which the text ends in a stop string ends it; the longest such is cut off."""
    expected = (text, False)
    for end in range(1, len(text) + 1):
        if endings := [stop for stop in stops if text[:end].endswith(stop)]:
            expected = (text[: end - max(map(len, endings))], True)
            break
    assert matched([text], stops) == expected


@few
@given(letters, stops, st.lists(st.integers(0, 30), max_size=8))
def test_stops_do_not_depend_on_the_cuts(text: str, stops: list[str], at: list[int]) -> None:
    assert matched(cut(text, at), stops) == matched([text], stops)


def test_stops_hold_back_no_more_than_they_must() -> None:
    matcher = StopMatcher(["###", "abc"])
    assert matcher.push("hello #") == "hello "
    assert matcher.push("ab") == "#"
    assert matcher.push("x") == "abx"
    assert matcher.push("##") == ""
    assert matcher.push("#tail") == ""
    assert matcher.matched


# The beginnings of characters of two, three and four bytes, what they go on with, and a whole one.
_torn = st.sampled_from([0xC3, 0xE0, 0xEB, 0xF0, 0x80, 0x9F, 0xA4, 0xB6, 0x41])


@settings(max_examples=300, deadline=None)
@given(st.lists(_torn, min_size=1, max_size=40))
def test_characters_amid_bytes_that_are_none_come_out_whole(spelled: list[int]) -> None:
    """A character that ends a run of garbage is not taken for garbage when only its beginning is there."""
    decoder = IncrementalDecoder(decode, [])
    pieces = [decoder.push(token) for token in spelled] + [decoder.flush()]
    assert "".join(pieces) == bytes(spelled).decode(errors="replace")


@few
@given(st.integers(0, 40))
def test_what_is_held_back_of_garbage_is_little(count: int) -> None:
    decoder = IncrementalDecoder(decode, [])
    given = "".join(decoder.push(0x80) for _ in range(count))
    assert count - len(given) < 8


@few
@given(st.text(max_size=20), st.text(max_size=20))
def test_bytes_decode_to_the_text(prompt: str, text: str) -> None:
    decoder = IncrementalDecoder(decode, list(prompt.encode()))
    pieces = [decoder.push(token) for token in text.encode()] + [decoder.flush()]
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@few
@given(st.lists(st.integers(1, 5), max_size=8), st.lists(st.integers(0, 5), max_size=12))
def test_decoding_that_depends_on_what_comes_before(prompt: list[int], tokens: list[int]) -> None:
    decode = WordTokenizer().decode
    decoder = IncrementalDecoder(decode, prompt)
    text = "".join([decoder.push(token) for token in tokens]) + decoder.flush()
    assert decode(prompt) + text == decode([*prompt, *tokens])


@few
@given(st.lists(st.integers(0, SPECIAL), max_size=40))
def test_any_bytes_at_all(tokens: list[int]) -> None:
    """Garbage may decode to other replacement characters piece by piece, but loses no readable one."""
    decoder = IncrementalDecoder(decode, [])
    text = "".join([decoder.push(token) for token in tokens]) + decoder.flush()
    assert [c for c in text if c.isascii()] == [c for c in decode(tokens) if c.isascii()]


def test_garbage_and_special_tokens_do_not_pile_up() -> None:
    lengths: list[int] = []

    def watched(tokens: Sequence[int]) -> str:
        lengths.append(len(tokens))
        return decode(tokens)

    decoder = IncrementalDecoder(watched, [97])
    for token in [0x80] * 200 + [SPECIAL] * 200:
        decoder.push(token)
    assert max(lengths) < 30
    assert decoder.push(98) == "b"


def test_a_character_that_the_prompt_began_is_given_whole() -> None:
    """Token ids may end anywhere."""
    decoder = IncrementalDecoder(decode, [65, 0xC3])
    assert decoder.push(0xA9) + decoder.push(66) == "éB"
    decoder = IncrementalDecoder(decode, list("A\ufffd".encode()))
    assert decoder.push(66) == "B"
