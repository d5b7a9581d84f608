"""JSON from outside: parsed strictly, read field by field with the type, the range and the length checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import NoReturn

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class FieldError(ValueError):
    """A JSON document, or one field of it, is not what it must be; `field` says which."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


def parse_json(data: bytes, field: str) -> object:
    """Parse UTF-8 JSON, refusing what the standard leaves open.

    Refused: duplicate keys, NaN and Infinity, numbers that overflow a double, lone surrogates (they could not be
    sent on as UTF-8), other text encodings, and nesting beyond the interpreter's recursion limit.

    Raises:
        FieldError: with `field` as given.
    """
    try:
        text = data.decode("utf-8")
        value: object = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite_float
        )
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise FieldError("is not valid UTF-8 text", field) from None
    except RecursionError:
        raise FieldError("is nested too deeply", field) from None
    except ValueError as error:
        raise FieldError(f"is not valid JSON: {error}", field) from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


class Fields:
    """Typed access to a JSON object. Every method raises `FieldError` naming `prefix + key`.

    A missing key and `null` are the same: an error, unless the method takes a `default`.
    """

    def __init__(self, value: object, name: str, *, prefix: str = "") -> None:
        if not isinstance(value, dict):
            raise FieldError("must be a JSON object", name)
        self._values: dict[str, object] = value
        self._prefix = prefix

    def fail(self, key: str, message: str) -> NoReturn:
        raise FieldError(message, self._prefix + key)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def get(self, key: str) -> object:
        value = self._values.get(key)
        if value is None:
            self.fail(key, "is missing")
        return value

    def names(self) -> list[str]:
        return list(self._values)

    def text(self, key: str, *, max_bytes: int, pattern: re.Pattern[str] | None = None) -> str:
        """A string of at most `max_bytes` UTF-8 bytes that matches `pattern` as a whole."""
        value = self.get(key)
        if not isinstance(value, str):
            self.fail(key, "must be a string")
        if len(value.encode("utf-8")) > max_bytes:
            self.fail(key, f"is longer than {max_bytes} bytes")
        if pattern is not None and not pattern.fullmatch(value):
            self.fail(key, f"must match {pattern.pattern}")
        return value

    def integer(self, key: str, *, low: int, high: int) -> int:
        """An integer in [low, high]."""
        value = self.get(key)
        if type(value) is not int:  # bool is an int to isinstance
            self.fail(key, "must be an integer")
        if not low <= value <= high:
            self.fail(key, f"must lie between {low} and {high}")
        return value

    def number(self, key: str, *, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        value = self.get(key)
        if type(value) is not int and type(value) is not float:
            self.fail(key, "must be a number")
        if not low <= value <= high:  # also false for NaN, and exact for integers beyond a double
            self.fail(key, f"must lie between {low} and {high}")
        return float(value)

    def items(self, key: str, *, max_items: int) -> list[object]:
        """A list of at most `max_items` values, unchecked."""
        value = self.get(key)
        if not isinstance(value, list):
            self.fail(key, "must be a list")
        if len(value) > max_items:
            self.fail(key, f"has more than {max_items} entries")
        return value

    def strings(self, key: str, *, max_items: int, max_bytes: int) -> tuple[str, ...]:
        """A list of strings, each of at most `max_bytes` UTF-8 bytes."""
        return tuple(
            self._element(key, item, lambda item: isinstance(item, str) and len(item.encode("utf-8")) <= max_bytes)
            for item in self.items(key, max_items=max_items)
        )

    def integers(self, key: str, *, max_items: int, high: int) -> tuple[int, ...]:
        """A list of integers in [0, high]."""
        numbers = [item for item in self.items(key, max_items=max_items) if type(item) is int and 0 <= item <= high]
        if len(numbers) != len(self.items(key, max_items=max_items)):
            self.fail(key, f"must be a list of integers from 0 to {high}")
        return tuple(numbers)

    def _element(self, key: str, item: object, accept: Callable[[object], bool]) -> str:
        if not accept(item):
            self.fail(key, "has an entry that is no string, or is too long")
        return str(item)

    def shape(self, key: str, *, max_rank: int, max_numel: int) -> tuple[int, ...]:
        """A list of dimensions, each ≥ 0, whose product is at most `max_numel`."""
        dims: list[int] = []
        numel = 1
        for item in self.items(key, max_items=max_rank):
            if type(item) is not int or not 0 <= item <= max_numel:
                self.fail(key, f"must be a list of integers from 0 to {max_numel}")
            dims.append(item)
            numel *= item
        if numel > max_numel:
            self.fail(key, f"has more than {max_numel} elements")
        return tuple(dims)

    def child(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self.get(key), self._prefix + key, prefix=f"{self._prefix}{key}.")
