"""Conversations that a chat template cannot write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.engine.tokenizer import ModelTokenizer
from server.engine.types import Message
from store.errors import ChatTemplateError
from tests.tiny import tokenizer


def test_what_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    plain = tokenizer()
    plain.chat_template = "{{ tools | tojson }}"
    plain.save_pretrained(tmp_path)
    made = ModelTokenizer(tmp_path)
    tools = [json.loads('{"a":' * levels + "1" + "}" * levels) for levels in (3, 900)]
    messages: list[Message] = [{"role": "user", "content": "x"}]
    assert made.decode(made.encode_chat(messages, tools[:1])) == '[{"a": {"a": {"a": 1}}}]'
    with pytest.raises(ChatTemplateError, match="refuses"):
        made.encode_chat(messages, tools[1:])
