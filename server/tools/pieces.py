"""What an answer with tools is made of, and one call on its way: a JSON object that comes character by character."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

ARGUMENTS = ("arguments", "parameters")
"""What models call what a tool is called with."""


@dataclass(frozen=True)
class Piece:
    """Something that has become certain: text for people, the beginning of a call, or more of its arguments.

    Attributes:
        call: which call of the answer, from 0; None of text.
        name: of the tool, with the first piece of a call.
        arguments: JSON, as the model writes it; the pieces of one call follow each other.
    """

    text: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


class _At(Enum):
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()


class CallScanner:
    """Finds name and arguments in `{"name": ..., "arguments": {...}}`, in any order, before it is whole.

    Arguments are given out as they come, once the name is known; where they are a string that holds JSON, as some
    models write them, when they are whole; null stands for none. What is no such object gives nothing: the caller has
    its text.
    """

    def __init__(self) -> None:
        self.raw = ""
        """All of it so far."""
        self.name: str | None = None
        self.has_arguments = False
        """Whether it is certain that they are an object."""
        self.is_done = False
        self.is_broken = False
        """It cannot become a call any more."""
        self._at = _At.KEY
        self.depth = 0
        """How many brackets are open."""
        self._in_string = self._escaped = False
        self._key = ""
        self._start = 0
        self._met_arguments = False
        """A second value for them counts for nothing."""
        self._in_arguments = False
        self._streams = False
        self._unsaid = ""

    def push(self, character: str) -> None:
        """Take the next character of the object, which begins with `{`."""
        self.raw += character
        here = len(self.raw) - 1
        if self._in_string:
            self._push_in_string(character)
        elif character == '"':
            self._in_string = True
            if self.depth == 1 and self._at in (_At.KEY, _At.VALUE):
                self._begin(here)
        elif character in "{[":
            if self.depth == 1 and self._at is _At.VALUE:
                self._begin(here)
            elif self.depth == 1 or (self.depth == 0 and character == "["):
                self.is_broken = True
            self.depth += 1
        elif character in "}]":
            self._close(here)
        elif self.depth == 1:
            self._push_between(character, here)
        if self._streams:
            self._unsaid += character
            if self.depth == 1 and character == "}" and not self._in_string:
                self._streams = False

    def take(self) -> str:
        """Arguments that have become certain since the last time; nothing before the name is known."""
        if self.name is None:
            return ""
        said, self._unsaid = self._unsaid, ""
        return said

    def _push_in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self.depth == 1:
                self._end(len(self.raw))

    def _push_between(self, character: str, here: int) -> None:
        """A character at the top level of the object, outside of strings."""
        if character.isspace():
            return
        if character == ":" and self._at is _At.COLON:
            self._at = _At.VALUE
        elif character == ",":
            if self._at is _At.VALUE:
                self._end(here)
            self.is_broken |= self._at is not _At.COMMA
            self._at = _At.KEY
        elif self._at is _At.VALUE:
            if not self._start:
                self._begin(here)  # a number, true, false or null
        else:
            self.is_broken = True

    def _begin(self, here: int) -> None:
        self.is_broken |= self._start > 0  # behind a value that has not ended
        self._start = here
        if self._at is _At.VALUE and self._key in ARGUMENTS and not self._met_arguments:
            self._met_arguments = self._in_arguments = True
            self.has_arguments = self._streams = self.raw[here] == "{"

    def _close(self, here: int) -> None:
        self.depth -= 1
        if self.depth == 1:
            self._end(here + 1)
        elif self.depth == 0:
            if self._at is _At.VALUE:
                self._end(here)
            self.is_done = True
            self.is_broken |= not _is_object(self.raw)

    def _end(self, end: int) -> None:
        """A key or a value of the object is whole."""
        written, self._start = self.raw[self._start : end], 0
        if self._at is _At.KEY:
            self._key, self._at = _text(written) or "", _At.COLON
            return
        self._at = _At.COMMA
        if self._key == "name" and self.name is None:
            self.name = _text(written)
            self.is_broken |= self.name is None
        elif self._in_arguments and not self.has_arguments:
            self._end_arguments(written)
        self._in_arguments = False

    def _end_arguments(self, written: str) -> None:
        """Arguments that are no object: none at all, text that holds one, or nothing that can be called with."""
        inner = _text(written)
        said = written if inner is None else inner
        if said.strip() in ("", "null"):
            said = "{}"
        self.has_arguments = _is_object(said)
        if self.has_arguments:
            self._unsaid = said
        else:
            self.is_broken = True


def _text(written: str) -> str | None:
    """A JSON string as text, or None if it is none."""
    value = _value(written)
    return value if isinstance(value, str) else None


def _is_object(written: str) -> bool:
    return isinstance(_value(written), dict)


def _value(written: str) -> Any:
    """What JSON says; None if it is none, or nested deeper than can be read."""
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return None
