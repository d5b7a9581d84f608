"""Log-probabilities in both wire formats, whole and streamed, of answers and of prompts."""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI

from server.engine.types import Likelihood
from tests.api.house import BASE, House, error, events

pytestmark = pytest.mark.anyio

HELLO: Any = [{"role": "user", "content": "hello"}]


def echoing(house: House, reply: bytes) -> None:
    house.engine.reply = lambda _: reply


async def test_chat(house: House, openai: AsyncOpenAI) -> None:
    echoing(house, "né".encode())
    answer = await openai.chat.completions.create(model=BASE, messages=HELLO, logprobs=True, top_logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [(one.token, one.bytes) for one in told.content] == [
        ("n", [0x6E]),
        ("bytes:\\xc3", [0xC3]),
        ("bytes:\\xa9", [0xA9]),
        ("<special>", list(b"<special>")),  # what ended the answer
    ]
    assert told.content[0].logprob == -1.10
    assert [(top.token, top.logprob) for top in told.content[0].top_logprobs] == [("n", -1.1), ("o", -2.1)]
    bare = await openai.chat.completions.create(model=BASE, messages=HELLO, logprobs=True)
    assert bare.choices[0].logprobs is not None
    assert all(one.top_logprobs == [] for one in bare.choices[0].logprobs.content or ())
    assert (await openai.chat.completions.create(model=BASE, messages=HELLO)).choices[0].logprobs is None


@pytest.mark.parametrize("stop", [None, "nd"])
async def test_a_stream_tells_the_same_as_the_whole(house: House, stop: str | None) -> None:
    echoing(house, "begin and end é".encode())
    ask = {"logprobs": True, "top_logprobs": 3, "stop": stop, "n": 2}
    whole = (await house.chat(**ask)).json()["choices"]
    for index in range(2):
        told, text = [], ""
        for chunk in events(await house.chat(**ask, stream=True)):
            [choice] = chunk["choices"]
            if choice["index"] == index:
                text += choice["delta"].get("content", "")
                told += (choice["logprobs"] or {"content": []})["content"]
        assert text == whole[index]["message"]["content"] == ("begin a" if stop else "begin and end é")
        assert told == whole[index]["logprobs"]["content"]
        assert len(told) == (len(b"begin and") if stop else len("begin and end é".encode()) + 1)


async def test_completions(house: House, openai: AsyncOpenAI) -> None:
    echoing(house, "né!".encode())
    answer = await openai.completions.create(model=BASE, prompt="abc", logprobs=1)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens == ["n", "bytes:\\xc3", "bytes:\\xa9", "!", "<special>"]
    assert told.text_offset == [0, 1, 1, 2, 3]
    assert told.token_logprobs == [-1.1, -1.95, -1.69, -0.33, -2.56]
    assert told.top_logprobs is not None
    assert told.top_logprobs[0] == {"n": -1.1}
    assert (await openai.completions.create(model=BASE, prompt="abc")).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "texts"), [("abé", ["abé"]), ([[97, 98], [99]], ["ab", "c"]), (["x", "y"], ["x", "y"])]
)
async def test_echo_begins_with_the_prompt(house: House, prompt: Any, texts: list[str], stream: bool) -> None:
    """As evaluation harnesses ask for it: the prompt's likelihoods, and one token of the answer."""
    ask = {"echo": True, "logprobs": 1, "max_tokens": 1, "stop": ["a", "x"], "stream": stream}
    choices = [{"text": "", "logprobs": {"tokens": [], "token_logprobs": [], "text_offset": []}} for _ in texts]
    if stream:
        for chunk in events(await house.complete(prompt, **ask)):
            [piece] = chunk["choices"]
            whole: Any = choices[piece["index"]]
            whole["text"] += piece["text"]
            for name in whole["logprobs"]:
                whole["logprobs"][name] += (piece["logprobs"] or {}).get(name, [])
    else:
        choices = (await house.complete(prompt, **ask)).json()["choices"]
    for text, choice in zip(texts, choices, strict=True):
        told: Any = choice["logprobs"]
        assert choice["text"] == text + "b"  # stop strings are looked for in the answer only
        count = len(text.encode())
        assert len(told["tokens"]) == count + 1
        assert told["token_logprobs"][0] is None
        assert told["token_logprobs"][1:] == [-byte / 100 for byte in (text.encode() + b"b")[1:]]
        assert told["text_offset"][-1] == len(text)


async def test_a_prompt_alone(house: House, openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model=BASE, prompt="abc", max_tokens=0, echo=True, logprobs=2)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.98, -0.99]
    assert choice.logprobs.top_logprobs == [None, {"b": -0.98, "c": -1.98}, {"c": -0.99, "d": -1.99}]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    plain = await openai.completions.create(model=BASE, prompt="abc", echo=True, max_tokens=3)
    assert (plain.choices[0].text, plain.choices[0].logprobs) == ("abcbas", None)


async def test_a_probability_of_zero_is_a_number(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no infinity."""
    monkeypatch.setattr("tests.api.dummy_engine.likelihood", lambda token, _: Likelihood(token, -float("inf")))
    [choice] = (await house.chat(logprobs=True, max_tokens=1)).json()["choices"]
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
    ],
)
async def test_refused(house: House, body: dict[str, Any], param: str) -> None:
    detail = error(await house.complete(**body), 400)
    assert (detail["param"], detail["code"]) == (param, "invalid_value")
