"""Calls that are required, by a real engine: a random model, which knows no tool, calls one as it may be called."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import pytest

from server.tools.use import ToolFormat, ToolUse
from store.mix import BASE_MIX
from tests.engine.conftest import Library, collect, running
from tests.tools.test_parsers import read

CITIES = {"type": "object", "properties": {"city": {"$ref": "#/definitions/hour"}}, "required": ["city"],
          "additionalProperties": False, "definitions": {"hour": {"enum": ["Rome", "Oslo"]}}}  # fmt: skip
REFERRING = {"type": "object", "properties": {"at": {"$ref": "#/$defs/hour"}}, "required": ["at"],
             "additionalProperties": False, "$defs": {"hour": {"enum": [0, 12]}}}  # fmt: skip
TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "weather", "parameters": CITIES}},
    {"type": "function", "function": {"name": "time", "parameters": REFERRING}},
    {"type": "function", "function": {"name": "stop"}},
)


@pytest.mark.parametrize("kind", list(ToolFormat))
def test_a_required_call_is_one_that_exists(library: Library, kind: ToolFormat) -> None:
    async def body() -> None:
        one = ToolUse(TOOLS[:2], kind, must_call=True, parallel=False)
        named = ToolUse(TOOLS, kind, must_call=True, only="weather")
        async with running(library) as engine:
            for use in (one, named):
                grammar = use.grammar()
                assert grammar is not None
                await engine.check_grammar(grammar)
                ask = partial(collect, engine, [5, 6, 7], BASE_MIX, 300, grammar=grammar, temperature=1.5)
                for tokens, _ in await asyncio.gather(*(ask(seed=seed) for seed in range(3))):
                    text, calls = read(use.parser(), engine.tokenizer.decode(tokens, special=True))
                    assert not text
                    (name, arguments), = calls  # fmt: skip
                    assert name == "weather" or use is one
                    given = json.loads(arguments)
                    assert given in (
                        [{"city": "Rome"}, {"city": "Oslo"}] if name == "weather" else [{"at": 0}, {"at": 12}]
                    )

    asyncio.run(body())


@pytest.mark.parametrize("kind", list(ToolFormat))
def test_several_calls_may_follow_each_other(library: Library, kind: ToolFormat) -> None:
    async def body() -> None:
        use = ToolUse(TOOLS[:2], kind, must_call=True)
        grammar = use.grammar()
        assert grammar is not None
        async with running(library) as engine:
            tokens, _ = await collect(engine, [5], BASE_MIX, 200, grammar=grammar, temperature=1.5, seed=1)
            _, calls = read(use.parser(), engine.tokenizer.decode(tokens, special=True))
            assert calls
            assert {name for name, _ in calls} <= {"weather", "time"}

    asyncio.run(body())
