"""Answers follow their grammars, whatever the model would rather say; bad grammars are refused in bounded time."""

from __future__ import annotations

import asyncio
import json
import re
from functools import partial

import pytest

from server.engine.grammar import Grammars
from server.engine.types import EngineRequest, FinishReason, Grammar, GrammarKind, SamplingParams
from store.errors import InvalidRequestError
from store.mix import BASE_MIX
from tests.engine.conftest import Library, collect, running

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}
JSON = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
PHONE = Grammar(GrammarKind.REGEX, "[0-9]{3}-[0-9]{4}")
CHOICE = Grammar(GrammarKind.LARK, 'start: "yes" | "no"')


def test_answers_follow_their_grammars(library: Library) -> None:
    """Greedy and random, beside free neighbours, which must not notice. A random model knows no grammar at all."""

    async def body() -> None:
        async with running(library) as engine:
            for grammar in (JSON, PHONE, CHOICE):
                await engine.check_grammar(grammar)
            ask = partial(collect, engine, [5, 6, 7], BASE_MIX)
            together = await asyncio.gather(
                ask(20),
                *(ask(200, grammar=JSON, temperature=1.5, seed=seed) for seed in range(4)),
                ask(20, grammar=PHONE),
                ask(20, grammar=PHONE, min_tokens=15, logit_bias=((97, 100.0),)),
                ask(20, grammar=CHOICE),
                ask(3, grammar=PHONE),
            )
            texts = [engine.tokenizer.decode(tokens) for tokens, _ in together]
            assert together[0][0] == library.greedy(BASE_MIX, [5, 6, 7], 20)
            for text in texts[1:5]:
                answer = json.loads(text)
                assert answer["colour"] in ("red", "blue")
                assert 0 <= answer["n"] <= 99
            assert all(re.fullmatch(PHONE.text, text) for text in texts[5:7])
            assert texts[7] in ("yes", "no")
            assert [finish for _, finish in together[1:]] == [FinishReason.STOP] * 7 + [FinishReason.LENGTH]

    asyncio.run(body())


def test_a_grammar_that_was_not_announced_is_compiled_at_the_door(library: Library) -> None:
    async def body() -> None:
        async with running(library) as engine:
            tokens, _ = await collect(engine, [1], BASE_MIX, 9, grammar=CHOICE)
            assert engine.tokenizer.decode(tokens) in ("yes", "no")
            with pytest.raises(InvalidRequestError) as refused:
                await engine.check_grammar(Grammar(GrammarKind.REGEX, "(", "structured_outputs"))
            assert refused.value.param == "structured_outputs"
            with pytest.raises(InvalidRequestError):
                engine.submit(EngineRequest((1,), SamplingParams(grammar=Grammar(GrammarKind.LARK, "nonsense"))))

    asyncio.run(body())


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "nothing"})),
        Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"$ref": "#/nowhere"})),
        Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "object", "unevaluatedProperties": False})),
        Grammar(GrammarKind.JSON_SCHEMA, '{"not": ' * 5000 + "{}" + "}" * 5000),
        Grammar(GrammarKind.JSON_SCHEMA, "{"),
        Grammar(GrammarKind.REGEX, "a("),
        Grammar(GrammarKind.LARK, "start: nowhere"),
        # Whether these have a text in common takes a compiler longer than anyone waits.
        Grammar(
            GrammarKind.JSON_SCHEMA,
            json.dumps({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(20)]}),
        ),
    ],
)
def test_bad_grammars_are_refused_before_a_tokenizer_is_made(grammar: Grammar) -> None:
    grammars = Grammars(lambda: pytest.fail("not needed"))
    with pytest.raises(InvalidRequestError, match="cannot be used") as refused:
        grammars.matcher(grammar)
    assert refused.value.param == "response_format"
    assert not grammars.has(grammar)
