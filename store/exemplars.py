"""Exemplars as users send them: JSON lines of prompts, in the shapes people have at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from store.errors import InvalidRequestError, TooLargeError
from store.strict_json import FieldError, parse_json

MAX_LINES = 4096
MAX_BYTES = 1 << 20
_PARAM = "exemplars"


def parse_exemplars(data: bytes) -> list[str]:
    """Read exemplars from JSON lines.

    Each line is `{"prompt": ...}`, `{"text": ...}`, `{"messages": [...]}` (the last user message counts) or a bare JSON
    string. Other keys are ignored, empty lines are skipped, repetitions are dropped; the order is kept.

    Args:
        data: at most `MAX_BYTES` bytes of UTF-8, at most `MAX_LINES` lines.

    Raises:
        TooLargeError: there is more.
        InvalidRequestError: a line is none of these; the message gives its number.
    """
    found: dict[str, None] = {}
    for number, value in lines_of(data, _PARAM):
        text = prompt_of(value)
        if text is None:
            raise fault(
                "exemplars", number, 'give {"prompt": TEXT}, {"text": TEXT}, {"messages": [...]} or a JSON string'
            )
        if not text.strip():
            raise fault("exemplars", number, "the prompt is empty")
        found[text] = None
    if not found:
        raise InvalidRequestError("the exemplars hold no prompt", param=_PARAM)
    return list(found)


def exemplar_bytes(exemplars: Sequence[str]) -> bytes:
    """Exemplars as JSON lines, under the checks of `parse_exemplars`."""
    data = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in exemplars).encode("utf-8")
    parse_exemplars(data)
    return data


def lines_of(data: bytes, param: str) -> Iterator[tuple[int, object]]:
    """The number and the value of each JSON line that is not empty.

    Raises:
        TooLargeError: there is more than `MAX_BYTES` or `MAX_LINES`.
        InvalidRequestError: a line is no JSON.
    """
    if len(data) > MAX_BYTES:
        raise TooLargeError(f"{param} have {len(data)} bytes, at most {MAX_BYTES} are allowed", param=param)
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    if len(lines) > MAX_LINES:
        raise InvalidRequestError(f"{param} have {len(lines)} lines, at most {MAX_LINES} fit", param=param)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parse_json(line, "the line")
            except FieldError as error:
                raise fault(param, number, f"{error.field} {error.message}") from None


def fault(param: str, number: int, what: str) -> InvalidRequestError:
    """What is wrong with a line."""
    return InvalidRequestError(f"{param}, line {number}: {what}", param=param)


def prompt_of(value: object) -> str | None:
    """The prompt of a line; None where it has none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return None
    for key in ("prompt", "text"):
        if key in value:
            return value[key] if isinstance(value[key], str) else None
    messages = value.get("messages")
    if not isinstance(messages, list):
        return None
    turns = [turn for turn in messages if isinstance(turn, dict) and turn.get("role") == "user"]
    return _text_of(turns[-1].get("content")) if turns else None


def _text_of(content: object) -> str | None:
    """A message's content: a string, or the API's list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "\n".join(text for text in texts if isinstance(text, str)) if texts else None
