"""Calls of tools, read out of what models write, however it is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools.parsers import ToolParser
from server.tools.pieces import Piece
from server.tools.use import ToolFormat, ToolUse, format_of, knows_tools

TOOLS = ("weather", "time")
Read = tuple[str, list[tuple[str, str]]]


def use(kind: ToolFormat, **given: Any) -> ToolUse:
    definitions = tuple({"type": "function", "function": {"name": name}} for name in TOOLS)
    return ToolUse(definitions, kind, **given)


def gather(pieces: Iterable[Piece]) -> Read:
    """Text, and calls with their arguments; checks that pieces come in an order that clients can put together."""
    text, calls = "", list[tuple[str, str]]()
    for piece in pieces:
        if piece.call is None:
            assert piece.text
            text += piece.text
        elif piece.name is not None:
            assert piece.call == len(calls)
            calls.append((piece.name, piece.arguments))
        else:
            assert piece.call == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + piece.arguments
    return text, calls


def read(parser: ToolParser, *parts: str) -> Read:
    pieces = [piece for part in parts for piece in parser.push(part)]
    return gather([*pieces, *parser.flush()])


DEEP = "[" * 2000 + "]" * 2000
HERMES = [
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", ['{"city": "Rome"}']),
    ('I look.\n<tool_call>{"name":"weather","arguments":{}}</tool_call>', "I look.", ["{}"]),
    ('<tool_call>\n{"arguments": {"a": [1, {"b": "}"}]}, "name": "weather"}\n</tool_call>', "",
     ['{"a": [1, {"b": "}"}]}']),
    ('<tool_call>{"name": "weather"}</tool_call>', "", ["{}"]),
    ('<tool_call>{"name": "weather", "arguments": "{\\"city\\": 1}"}</tool_call>', "", ['{"city": 1}']),
    ('<tool_call>\n{"name": "weather", "arguments": {"a": "</tool_call>"}}\n</tool_call>', "",
     ['{"a": "</tool_call>"}']),
    ('<tool_call>\n{"name": "weather", "arguments": {}}', "", ["{}"]),
    ("no call at all, 1 < 2 <tool", "no call at all, 1 < 2 <tool", []),
    ('<tool_call>{"name": "weather", "arguments": null}</tool_call>', "", ["{}"]),
    ('<tool_call>{"arguments": null, "name": "weather"}</tool_call>', "", ["{}"]),
    ('<tool_call>{"name": "weather", "arguments": ""}</tool_call>', "", ["{}"]),
    ('<tool_call>{"name": "weather", "arguments": 3}</tool_call>',
     '<tool_call>{"name": "weather", "arguments": 3}</tool_call>', []),
    ('<tool_call>{"name": "weather", "arguments": [{}]}</tool_call>',
     '<tool_call>{"name": "weather", "arguments": [{}]}</tool_call>', []),
    ('<tool_call>{"name": "weather", "arguments": "Rome"}</tool_call>',
     '<tool_call>{"name": "weather", "arguments": "Rome"}</tool_call>', []),
    ('<tool_call>{"name": "weather", "arguments": 3 {}}</tool_call>',
     '<tool_call>{"name": "weather", "arguments": 3 {}}</tool_call>', []),
    (f'<tool_call>{{"name": "weather", "b": {DEEP}}}</tool_call>',
     f'<tool_call>{{"name": "weather", "b": {DEEP}}}</tool_call>', []),
    ('<tool_call>{"name": "weather", "arguments": {"a": 1}, "arguments": {"b": 2}}</tool_call>', "", ['{"a": 1}']),
    ('<tool_call>{"name": "weather", "parameters": null, "arguments": {"b": 2}}</tool_call>', "", ["{}"]),
    ("<tool_call>\nnonsense\n</tool_call>", "<tool_call>\nnonsense\n</tool_call>", []),
    ('<tool_call>{"name": 5, "arguments": {}}</tool_call> so', '<tool_call>{"name": 5, "arguments": {}}</tool_call> so',
     []),
    ('<tool_call>{"city": "Rome"}', '<tool_call>{"city": "Rome"}', []),
    ('<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
]  # fmt: skip
LLAMA = [
    ('{"name": "weather", "parameters": {"city": "Rome"}}', "", ['{"city": "Rome"}']),
    ('<|python_tag|>{"name": "weather", "parameters": {}}', "", ["{}"]),
    (' {"name": "weather", "parameters": {"a": 1}}; ', "", ['{"a": 1}']),
    ('{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
    ('{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
    ('{"name": "weather"}', '{"name": "weather"}', []),
    ('The answer is {"name": "weather", "parameters": {}}', 'The answer is {"name": "weather", "parameters": {}}', []),
    ("<|python", "<|python", []),
    ('{"name": "weather", "parameters": null}', "", ["{}"]),
    ('{"name": "weather", "parameters": 3}', '{"name": "weather", "parameters": 3}', []),
]
MISTRAL = [
    ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]', "", ['{"city": "Rome"}']),
    ('[TOOL_CALLS]weather[ARGS]{"city": {"a": [1]}}', "", ['{"city": {"a": [1]}}']),
    ('[TOOL_CALLS]weather{"city": "}"}', "", ['{"city": "}"}']),
    ("[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{}", "", ["{}"]),
    ('So: [TOOL_CALLS][{"name":"weather","arguments":{}}]', "So:", ["{}"]),
    ("[1, 2] is a list [TOOL", "[1, 2] is a list [TOOL", []),
    ('hello [TOOL_CALLS][{"name": "weather", "arguments": {}}] bye [1]', "hello bye [1]", ["{}"]),
    (
        '[TOOL_CALLS][{"name": "weather", "arguments": {}}\n]\n[TOOL_CALLS][{"name": "weather"}] {x}',
        " {x}",
        ["{}", "{}"],
    ),
]
CASES = [
    (kind, *case)
    for kind, cases in ((ToolFormat.HERMES, HERMES), (ToolFormat.LLAMA, LLAMA), (ToolFormat.MISTRAL, MISTRAL))
    for case in cases
]


@pytest.mark.parametrize(("kind", "said", "text", "arguments"), CASES)
def test_what_models_write_is_understood(kind: ToolFormat, said: str, text: str, arguments: list[str]) -> None:
    expected = text, [("weather", one) for one in arguments]
    assert read(use(kind).parser(), said) == expected
    assert read(use(kind).parser(), *said) == expected, "character by character"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ToolFormat.HERMES, '<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>\n'
                            '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'),
        (ToolFormat.LLAMA, '{"name": "weather", "parameters": {"a": 1}}; {"name": "time", "parameters": {}}'),
        (ToolFormat.MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"a": 1}}, '
                             '{"name": "time", "arguments": {}}]'),
        (ToolFormat.MISTRAL, '[TOOL_CALLS]weather[ARGS]{"a": 1}[TOOL_CALLS]time[ARGS]{}'),
    ],
)  # fmt: skip
def test_several_calls_and_the_first_alone(kind: ToolFormat, said: str) -> None:
    parser = use(kind).parser()
    assert read(parser, said) == ("", [("weather", '{"a": 1}'), ("time", "{}")])
    assert parser.calls == 2
    parser = use(kind, parallel=False).parser()
    assert read(parser, said) == ("", [("weather", '{"a": 1}')])
    assert parser.calls == 1


@pytest.mark.parametrize("most", [None, 1])
def test_a_call_counts_as_soon_as_it_is_told(most: int | None) -> None:
    parser = use(ToolFormat.HERMES, parallel=most is None).parser()
    assert gather(parser.push('<tool_call>{"name": "weather", "arg'))[1] == []
    assert parser.calls == 0
    assert gather(parser.push('uments": {'))[1] == [("weather", "{")]
    assert parser.calls == 1
    assert [*parser.flush()] == []
    assert parser.calls == 1


def test_arguments_come_before_they_are_whole() -> None:
    parser = use(ToolFormat.HERMES).parser()
    first = [*parser.push('<tool_call>{"name": "weather", "arguments": {"city": "Ro')]
    assert gather(first) == ("", [("weather", '{"city": "Ro')])
    assert gather([Piece(call=0, name="weather"), *parser.push('me"}')])[1] == [("weather", 'me"}')]


def test_text_is_held_back_only_where_it_may_be_a_mark() -> None:
    parser = use(ToolFormat.HERMES).parser()
    assert gather(parser.push("one ")) == ("one", [])
    assert gather(parser.push("two <t")) == (" two", [])
    assert gather(parser.push("able>")) == (" <table>", [])
    assert gather(parser.flush()) == ("", [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    st.sampled_from(list(ToolFormat)),
    st.lists(st.tuples(st.sampled_from(TOOLS), st.dictionaries(st.text(), JSON)), min_size=1, max_size=3),
    st.lists(st.integers(1, 20), max_size=30),
    st.booleans(),
)
def test_every_call_survives_every_cut(
    kind: ToolFormat, calls: list[tuple[str, dict[str, Any]]], cuts: list[int], ascii_only: bool
) -> None:
    key = "parameters" if kind is ToolFormat.LLAMA else "arguments"
    objects = [json.dumps({"name": name, key: given}, ensure_ascii=ascii_only) for name, given in calls]
    said = {
        ToolFormat.HERMES: "".join(f"<tool_call>\n{one}\n</tool_call>\n" for one in objects),
        ToolFormat.LLAMA: "; ".join(objects),
        ToolFormat.MISTRAL: f"[TOOL_CALLS][{', '.join(objects)}]",
    }[kind]
    parts, rest = [], said
    for cut in cuts:
        parts, rest = [*parts, rest[:cut]], rest[cut:]
    text, found = read(use(kind).parser(), *parts, rest)
    assert text == ""
    assert [(name, json.loads(given)) for name, given in found] == calls


@given(st.sampled_from(list(ToolFormat)), st.text(alphabet='<>{}[]|":,; tool_call/TOOL_CALLS"name"parameters\n\\'))
def test_no_text_breaks_a_parser_or_loses_what_is_no_call(kind: ToolFormat, said: str) -> None:
    text, calls = read(use(kind).parser(), said)
    again, same = read(use(kind).parser(), *said)
    assert (text, calls) == (again, same)
    if not any(mark in said for mark in ("<tool_call>", "[TOOL_CALLS]", "python_tag", "name")):
        assert not calls
        assert text.strip() == said.strip()


def test_formats_are_known_by_their_templates() -> None:
    hermes = "{% if tools %}<tools>{{ tools }}</tools> answer in <tool_call></tool_call>{% endif %}"
    llama = '{% if tools is not none %}Respond as {"name": function name, "parameters": ...}{% endif %}'
    mistral = "{% if tools %}[AVAILABLE_TOOLS]{{ tools }}{% endif %}{{ '[TOOL_CALLS]' }}"
    assert [format_of(text) for text in (hermes, llama, mistral)] == list(ToolFormat)
    assert format_of("{% if tools %}{{ tools }}{% endif %}") is None
    assert knows_tools("{% if tools %}{{ tools }}{% endif %}")
    for text in ("", "<tool_call>", "{{ toolset }} [TOOL_CALLS]"):
        assert format_of(text) is None
        assert not knows_tools(text)
