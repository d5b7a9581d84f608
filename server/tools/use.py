"""One request's tools: which there are, whether they must be called, and how the model is told and understood."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from server.engine.grammar_check import WHITESPACE
from server.engine.types import Grammar, GrammarKind
from server.tools.parsers import HermesParser, LlamaParser, MistralParser, ToolParser


class ToolFormat(StrEnum):
    """How a model writes calls."""

    HERMES = "hermes"
    """`<tool_call>{...}</tool_call>`: Hermes, Qwen 2.5 and 3, and many others."""
    LLAMA = "llama3_json"
    """`{"name": ..., "parameters": {...}}`: Llama 3.1 and later."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS]...`: Mistral."""


DEFINITIONS = ("$defs", "definitions")
"""Where a schema keeps parts that it refers to; an object each."""

_MARKS = {
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
    ToolFormat.LLAMA: '"parameters"',
}


def knows_tools(template: str) -> bool:
    """Whether a chat template does anything with tools."""
    return re.search(r"\btools\b", template) is not None


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, by the marks it holds; None if it is none that is known."""
    if not knows_tools(template):
        return None
    return next((kind for kind, mark in _MARKS.items() if mark in template), None)


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request.

    Attributes:
        definitions: as clients define them and chat templates take them.
        must_call: an answer is calls, and nothing else.
        only: the one that must be called.
        parallel: whether an answer may hold more than one call.
    """

    definitions: tuple[Mapping[str, Any], ...]
    format: ToolFormat
    must_call: bool = False
    only: str | None = None
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.definitions)

    @property
    def template_tools(self) -> list[dict[str, Any]]:
        """The definitions for the chat template, which the template may change."""
        copied: list[dict[str, Any]] = json.loads(json.dumps(self.definitions))
        return copied

    def parser(self) -> ToolParser:
        """For one answer."""
        most = None if self.parallel and self.only is None else 1
        if self.format is ToolFormat.HERMES:
            return HermesParser(self.names, most)
        if self.format is ToolFormat.LLAMA:
            return LlamaParser(self.names, most)
        return MistralParser(self.names, most, begun=self.must_call)

    def call_id(self, fresh: str) -> str:
        """An id for a call, of random hexadecimal digits. Mistral's templates want nine letters or digits."""
        return fresh[:9] if self.format is ToolFormat.MISTRAL else f"call_{fresh[:24]}"

    def grammar(self) -> Grammar | None:
        """What an answer must look like, where it must be a call."""
        if not self.must_call:
            return None
        wanted = [tool for tool in self.definitions if self.only in (None, tool["function"]["name"])]
        several = self.parallel and self.only is None
        if self.format is ToolFormat.MISTRAL:
            # The mark is a special token that text cannot spell: the list alone is what templates take back.
            call = _any_of(wanted, "arguments")
            array = {"type": "array", "$defs": call.pop("$defs", {}), "items": call, "minItems": 1}
            return Grammar(
                GrammarKind.JSON_SCHEMA, json.dumps(array if several else array | {"maxItems": 1}), "tool_choice"
            )
        if self.format is ToolFormat.LLAMA:
            call, before, after, between = _any_of(wanted, "parameters"), "", "", '"; "'
        else:
            call, before, after, between = (
                _any_of(wanted, "arguments"),
                '"<tool_call>\\n" ',
                ' "\\n</tool_call>"',
                '"\\n"',
            )
        more = f" ({between} call)*" if several else ""
        # Inside a Lark grammar, only the schema itself can say that spaces come to an end.
        bounded = json.dumps(call | {"x-guidance": {"whitespace_pattern": WHITESPACE}})
        text = f"start: call{more}\ncall: {before}object{after}\nobject: %json {bounded}\n"
        return Grammar(GrammarKind.LARK, text, "tool_choice")


def _any_of(tools: Sequence[Mapping[str, Any]], arguments: str) -> dict[str, Any]:
    """A schema of one call of one of the tools."""
    calls = []
    definitions: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        function = tool["function"]
        parameters = dict(function.get("parameters") or {"type": "object", "properties": {}})
        for keyword in DEFINITIONS:
            definitions |= {f"{i}-{name}": _moved(part, i) for name, part in parameters.pop(keyword, {}).items()}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, arguments: _moved(parameters, i)},
                "required": ["name", arguments],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return schema | {"$defs": definitions} if definitions else schema


def _moved(schema: Any, i: int) -> Any:
    """A part of the i-th tool's schema for another root: what it refers to there has got another name."""
    if isinstance(schema, list):
        return [_moved(part, i) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, i) for key, value in schema.items()}
    if isinstance(target := schema.get("$ref"), str):
        moved["$ref"] = re.sub(r"^#/(\$defs|definitions)/", f"#/$defs/{i}-", target)
    return moved
