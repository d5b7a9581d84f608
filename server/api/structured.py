"""What an answer must look like, as clients say it: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from server.api.conditions import GIVEN, NOT_GIVEN, Rules, exactly_one, has, lacks, when
from server.api.wire import FreeForm, Text, Wire, fault
from server.engine.types import Grammar, GrammarKind

MAX_CHOICES = 1024
UNSTRUCTURED = {"anyOf": [NOT_GIVEN, has(type={"const": "text"})]}
"""A `response_format` that asks for nothing."""


class JsonSchema(Wire):
    """A JSON Schema. Always followed strictly: a keyword that cannot be kept is refused."""

    name: Text = Field(min_length=1, max_length=64)
    description: Text | None = None
    schema_: FreeForm = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    """Anything, a JSON object, or JSON that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    between: ClassVar[Rules] = (
        when(has(type={"const": "json_schema"}), has(json_schema=GIVEN), lacks(json_schema=NOT_GIVEN)),
    )

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault("response_format.json_schema", "belongs to the type json_schema, and to no other")
        return self

    def to_grammar(self) -> Grammar | None:
        """What the engine is told."""
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.schema_
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


class StructuredOutputs(Wire):
    """vLLM's way to say it: one of these."""

    json_: FreeForm | None = Field(None, alias="json", description="A JSON Schema.")
    regex: Text | None = Field(None, min_length=1, description="A regular expression for the whole answer.")
    choice: list[Text] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, fail_fast=True, description="One of these texts."
    )
    grammar: Text | None = Field(None, min_length=1, description="A Lark grammar.")

    between: ClassVar[Rules] = (exactly_one("json", "regex", "choice", "grammar"),)

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise fault("structured_outputs", "give one of json, regex, choice and grammar")
        return self

    def to_grammar(self) -> Grammar:
        """What the engine is told."""
        param = "structured_outputs"
        if self.json_ is not None:
            return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(self.json_), param)
        if self.regex is not None:
            return Grammar(GrammarKind.REGEX, self.regex, param)
        if self.choice is not None:
            return Grammar(GrammarKind.LARK, f"start: {' | '.join(map(_quoted, self.choice))}", param)
        return Grammar(GrammarKind.LARK, self.grammar or "", param)


class StructuredFields(Wire):
    """What an answer must look like, in both endpoints."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    between: ClassVar[Rules] = (when(has(structured_outputs=GIVEN), lacks(response_format=UNSTRUCTURED)),)

    @model_validator(mode="after")
    def _check_structure(self) -> Self:
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            raise fault("structured_outputs", "not together with response_format: give one of them")
        return self

    def to_grammar(self) -> Grammar | None:
        """What the engine is told."""
        form = self.structured_outputs or self.response_format
        return None if form is None else form.to_grammar()


def _quoted(text: str) -> str:
    """A text in a Lark grammar, which takes JSON's strings; but DEL, unlike in JSON, only escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
