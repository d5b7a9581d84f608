"""Text completions through the official client."""

from __future__ import annotations

import pytest
from openai import AsyncOpenAI

from tests.api.dummy_engine import CONTEXT
from tests.api.house import BASE, CRON, FRENCH, House, error, events

pytestmark = pytest.mark.anyio


async def test_answer(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model=BASE, prompt="abc", max_tokens=50)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("base heard: abc", "stop", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 15)


async def test_sixteen_tokens_by_default(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model=BASE, prompt="a long enough prompt")
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


async def test_a_length_nobody_asked_for_is_shortened(house: House) -> None:
    """Only what the client asks for itself can be too much."""
    answer = (await house.complete("a" * (CONTEXT - 5))).json()
    assert answer["usage"]["completion_tokens"] == 5
    assert error(await house.complete("a" * (CONTEXT - 5), max_tokens=6), 400)["code"] == "context_length_exceeded"
    assert error(await house.complete("a" * CONTEXT), 400)["code"] == "context_length_exceeded"


async def test_stream(openai: AsyncOpenAI) -> None:
    stream = await openai.completions.create(
        model=BASE, prompt="abc", max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "base heard: abc"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 18


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
async def test_prompts_of_every_shape(openai: AsyncOpenAI, prompt: object, texts: list[str]) -> None:
    answer = await openai.completions.create(model=BASE, prompt=prompt, max_tokens=50)
    assert [choice.text for choice in answer.choices] == [f"base heard: {text}" for text in texts]
    assert answer.usage.prompt_tokens == sum(map(len, texts))


async def test_prompts_times_n(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model=BASE, prompt=["x", "y"], n=2, seed=5, max_tokens=50)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "base #5 heard: x"),
        (1, "base #6 heard: x"),
        (2, "base #5 heard: y"),
        (3, "base #6 heard: y"),
    ]


async def test_each_prompt_is_routed(house: House) -> None:
    prompts = [CRON[0], FRENCH[0], "How high is the tallest mountain in Africa?"]
    response = await house.complete(prompts, model="auto")
    mixes = [mix.split("=")[0] for mix in response.headers["x-switchyard-mix"].split("; ")]
    assert mixes == ["cron", "french", "base"]
    origin = response.json()["usage"]["switchyard"]
    assert (origin["mix"], origin["reason"]) == (None, "per_prompt")
    assert [[part["id"] for part in prompt["mix"]] for prompt in origin["prompts"]] == [["cron"], ["french"], []]


async def test_prompts_that_agree_share_an_origin(house: House) -> None:
    response = await house.complete(["a", "b"], model="cron")
    assert response.headers["x-switchyard-mix"] == "cron=1"
    assert response.json()["usage"]["switchyard"]["mix"][0]["id"] == "cron"


async def test_tokens_are_routed_by_their_text(house: House) -> None:
    response = await house.complete(list(CRON[0].encode()), model="auto")
    assert response.headers["x-switchyard-mix"].startswith("cron=")


async def test_streams_of_several_prompts_interleave(house: House) -> None:
    texts = ["", ""]
    for chunk in events(await house.complete(["x", "y"], stream=True)):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["base heard: x", "base heard: y"]


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        ("", "prompt", "invalid_request"),
        ([], "prompt", "invalid_value"),
        ([[]], "prompt[0]", "invalid_value"),
        ([""], "prompt", "invalid_request"),
        (None, "prompt", "invalid_value"),
        (7, "prompt", "invalid_value"),
        ([1, "a"], "prompt[1]", "invalid_value"),
        (["a", 1], "prompt[1]", "invalid_value"),
        ([[1], [-1]], "prompt[1][0]", "invalid_value"),
        ([True], "prompt[0]", "invalid_value"),
        ([300], "prompt", "invalid_request"),
        ("a" * 5000, "prompt", "context_length_exceeded"),
    ],
)
async def test_prompts_that_cannot_be(house: House, prompt: object, param: str, code: str) -> None:
    detail = error(await house.complete(prompt), 400)
    assert (detail["param"], detail["code"]) == (param, code)
    assert house.engine.open == 0
