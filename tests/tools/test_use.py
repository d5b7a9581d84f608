"""Grammars of calls that are required."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from server.engine.grammar_check import source
from server.tools.use import ToolFormat, ToolUse

TOOL = {"type": "function", "function": {"name": "plan", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
BEFORE = {ToolFormat.HERMES: b'<tool_call>\n{"name"', ToolFormat.LLAMA: b'{"name"', ToolFormat.MISTRAL: b'[{"name"'}


@pytest.mark.parametrize("kind", list(ToolFormat))
@pytest.mark.parametrize("several", [False, True])
def test_a_model_cannot_go_on_with_spaces_for_ever(kind: ToolFormat, several: bool) -> None:
    grammar = ToolUse((TOOL,), kind, must_call=True, parallel=several).grammar()
    assert grammar is not None
    matcher = LLMatcher(LLTokenizer("byte"), source(grammar.kind, grammar.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    for byte in BEFORE[kind]:
        assert matcher.consume_token(byte)
    spaces = 0
    while matcher.consume_token(ord(" ")):
        spaces += 1
        assert spaces < 100
    assert spaces > 8, "written with indentation it is JSON too"
    assert "x-guidance" not in json.dumps(TOOL), "what the client sent stays as it is"
