"""Chat completions through the official client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from store.record import ExpertRecord
from tests.api.house import BASE, CRON, House, error, events, make_expert, open_house

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "hello"}]


async def test_answer(house: House, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model=BASE, messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == BASE
    assert answer.system_fingerprint == f"fp_{house.engine.base.manifest.fingerprint[:12]}"
    [choice] = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "stop")
    assert choice.message.content == "base heard: user: hello"
    assert house.engine.open == 0


async def test_usage(house: House, openai: AsyncOpenAI) -> None:
    usage = (await openai.chat.completions.create(model=BASE, messages=HELLO)).usage
    assert usage.prompt_tokens == len("user: hello\nassistant: ")
    assert usage.completion_tokens == len("base heard: user: hello")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.switchyard == {"mix": [], "reason": "base_requested", "distance": None}
    assert usage.prompt_tokens_details.cached_tokens == 0


async def test_usage_tells_what_was_in_the_cache(house: House, openai: AsyncOpenAI) -> None:
    """Once per prompt, as its tokens are, however many answers it gets; streamed as well."""
    house.engine.cached_tokens = 16
    answer = await openai.chat.completions.create(model=BASE, messages=HELLO, n=3)
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    both = await openai.completions.create(model=BASE, prompt=["one prompt", "and another"], n=2)
    assert both.usage.prompt_tokens_details.cached_tokens == 32
    chunks = events(await house.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_stream(house: House, openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(model=BASE, messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "base heard: user: hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


async def test_stream_on_the_wire(house: House) -> None:
    response = await house.chat(stream=True)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert response.headers["x-switchyard-mix"] == "base"
    chunks = events(response)
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert chunks[-1]["choices"][0]["delta"] == {}


async def test_stream_with_usage(house: House) -> None:
    chunks = events(await house.chat(stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len("base heard: user: hello")
    assert chunks[-1]["usage"]["switchyard"]["reason"] == "base_requested"


async def test_several_choices(house: House, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model=BASE, messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    said = [choice.message.content for choice in answer.choices]
    assert said == [f"base #{seed} heard: user: hello" for seed in (7, 8, 9)]
    assert answer.usage.completion_tokens == sum(map(len, said))
    assert answer.usage.prompt_tokens == len("user: hello\nassistant: ")


async def test_several_choices_interleave(house: House, openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(model=BASE, messages=HELLO, n=2, seed=1, stream=True)
    texts, order = ["", ""], []
    async for chunk in stream:
        [choice] = chunk.choices
        order.append(choice.index)
        texts[choice.index] += choice.delta.content or ""
    assert texts == ["base #1 heard: user: hello", "base #2 heard: user: hello"]
    assert order[:4] != [0, 0, 0, 0]


async def test_greedy_needs_no_seed(house: House, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model=BASE, messages=HELLO, seed=1, temperature=0)
    assert answer.choices[0].message.content == "base heard: user: hello"
    sampling = house.engine.streams[0].request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.0, 1.0, 1)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_max_tokens(openai: AsyncOpenAI, field: str) -> None:
    answer = await openai.chat.completions.create(model=BASE, messages=HELLO, **{field: 6})
    assert answer.choices[0].message.content == "base h"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("heard", "base "),
        (["user", "se h"], "ba"),
        (["nowhere"], "base heard: user: hello"),
        ("base", ""),
        (None, "base heard: user: hello"),
        ([], "base heard: user: hello"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_span_tokens(house: House, stop: object, text: str, stream: bool) -> None:
    response = await house.chat(stop=stop, stream=stream)
    if stream:
        chunks = events(response)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        [choice] = response.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert house.engine.open == 0


async def test_usage_counts_up_to_the_stop(house: House) -> None:
    usage = (await house.chat(stop="heard")).json()["usage"]
    assert usage["completion_tokens"] == len("base heard")
    assert house.engine.generated == len("base heard")


async def test_characters_are_never_torn(house: House, openai: AsyncOpenAI) -> None:
    house.engine.reply = lambda _: "naïve 🚂 über".encode()
    stream = await openai.chat.completions.create(model=BASE, messages=HELLO, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == "naïve 🚂 über"
    assert "🚂" in pieces


async def test_what_ends_a_line_for_some_clients_ends_none_of_a_stream(house: House) -> None:
    """httpx takes these for line ends; the specification of events does not."""
    house.engine.reply = lambda _: "one\x85two\u2028three\u2029four\x0bfive\x1csix".encode()
    response = await house.chat(stream=True)
    assert [line for line in response.text.splitlines() if not line.startswith("data: ")] == [""] * response.text.count(
        "\n\n"
    )
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response))
    assert said == "one\x85two\u2028three\u2029four\x0bfive\x1csix"


async def test_an_unfinished_character_still_shows(house: House) -> None:
    answer = (await house.chat("hi", max_tokens=2)).json()
    assert answer["choices"][0]["message"]["content"] == "ba"
    house.engine.reply = lambda _: "é".encode()[:1]
    answer = (await house.chat("hi")).json()
    assert answer["choices"][0]["message"]["content"] == "\ufffd"


async def test_messages_of_every_role_and_shape(house: House, openai: AsyncOpenAI) -> None:
    first = await openai.chat.completions.create(model=BASE, messages=HELLO)
    messages = [
        {"role": "developer", "content": "be terse"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        first.choices[0].message,  # as clients append it, its null fields included
        {"role": "user", "content": "and now?"},
    ]
    await openai.chat.completions.create(model=BASE, messages=messages)
    prompt = bytes(house.engine.streams[-1].request.prompt).decode()
    assert prompt == (
        "system: be terse\nuser: one\ntwo\nassistant: base heard: user: hello\nuser: and now?\nassistant: "
    )


async def test_images_are_refused_in_words(house: House) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
    detail = error(
        await house.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]), 400
    )
    assert (detail["param"], detail["code"]) == ("messages[0].content[1].type", "unsupported_parameter")
    assert "image_url" in detail["message"]
    assert "reads text" in detail["message"]


async def test_who_speaks_is_left_to_the_chat_template(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    encode = house.engine.tokenizer.encode_chat

    def look(messages: Any, tools: Any = ()) -> list[int]:
        seen.extend(messages)
        return encode(messages, tools)

    monkeypatch.setattr(house.engine.tokenizer, "encode_chat", look)
    messages = [
        {"role": "user", "content": "how deep?", "name": "ada"},
        {"role": "assistant", "content": "deep", "name": "surveyor", "provider_specific_fields": {"refusal": None}},
        {"role": "user", "content": "and now?"},
    ]
    assert (await house.chat(messages=messages)).status_code == 200
    assert [message.get("name") for message in seen] == ["ada", "surveyor", None]
    assert all("provider_specific_fields" not in message for message in seen)


async def test_expert_by_name(house: House, openai: AsyncOpenAI) -> None:
    digest = house.registry.get("cron").digest
    raw = await openai.chat.completions.with_raw_response.create(model="cron", messages=HELLO)
    assert raw.headers["x-switchyard-mix"] == "cron=1"
    answer = raw.parse()
    assert answer.model == "cron"
    assert answer.choices[0].message.content == f"{digest[:8]}*1 heard: user: hello"
    mix = [{"id": "cron", "digest": digest, "weight": 1.0}]
    assert answer.usage.switchyard == {"mix": mix, "reason": "expert_requested", "distance": None}


@pytest.mark.parametrize("model", ["auto", BASE])
async def test_explicit_mix(house: House, openai: AsyncOpenAI, model: str) -> None:
    experts = [{"id": "cron", "weight": 1.5}, {"id": "french", "weight": -0.25}]
    raw = await openai.chat.completions.with_raw_response.create(
        model=model, messages=HELLO, extra_body={"experts": experts}
    )
    assert raw.headers["x-switchyard-mix"] == "cron=1.5,french=-0.25"
    weights = {house.registry.get(expert["id"]).digest: expert["weight"] for expert in experts}
    assert dict(house.engine.streams[-1].request.mix.parts) == weights
    origin = raw.parse().usage.switchyard
    assert origin["reason"] == "mix_requested"
    assert [(part["id"], part["weight"]) for part in origin["mix"]] == [("cron", 1.5), ("french", -0.25)]


async def test_weights_default_to_one_and_vanish_at_zero(house: House) -> None:
    response = await house.chat(experts=[{"id": "cron"}, {"id": "french", "weight": 0}])
    assert response.headers["x-switchyard-mix"] == "cron=1"
    response = await house.chat(experts=[{"id": "cron", "weight": 0.00001}])
    assert response.headers["x-switchyard-mix"] == "base"


async def test_auto_is_routed(house: House) -> None:
    response = await house.chat(CRON[3], model="auto")
    assert response.headers["x-switchyard-mix"].startswith("cron=")
    origin = response.json()["usage"]["switchyard"]
    assert origin["mix"][0]["id"] == "cron"
    assert origin["distance"] >= 0
    assert origin["reason"]


async def test_auto_looks_at_the_last_user_message(house: House) -> None:
    messages = [
        {"role": "user", "content": CRON[3]},
        {"role": "assistant", "content": "0 * * * *"},
        {"role": "user", "content": "How high is the tallest mountain in Africa?"},
        {"role": "assistant", "content": "hm"},
    ]
    response = await house.chat(model="auto", messages=messages)
    assert response.headers["x-switchyard-mix"] == "base"
    assert response.json()["usage"]["switchyard"]["mix"] == []


async def test_an_expert_removed_while_it_is_looked_up_is_looked_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is that of what is there then: no such model."""
    async with open_house(tmp_path) as house:
        assert (await house.upload(make_expert(tmp_path / "gone", name="gone"))).status_code == 201
        get = house.registry.get

        def get_and_lose(name: str, *more: Any) -> ExpertRecord:
            record = get(name, *more)
            house.registry.remove(name)
            return record

        monkeypatch.setattr(house.registry, "get", get_and_lose)
        assert error(await house.chat(model="gone"), 404)["code"] == "model_not_found"
        assert house.engine.open == 0
