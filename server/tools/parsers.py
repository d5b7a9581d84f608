"""How models say that they call a tool, read while they say it: a parser for each of the common formats."""

from __future__ import annotations

import json
import string
from abc import ABC, abstractmethod
from collections.abc import Iterator

from server.tools.pieces import CallScanner, Piece

_PUNCTUATION = f"{string.whitespace},;[]"
"""What may stand between the calls of a list."""


class ToolParser(ABC):
    """Text in, pieces out, however it is cut. Text that cannot be read as a call is given back as text.

    Args:
        most: calls beyond are left out; None for all.
    """

    def __init__(self, names: frozenset[str], most: int | None = None) -> None:
        self._names = names
        self._most = most
        self._calls = 0
        self._held = ""
        """Text that may yet be the beginning of something else."""
        self._scanner: CallScanner | None = None
        self._told = False
        """Whether the beginning of the present call is out."""

    @property
    def calls(self) -> int:
        """How many calls have been told, those included that are not whole."""
        return self._calls if self._most is None else min(self._calls, self._most)

    def push(self, text: str) -> Iterator[Piece]:
        """The pieces that this text makes certain."""
        return _joined(self._wanted(piece for character in text for piece in self._push(character)))

    def flush(self) -> Iterator[Piece]:
        """What is left when no more text comes."""
        return _joined(self._wanted(self._left()))

    def _left(self) -> Iterator[Piece]:
        scanner, self._scanner = self._scanner, None
        if scanner is not None and not self._told:
            yield from self._not_a_call(scanner.raw)
        yield from self._rest()

    @abstractmethod
    def _push(self, character: str) -> Iterator[Piece]: ...

    def _rest(self) -> Iterator[Piece]:
        held, self._held = self._held, ""
        if held.strip():
            yield Piece(held)

    def _not_a_call(self, raw: str) -> Iterator[Piece]:
        yield Piece(raw)

    def _begin(self) -> None:
        self._scanner, self._told = CallScanner(), False

    def _scan(self, character: str, *, marked: bool = True) -> Iterator[Piece]:
        """More of a call.

        Args:
            marked: whether a mark said that it is one; else only the names of the tools and arguments tell.
        """
        scanner = self._scanner
        assert scanner is not None
        scanner.push(character)
        is_call = scanner.has_arguments or (marked and scanner.is_done)
        is_known = marked or scanner.name in self._names
        if not self._told and is_call and is_known and not scanner.is_broken and scanner.name is not None:
            self._told = True
            self._calls += 1
            yield Piece(call=self._calls - 1, name=scanner.name)
        if self._told and (said := scanner.take()):
            yield Piece(call=self._calls - 1, arguments=said)
        if scanner.is_done:
            self._scanner = None
            if not self._told:
                yield from self._not_a_call(scanner.raw)
            elif not scanner.has_arguments:
                yield Piece(call=self._calls - 1, arguments="{}")

    def _wanted(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if piece.call is None or self._most is None or piece.call < self._most:
                yield piece


class HermesParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as often as it takes, with text around it."""

    BEGIN, END = "<tool_call>", "</tool_call>"

    def __init__(self, names: frozenset[str], most: int | None = None) -> None:
        super().__init__(names, most)
        self._inside = False

    def _push(self, character: str) -> Iterator[Piece]:
        if self._scanner is not None:
            yield from self._scan(character)
            return
        self._held += character
        if self._inside:
            yield from self._push_inside()
            return
        # Space in front of a call belongs to nobody.
        before, begin, _ = self._held.partition(self.BEGIN)
        if begin:
            self._inside, self._held = True, ""
            if before.strip():
                yield Piece(before.rstrip())
        else:
            safe = len(self._held) - _pending(self._held, self.BEGIN)
            safe = len(self._held[:safe].rstrip())
            text, self._held = self._held[:safe], self._held[safe:]
            if text:
                yield Piece(text)

    def _push_inside(self) -> Iterator[Piece]:
        """Between `<tool_call>` and `{`, or behind `}`."""
        held = self._held.lstrip()
        if held.endswith(self.END):
            self._inside, self._held = False, ""
        elif held.startswith("{"):
            self._held = ""
            self._begin()
            yield from self._scan("{")
        elif held and not self.END.startswith(held):
            self._inside, text, self._held = False, self.BEGIN + self._held, ""
            yield Piece(text)

    def _not_a_call(self, raw: str) -> Iterator[Piece]:
        self._inside = False
        yield Piece(self.BEGIN + raw)


class LlamaParser(ToolParser):
    """The whole answer is `{"name": ..., "parameters": {...}}`, or several of them set apart by `;`. Nothing marks it,
    or `<|python_tag|>`: an object counts as a call if it names one of the tools and has arguments."""

    BEGIN = "<|python_tag|>"

    def __init__(self, names: frozenset[str], most: int | None = None) -> None:
        super().__init__(names, most)
        self._is_text = False

    def _push(self, character: str) -> Iterator[Piece]:
        if self._is_text:
            yield Piece(character)
            return
        if self._scanner is not None:
            yield from self._scan(character, marked=False)
            return
        self._held += character
        held = self._held.strip()
        if self._calls:
            held = held.lstrip(";, \n")
        elif held.startswith(self.BEGIN):
            held = held.removeprefix(self.BEGIN).lstrip()
        if held == "{":
            self._held = ""
            self._begin()
            yield from self._scan("{", marked=False)
        elif held and not self.BEGIN.startswith(held):
            self._is_text, text, self._held = True, self._held, ""
            yield Piece(text)

    def _rest(self) -> Iterator[Piece]:
        if self._calls:
            self._held = ""
        yield from super()._rest()

    def _not_a_call(self, raw: str) -> Iterator[Piece]:
        self._is_text = True
        yield Piece(raw)


class MistralParser(ToolParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or, of newer models, `[TOOL_CALLS]name[ARGS]{...}`.

    Args:
        begun: whether the mark was not written, for a grammar made the answer a list of calls.
    """

    BEGIN, ARGS = "[TOOL_CALLS]", "[ARGS]"

    def __init__(self, names: frozenset[str], most: int | None = None, *, begun: bool = False) -> None:
        super().__init__(names, most)
        self._inside = begun
        self._named = False
        self._in_list = False

    def _push(self, character: str) -> Iterator[Piece]:
        if self._scanner is not None:
            yield from self._scan(character)
            if self._named and self._scanner is not None and _is_whole(self._scanner):
                yield from self._scan("}")  # of the object that was put around name and arguments
            return
        self._held += character
        if not self._inside:
            before, begin, _ = self._held.partition(self.BEGIN)
            if begin:
                self._inside, self._held = True, ""
                if before.strip():
                    yield Piece(before.rstrip())
            else:
                safe = len(self._held[: len(self._held) - _pending(self._held, self.BEGIN)].rstrip())
                text, self._held = self._held[:safe], self._held[safe:]
                if text:
                    yield Piece(text)
        elif character == "{":
            yield from self._open(self._held[:-1])
        elif character == "]" and self._in_list and not self._held.strip(_PUNCTUATION):
            self._inside, self._in_list, self._held = False, False, ""  # what follows is text again
        elif self._held.endswith(self.BEGIN):  # the next one
            self._held, self._in_list = "", False

    def _open(self, before: str) -> Iterator[Piece]:
        """A call begins; in front of it is its name, or punctuation of a list."""
        name = before.removesuffix(self.ARGS).partition("[CALL_ID]")[0].strip(_PUNCTUATION)
        self._held = ""
        self._in_list |= not name and "[" in before
        self._begin()
        self._named = bool(name)
        start = f'{{"name": {json.dumps(name)}, "arguments": {{' if name else "{"
        for character in start:
            yield from self._scan(character)

    def _rest(self) -> Iterator[Piece]:
        if self._inside and not self._held.strip(_PUNCTUATION):
            self._held = ""
        yield from super()._rest()


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Pieces that continue each other as one."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and piece.call == last.call and piece.name is None:
            last = Piece(last.text + piece.text, last.call, last.name, last.arguments + piece.arguments)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _is_whole(scanner: CallScanner) -> bool:
    return not scanner.is_done and scanner.depth == 1


def _pending(text: str, mark: str) -> int:
    """Length of the longest suffix of the text that may be the beginning of the mark."""
    longest = min(len(mark) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if mark.startswith(text[-size:])), 0)
