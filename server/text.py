"""Tokens to text as they come: characters are never torn, stop strings may span tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first decode sees: what a word looks like may depend on the one before it."""
_TORN_TOKENS = 3
"""A character has at most 4 bytes, so no more tokens than these can be the beginning of one."""
_HELD_TOKENS = 8
"""After this many undecodable tokens, the replacement characters before a beginning are real."""


class IncrementalDecoder:
    """Text of a growing token sequence, piece by piece.

    A suffix of tokens does not decode to the suffix of the text (SentencePiece drops a leading space, a byte token
    is half a character), so each piece is the difference between two decodes that start at the same, settled token.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt[-_CONTEXT_TOKENS:])
        self._settled = len(self._window)
        """Tokens at the front of the window whose text has been given out."""

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is still incomplete."""
        self._window.append(token)
        given, text = self._given(), self._decode(self._window)
        held = len(self._window) - self._settled
        end = len(self._window)
        if text.endswith(_REPLACEMENT):
            if held < _HELD_TOKENS:
                return ""
            end, text = self._whole(text)
        if text == given and held >= _HELD_TOKENS:  # a run of special tokens: the window must not grow with it
            del self._window[self._settled : end]
        if not text.startswith(given):  # a prompt of token ids ended within a character, which is whole now
            given = given.rstrip(_REPLACEMENT)
        if len(text) <= len(given):
            return ""
        self._window, self._settled = self._window[self._settled :], end - self._settled
        return text[len(given) :]

    def _whole(self, text: str) -> tuple[int, str]:
        """The most tokens of the window that surely end with a whole character, and their text."""
        for end in range(len(self._window) - _TORN_TOKENS, self._settled, -1):
            if text.startswith(whole := self._decode(self._window[:end])):
                return end, whole
        return self._settled, self._given()

    def flush(self) -> str:
        """What is left when no more tokens come, an incomplete character included."""
        return self._decode(self._window)[len(self._given()) :]

    def _given(self) -> str:
        return self._decode(self._window[: self._settled])


class StopMatcher:
    """Passes text on until one of the stop strings is complete; the stop string itself is not passed on.

    Text that may be the beginning of a stop string is held back. The result does not depend on how the text is cut
    into pieces: the stop string that is complete first wins, and among those the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to pass on; sets `matched` once a stop string is complete."""
        if not text:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.matched, self._held = True, ""
            return text[: min(ends)[1]]
        safe = len(text) - self._pending(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _pending(self, text: str) -> int:
        """Length of the longest suffix of the text with which a stop string begins."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text with which the stop string begins; it is not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):  # only where its first character stands: mostly nowhere
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
