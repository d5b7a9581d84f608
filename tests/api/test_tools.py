"""Tools in chat completions: what the model is told, what clients are answered, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from server.engine.types import EngineRequest, GrammarKind
from tests.api.house import BASE, House, error, events, open_house

pytestmark = pytest.mark.anyio

TEMPLATE = "{% if tools %}{{ tools }} answer in <tool_call></tool_call>{% endif %}"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TWO = f'I look.\n{CALL}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>'
ASK: Any = [{"role": "user", "content": "How is the weather in Rome?"}]


def defined(parameters: Any) -> Any:
    return {"type": "function", "function": {"name": "time", "parameters": parameters}}


def called(arguments: str) -> list[Any]:
    function = {"name": "time", "arguments": arguments}
    return [*ASK, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}]


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.fixture(scope="module")
async def tool_house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    from tests.api.dummy_engine import DummyEngine

    engine = DummyEngine()
    engine.tokenizer.chat_template = TEMPLATE
    async with open_house(tmp_path_factory.mktemp("tools"), engine=engine) as house:
        yield house


@pytest.fixture
def house(tool_house: House) -> House:
    tool_house.engine.reset()
    return tool_house


@pytest.fixture
def client(house: House) -> AsyncOpenAI:
    return house.openai()


def says(house: House, text: str) -> None:
    house.engine.reply = lambda request: text.encode()


def prompt_of(request: EngineRequest) -> str:
    return bytes(request.prompt).decode()


async def test_the_model_is_told_of_tools_and_calls_come_back(house: House, client: AsyncOpenAI) -> None:
    says(house, TWO)
    answer = await client.chat.completions.create(model=BASE, messages=ASK, tools=[WEATHER, TIME])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    assert choice.message.tool_calls
    calls: Any = choice.message.tool_calls
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", "weather", '{"city": "Rome"}'),
        ("function", "time", "{}"),
    ]
    assert len({call.id for call in calls}) == 2
    request = house.engine.streams[-1].request
    assert json.dumps(WEATHER) in prompt_of(request)
    assert request.sampling.grammar is None


@pytest.mark.parametrize("n", [1, 2])
async def test_streamed_calls_are_put_together_by_the_official_client(
    house: House, client: AsyncOpenAI, n: int
) -> None:
    says(house, TWO)
    finished: dict[int, str] = {}
    text = dict.fromkeys(range(n), "")
    calls: dict[tuple[int, int], list[str]] = {}
    stream = await client.chat.completions.create(model=BASE, messages=ASK, tools=[WEATHER, TIME], stream=True, n=n)
    async for chunk in stream:
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                assert call.function
                key = choice.index, call.index
                if call.id:
                    assert key not in calls, "an id comes once, with the name"
                    calls[key] = [call.id, call.function.name or "", ""]
                calls[key][2] += call.function.arguments or ""
            finished |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert finished == dict.fromkeys(range(n), "tool_calls")
    assert text == dict.fromkeys(range(n), "I look.")
    assert {key: call[1:] for key, call in calls.items()} == {
        (i, j): made for i in range(n) for j, made in enumerate([["weather", '{"city": "Rome"}'], ["time", "{}"]])
    }


async def test_text_without_calls_is_an_answer_as_ever(house: House) -> None:
    says(house, "It is warm <b>today</b>.")
    whole = (await house.chat(tools=[WEATHER])).json()["choices"][0]
    assert whole["message"] == {"role": "assistant", "content": "It is warm <b>today</b>.", "refusal": None}
    assert whole["finish_reason"] == "stop"
    chunks = events(await house.chat(tools=[WEATHER], stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "It is warm <b>today</b>."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_only_calls_have_no_content_and_an_answer_that_ran_out_says_so(house: House) -> None:
    says(house, CALL)
    whole = (await house.chat(tools=[WEATHER])).json()["choices"][0]
    assert whole["message"]["content"] is None
    cut = (await house.chat(tools=[WEATHER], max_tokens=len(CALL) - 20)).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    chunks = events(await house.chat(tools=[WEATHER], max_tokens=len(CALL) - 20, stream=True))
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_none_tells_the_model_nothing_and_reads_nothing(house: House) -> None:
    says(house, CALL)
    whole = (await house.chat(tools=[WEATHER], tool_choice="none")).json()["choices"][0]
    assert whole["message"]["content"] == CALL
    assert "weather" not in prompt_of(house.engine.streams[-1].request).replace("hello", "")


async def test_one_call_at_a_time(house: House) -> None:
    says(house, TWO)
    whole = (await house.chat(tools=[WEATHER, TIME], parallel_tool_calls=False)).json()["choices"][0]
    assert [call["function"]["name"] for call in whole["message"]["tool_calls"]] == ["weather"]


@pytest.mark.parametrize(
    ("choice", "names", "several"),
    [("required", ["weather", "time"], True), ({"type": "function", "function": {"name": "time"}}, ["time"], False)],
)
async def test_a_call_that_is_required_is_a_grammar(house: House, choice: Any, names: list[str], several: bool) -> None:
    says(house, CALL)
    assert (await house.chat(tools=[WEATHER, TIME], tool_choice=choice)).status_code == 200
    grammar = house.engine.streams[-1].request.sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.param) == (GrammarKind.LARK, "tool_choice")
    assert [name for name in ("weather", "time") if f'"const": "{name}"' in grammar.text] == names
    assert (")*" in grammar.text) == several


async def test_logprobs_come_with_calls(house: House) -> None:
    says(house, CALL)
    whole = (await house.chat(tools=[WEATHER], logprobs=True)).json()["choices"][0]
    told = len(whole["logprobs"]["content"])
    chunks = events(await house.chat(tools=[WEATHER], logprobs=True, stream=True))
    streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert sum(len(one["content"]) for one in streamed) == told


async def test_a_conversation_goes_on_with_the_answer_of_a_tool(house: House, client: AsyncOpenAI) -> None:
    says(house, CALL)
    first = await client.chat.completions.create(model=BASE, messages=ASK, tools=[WEATHER])
    message = first.choices[0].message
    assert message.tool_calls
    says(house, "Warm.")
    turns = [*ASK, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "25 degrees"}]
    second = await client.chat.completions.create(model=BASE, messages=turns, tools=[WEATHER])
    assert second.choices[0].message.content == "Warm."
    told = prompt_of(house.engine.streams[-1].request)
    assert '"arguments": {"city": "Rome"}' in told, "templates want arguments as an object"
    assert "tool: 25 degrees" in told


async def test_an_error_in_the_middle_of_a_call_is_an_event(house: House) -> None:
    says(house, CALL)
    house.engine.failure, house.engine.fail_after = RuntimeError("boom"), 40
    answer = await house.chat(tools=[WEATHER], stream=True)
    blocks = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert blocks[-1]["error"]["code"] == "internal_error"
    assert "boom" not in answer.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tools": [TIME], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "a b"}}},
         "tool_choice.function.name"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "time", "word": 1}}},
         "tool_choice.function.word"),
        *(({"tools": [defined({"$defs": bad})], "tool_choice": "required"}, "tools[0].function.parameters")
          for bad in ([], None, 3)),
        ({"tools": [defined(json.loads(deep(900)))], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [defined({"description": "\ud800"})]}, "tools[0].function.parameters"),
        *(({"messages": called(arguments)}, "messages[1].tool_calls[0].function.arguments")
          for arguments in (deep(101), deep(100_000), '{"a": "\\ud800"}', '{"\\ud800": 1}', "null", "1" * 5000)),
        ({"tools": [TIME], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [ASK[0], {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "time", "arguments": "[1]"}}]}]},
         "messages[1].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "time", "arguments": ""}}]}]},
         "messages[0].tool_calls"),
    ],
)  # fmt: skip
async def test_bad_tools_are_named(house: House, body: dict[str, Any], param: str) -> None:
    # By hand: httpx cannot send half a surrogate pair.
    content = json.dumps({"model": BASE, "messages": ASK, **body})
    answer = await house.http.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    detail = error(answer, 400)
    assert detail["param"] == param
    assert detail["message"].startswith(f"{param}: ")
    assert "Value error" not in detail["message"]


async def test_arguments_may_be_as_deep_as_any_tool_needs(house: House) -> None:
    says(house, "Warm.")
    assert (await house.chat(messages=called(deep(90)), tools=[defined(json.loads(deep(90)))])).status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        CALL[: CALL.index("Rome")],
        CALL[: CALL.index("}") + 1],
        CALL[: CALL.index("arguments")],
        '<tool_call>{"name": "time", "arguments": null}</tool_call>',
        '<tool_call>{"name": "time", "arguments": 3}</tool_call>',
    ],
)
async def test_streamed_and_whole_answers_end_for_the_same_reason(house: House, said: str) -> None:
    says(house, said)
    whole = (await house.chat(tools=[WEATHER, TIME])).json()["choices"][0]
    assert whole["finish_reason"] == ("tool_calls" if "tool_calls" in whole["message"] else "stop")
    chunks = [chunk["choices"][0] for chunk in events(await house.chat(tools=[WEATHER, TIME], stream=True))]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    told = "".join(call["function"]["arguments"] for call in calls)
    assert told == "".join(call["function"]["arguments"] for call in whole["message"].get("tool_calls", []))


async def test_a_base_that_cannot_call_tools_says_so(house: House, shared_house: House) -> None:
    shared_house.engine.reset()  # as other tests left it
    detail = error(await shared_house.chat(tools=[WEATHER]), 400)
    assert (detail["param"], detail["code"]) == ("tools", "unsupported_parameter")
    assert "chat template" in detail["message"]
    assert (await shared_house.chat(tools=[WEATHER], tool_choice="none")).status_code == 200
    assert (await shared_house.chat(tools=[], tool_choice="auto", parallel_tool_calls=True)).status_code == 200
