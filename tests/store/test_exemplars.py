from __future__ import annotations

import json

import pytest

from store.errors import InvalidRequestError, TooLargeError
from store.exemplars import MAX_BYTES, MAX_LINES, parse_exemplars


def test_every_shape_of_line() -> None:
    lines = [
        {"prompt": "a", "answer": "kept out"},
        {"text": "b"},
        {"messages": [{"role": "user", "content": "old"}, {"role": "user", "content": "c"}, {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "image_url"}]}]},
        "é",
        {"prompt": "a"},
    ]
    data = "\ufeff" + "\r\n".join(json.dumps(line) for line in lines) + "\n\n"
    assert parse_exemplars(data.encode()) == ["a", "b", "c", "d", "é"]


@pytest.mark.parametrize(
    "line",
    ["{", "7", "null", "[]", "{}", '{"prompt": 3}', '{"messages": []}', '{"messages": [{"role": "system"}]}', '""',
     '{"text": "  "}', '"\\ud800"', '{"a": NaN, "text": "x"}', "[" * 100_000],
)  # fmt: skip
def test_faults_name_the_line(line: str) -> None:
    with pytest.raises(InvalidRequestError, match="line 3") as caught:
        parse_exemplars(f'"fine"\n\n{line}\n'.encode())
    assert caught.value.param == "exemplars"


def test_text_that_is_no_utf8() -> None:
    with pytest.raises(InvalidRequestError, match=r"line 1.*UTF-8"):
        parse_exemplars(b'"\xff"')


def test_bounds() -> None:
    with pytest.raises(TooLargeError):
        parse_exemplars(b"x" * (MAX_BYTES + 1))
    with pytest.raises(InvalidRequestError, match="lines"):
        parse_exemplars(b'"x"\n' * (MAX_LINES + 1))
    with pytest.raises(InvalidRequestError, match="no prompt"):
        parse_exemplars(b"\n\n")
