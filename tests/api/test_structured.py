"""What clients may say of the form of an answer, and what becomes of it."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest
from llguidance import LLMatcher
from openai import AsyncOpenAI

from server.api.structured import StructuredOutputs
from server.engine.grammar_check import source
from server.engine.types import Grammar, GrammarKind
from tests.api.house import BASE, House, error

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_SCHEMA, '{"type": "object"}'),
        (schema_format(SCHEMA), GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
        ({"structured_outputs": {"regex": "[0-9]+"}}, GrammarKind.REGEX, "[0-9]+"),
        ({"structured_outputs": {"choice": ["yes", 'no "é"']}}, GrammarKind.LARK, 'start: "yes" | "no \\"é\\""'),
        ({"structured_outputs": {"choice": ["\x7f\\"]}}, GrammarKind.LARK, 'start: "\\u007f\\\\"'),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, GrammarKind.LARK, 'start: "x"'),
    ],
)
async def test_it_reaches_the_engine(house: House, body: Any, kind: GrammarKind, text: str) -> None:
    for response in (await house.chat(**body), await house.complete(**body)):
        assert response.status_code == 200, response.text
        assert house.engine.streams[-1].request.sampling.grammar == Grammar(kind, text)


@pytest.mark.parametrize("body", [{"response_format": {"type": "text"}}, {"response_format": None}])
async def test_text_is_anything(house: House, body: Any) -> None:
    assert (await house.chat(**body)).status_code == 200
    assert house.engine.streams[-1].request.sampling.grammar is None


async def test_the_client_parses(house: House, openai: AsyncOpenAI) -> None:
    class Answer(pydantic.BaseModel):
        a: int

    house.engine.reply = lambda _: b'{"a": 5}'
    answer = await openai.chat.completions.parse(
        model=BASE, messages=[{"role": "user", "content": "x"}], response_format=Answer
    )
    assert answer.choices[0].message.parsed == Answer(a=5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "n", "schema": {}}}},
            "response_format.json_schema",
        ),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs"),
        (schema_format({"nonsense": 1}), "response_format"),
        (schema_format(json.loads('{"not":' * 101 + "{}" + "}" * 101)), "response_format.json_schema.schema"),
    ],
)
async def test_refused(house: House, body: Any, param: str) -> None:
    assert error(await house.chat(**body), 400)["param"] == param
    assert house.engine.streams == []


@pytest.mark.parametrize("schema", [{"enum": ["\ud800"]}, {"properties": {"\udfff": {}}}, {"\udfff": 1}])
async def test_half_characters_in_a_schema_are_refused(house: House, schema: Any) -> None:
    content = json.dumps({"model": BASE, "prompt": "x", "structured_outputs": {"json": schema}})  # httpx cannot
    response = await house.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert error(response, 400)["param"] == "structured_outputs.json"


def test_every_character_can_be_a_choice() -> None:
    choices = [chr(code) for code in (*range(0x100), 0x2028, 0xFEFF, 0xFFFF, 0x1F600)]
    grammar = StructuredOutputs(choice=choices).to_grammar()
    assert LLMatcher.validate_grammar(source(grammar.kind, grammar.text)) == ""
