"""`multipart/form-data` with a large file in it: that part goes to disk as it comes, hashed and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from store.errors import InvalidRequestError, TooLargeError
from store.intake import Intake, Received

_WRITTEN_AT_ONCE = 1 << 20
"""Bytes that are gathered before a thread writes and hashes them."""


class PartKind(Enum):
    """What a part of a form is."""

    FILE = "file"
    """Streamed to disk; needs a filename."""
    SMALL = "small"
    """Kept in memory, with or without a filename."""
    TEXT = "text"
    """Kept in memory; has no filename."""


@dataclass(frozen=True)
class PartRule:
    """A part that a form may have, once, and how many bytes it may have."""

    kind: PartKind
    max_bytes: int


@dataclass
class Form:
    """A form that has arrived: its files by the parts' names, and its small parts."""

    files: dict[str, Received] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)

    def text(self, name: str) -> str | None:
        """A small part as text; None where it is missing or empty."""
        try:
            return self.values.get(name, b"").decode() or None
        except UnicodeDecodeError:
            raise InvalidRequestError(f"the part {name} is not UTF-8 text", param=name) from None


@dataclass(frozen=True)
class _Begin:
    name: str
    has_filename: bool


class _End:
    pass


@asynccontextmanager
async def read_form(request: Request, rules: Mapping[str, PartRule], folder: Path) -> AsyncIterator[Form]:
    """The parts of a form; what was put into `folder` is gone afterwards, unless somebody took it over.

    A body that is no multipart form counts as a form without parts.

    Raises:
        InvalidRequestError: the body is malformed, or has a part that is unknown, there twice or of the wrong kind.
        TooLargeError: a part is too large.
        StoreError, StorageFullError: a file cannot be written.
        ClientDisconnect: the client went away.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    form = Form()
    try:
        if kind == b"multipart/form-data":
            await _read(_events(options.get(b"boundary", b""), request.stream()), form, rules, folder)
        yield form
    finally:
        for file in form.files.values():
            file.discard()


async def pour(pieces: AsyncIterator[bytes], write: Callable[[bytearray], object]) -> None:
    """Give all pieces to `write`, which may block: many at a time, on another thread. What came before an error too."""
    gathered = bytearray()
    try:
        async for piece in pieces:
            gathered += piece
            if len(gathered) >= _WRITTEN_AT_ONCE:
                ready, gathered = gathered, bytearray()
                await asyncio.to_thread(write, ready)
    finally:
        if gathered:
            await asyncio.to_thread(write, gathered)


async def _read(
    events: AsyncIterator[_Begin | _End | bytes], form: Form, rules: Mapping[str, PartRule], folder: Path
) -> None:
    async for event in events:
        if not isinstance(event, _Begin):
            continue
        rule = _rule_of(event, form, rules)
        if rule.kind is not PartKind.FILE:
            form.values[event.name] = await _in_memory(event.name, rule.max_bytes, _data(events))
            continue
        with await asyncio.to_thread(Intake, folder, max_bytes=rule.max_bytes) as intake:
            await pour(_data(events), intake.write)
            form.files[event.name] = intake.finish()


def _rule_of(part: _Begin, form: Form, rules: Mapping[str, PartRule]) -> PartRule:
    name = part.name
    if name not in rules:
        raise InvalidRequestError(f"unknown part {name[:64]!r}", param=name[:64], code="unknown_parameter")
    if name in form.files or name in form.values:
        raise InvalidRequestError(f"the part {name} is there twice", param=name)
    if rules[name].kind is PartKind.FILE and not part.has_filename:
        raise InvalidRequestError(
            f"the part {name} must be a file: give it a filename", param=name, code="missing_required_parameter"
        )
    if rules[name].kind is PartKind.TEXT and part.has_filename:
        raise InvalidRequestError(f"the part {name} must be text", param=name)
    return rules[name]


async def _in_memory(name: str, max_bytes: int, pieces: AsyncIterator[bytes]) -> bytes:
    data = bytearray()
    async for piece in pieces:
        data += piece
        if len(data) > max_bytes:
            raise TooLargeError(f"the part {name} exceeds the limit of {max_bytes} bytes", param=name)
    return bytes(data)


async def _data(events: AsyncIterator[_Begin | _End | bytes]) -> AsyncIterator[bytes]:
    """The bytes of the part that has begun."""
    async for event in events:
        if not isinstance(event, bytes):
            return
        yield event


async def _events(boundary: bytes, stream: AsyncIterator[bytes]) -> AsyncIterator[_Begin | _End | bytes]:
    """What a body consists of, in order."""
    if not boundary:
        raise _malformed("it has no boundary")
    found: list[_Begin | _End | bytes] = []
    header, disposition, ended = [b"", b""], b"", False

    def grow(which: int) -> Callable[[bytes, int, int], None]:
        def add(data: bytes, start: int, end: int) -> None:
            header[which] += data[start:end]

        return add

    def header_end() -> None:
        nonlocal disposition
        if header[0].lower() == b"content-disposition":
            disposition = header[1]
        header[:] = b"", b""

    def headers_end() -> None:
        nonlocal disposition
        _, options = parse_options_header(disposition)
        if b"name" not in options:
            raise _malformed("a part has no name")
        found.append(_Begin(options[b"name"].decode("utf-8", "replace"), b"filename" in options))
        disposition = b""

    def end() -> None:
        nonlocal ended
        ended = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_header_field": grow(0),
                "on_header_value": grow(1),
                "on_header_end": header_end,
                "on_headers_finished": headers_end,
                "on_part_data": lambda data, start, stop: found.append(data[start:stop]),
                "on_part_end": lambda: found.append(_End()),
                "on_end": end,
            },
        )
        async for chunk in stream:
            parser.write(chunk)
            for event in found:
                yield event
            found.clear()
        parser.finalize()
    except FormParserError as error:
        raise _malformed(str(error)) from None
    if not ended:
        raise _malformed("it ends before its last boundary")


def _malformed(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"the form cannot be read: {what}", code="invalid_form")
