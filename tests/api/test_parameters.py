"""Parameters that are refused: by name, with the one error shape."""

from __future__ import annotations

from typing import Any

import openai as sdk
import pytest
from openai import AsyncOpenAI
from pydantic import ValidationError

from server.api.embeddings import EmbeddingBody
from server.api.experts import Description
from server.api.jobs import JobBody
from server.api.sampling import SamplingFields
from server.api.schema import ChatBody, CompletionBody, PromptBody
from server.api.tokens import DetokenizeBody
from server.api.wire import Wire
from server.engine.types import SamplingParams
from tests.api.house import BASE, House, error

pytestmark = pytest.mark.anyio

CHAT: list[tuple[str, Any, Any]] = [
    # name, a value that asks for something, a neutral one
    ("audio", {"voice": "alloy"}, None),
    ("function_call", "auto", "none"),
    ("functions", [{"name": "f"}], []),
    ("metadata", {"a": "b"}, {}),
    ("modalities", ["audio"], ["text"]),
    ("prediction", {"type": "content"}, None),
    ("prompt_cache_key", "k", None),
    ("reasoning_effort", "low", None),
    ("safety_identifier", "s", None),
    ("service_tier", "flex", "auto"),
    ("store", True, False),
    ("tools", [{"type": "function", "function": {"name": "f"}}], []),
    ("verbosity", "low", None),
    ("web_search_options", {}, None),
]
COMPLETION: list[tuple[str, Any, Any]] = [
    ("best_of", 2, 1),
    ("suffix", "end", None),
]


@pytest.mark.parametrize(("name", "asking", "neutral"), CHAT)
async def test_unsupported_in_chat(house: House, name: str, asking: Any, neutral: Any) -> None:
    detail = error(await house.chat(**{name: asking}), 400)
    assert (detail["param"], detail["code"]) == (name, "unsupported_parameter")
    assert name in detail["message"]
    assert (await house.chat(**{name: neutral}, max_tokens=1)).status_code == 200


@pytest.mark.parametrize(("name", "asking", "neutral"), COMPLETION)
async def test_unsupported_in_completions(house: House, name: str, asking: Any, neutral: Any) -> None:
    detail = error(await house.complete(**{name: asking}), 400)
    assert (detail["param"], detail["code"]) == (name, "unsupported_parameter")
    assert (await house.complete(**{name: neutral}, max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"bogus": 1}, "bogus", "unknown_parameter"),
        ({"prompt": "x"}, "prompt", "unknown_parameter"),
        ({"model": 5}, "model", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x"}] * 8193}, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 8193}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        ({f"bogus{i}": 1 for i in range(100)}, "bogus0", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": "x"} | {f"bogus{i}": 1 for i in range(100)}]},
            "messages[0].bogus0",
            "unknown_parameter",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "name": "n" * 201}]}, "messages[0].name", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "mood": "n"}]}, "messages[0].mood", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "provider_specific_fields": {"refusal": "no"}}]},
            "messages[0].provider_specific_fields",
            "unsupported_parameter",
        ),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"top_k": 1.0}, "top_k", "invalid_value"),
        ({"min_p": 1.5}, "min_p", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": "1"}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"hello": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"5": None}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": [5]}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"258": 1}}, "logit_bias", "invalid_request"),
        ({"stop_token_ids": [258]}, "stop_token_ids", "invalid_request"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "invalid_value"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        ({"ignore_eos": 1}, "ignore_eos", "invalid_value"),
        ({"logprobs": 3}, "logprobs", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"echo": True}, "echo", "unknown_parameter"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_request"),
        ({"n": True}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"stop": 1}, "stop", "invalid_value"),
        ({"stop": {"text": 1}}, "stop", "invalid_value"),
        ({"stop": "x" * 1025}, "stop", "invalid_value"),
        ({"stop": ["a", "x" * 1025]}, "stop[1]", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"bogus": 1}}, "stream_options.bogus", "unknown_parameter"),
        ({"experts": []}, "experts", "invalid_value"),
        ({"experts": [{"id": "cron"}] * 17}, "experts", "invalid_value"),
        ({"experts": [{"weight": 1}]}, "experts[0].id", "missing_required_parameter"),
        ({"experts": [{"id": "cron"}, {"id": "cron"}]}, "experts[1].id", "invalid_value"),
        ({"experts": [{"id": "cron", "weight": 10.5}]}, "experts[0].weight", "invalid_value"),
        ({"experts": [{"id": "cron", "scale": 1}]}, "experts[0].scale", "unknown_parameter"),
        ({"experts": [{"id": "cron"}], "model": "french"}, "experts", "invalid_request"),
        ({"messages": [{"role": "assistant", "content": "x"}], "model": "auto"}, "messages", "invalid_request"),
        ({"max_tokens": 5000}, "messages", "context_length_exceeded"),
    ],
)
async def test_refused(house: House, body: dict[str, Any], param: str, code: str) -> None:
    detail = error(await house.chat(**body), 400)
    assert (detail["param"], detail["code"], detail["type"]) == (param, code, "invalid_request_error")
    assert house.engine.streams == []


@pytest.mark.parametrize("prompt", [{"text": "x"}, 5])
async def test_a_prompt_is_named_without_its_kinds(house: House, prompt: Any) -> None:
    assert error(await house.complete(prompt), 400)["param"] == "prompt"


_MANY = 2000
_CALLS = {"messages": [{"role": "assistant", "tool_calls": [{}] * 1000}]}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, {"messages": [{}] * _MANY}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * _MANY}]}),
        (ChatBody, _CALLS),
        (ChatBody, {"messages": [{"role": "user", "content": "x", **{f"x{i}": 1 for i in range(_MANY)}}]}),
        (ChatBody, {f"x{i}": 1 for i in range(_MANY)}),
        (ChatBody, {"tools": [{}] * 128}),
        (ChatBody, {"structured_outputs": {"json": {"a": ["\ud800"] * _MANY}}}),
        (ChatBody, {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {
            f"\ud800{i}": 1 for i in range(_MANY)}}}}),
        (ChatBody, {"structured_outputs": {"choice": [0] * 1024}}),
        (ChatBody, {"logit_bias": {str(i): "x" for i in range(_MANY)}}),
        (CompletionBody, {"prompt": ["", *[0] * _MANY]}),
        (CompletionBody, {"prompt": [0, *[""] * _MANY]}),
        (CompletionBody, {"prompt": [[""] * _MANY]}),
        (CompletionBody, {"prompt": [[]] * _MANY}),
        (PromptBody, {"messages": [{}] * _MANY}),
        (DetokenizeBody, {"tokens": [""] * _MANY}),
        (Description, {"tags": [0] * _MANY}),
        (EmbeddingBody, {"model": "m", "input": [""] * 256}),
        (JobBody, {"uploads": [0] * _MANY}),
        (JobBody, {"uploads": ["x"], "metadata": {f"x{i}": 0 for i in range(_MANY)}}),
        (Description, {"metadata": {f"x{i}": 0 for i in range(_MANY)}}),
    ],
)  # fmt: skip
def test_a_body_of_faults_is_not_read_to_its_end(kind: type[Wire], body: dict[str, Any]) -> None:
    """An error of each would take gigabytes, of which the first is told."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": BASE, **body})
    assert caught.value.error_count() <= 4


@pytest.mark.parametrize("missing", ["model", "messages"])
async def test_required(house: House, missing: str) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    del body[missing]
    detail = error(await house.http.post("/v1/chat/completions", json=body), 400)
    assert (detail["param"], detail["code"]) == (missing, "missing_required_parameter")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
async def test_weights_are_finite(house: House, number: str) -> None:
    body = f'{{"model": "auto", "prompt": "x", "experts": [{{"id": "cron", "weight": {number}}}]}}'
    response = await house.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert error(response, 400)["param"] == "experts[0].weight"


@pytest.mark.parametrize(
    ("body", "param"),
    [({"model": "nobody"}, "model"), ({"experts": [{"id": "cron"}, {"id": "nobody"}]}, "experts[1].id")],
)
async def test_unknown_models(house: House, body: dict[str, Any], param: str) -> None:
    detail = error(await house.chat(**body), 404)
    assert (detail["param"], detail["code"], detail["type"]) == (param, "model_not_found", "invalid_request_error")
    assert "nobody" in detail["message"]


async def test_too_many_answers(house: House) -> None:
    assert error(await house.complete(["x"] * 65, n=2), 400)["param"] == "prompt"


async def test_user_is_accepted(openai: AsyncOpenAI) -> None:
    await openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "x"}], user="someone", max_tokens=1
    )


async def test_nulls_mean_defaults(house: House) -> None:
    nulls = ("experts", "max_tokens", "max_completion_tokens", "n", "stop", "stream", *SamplingFields.model_fields)
    response = await house.chat(**dict.fromkeys((*nulls, "stream_options", "user")))
    assert response.json()["choices"][0]["message"]["content"] == "base heard: user: hello"


async def test_sampling_reaches_the_engine(house: House) -> None:
    asked: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.05,
        "presence_penalty": -1.5,
        "frequency_penalty": 1,
        "repetition_penalty": 1.1,
        "seed": -3,
        "min_tokens": 2,
        "ignore_eos": True,
    }
    given = {"top_k": 40, "logit_bias": {"5": -100, "7": 0.5, "9": 0}, "stop_token_ids": [10, 10, 13]}
    for response in (await house.chat(**asked, **given), await house.complete(**asked, **given, max_tokens=9)):
        assert response.status_code == 200, response.text
        sampling = house.engine.streams[-1].request.sampling
        assert {name: getattr(sampling, name) for name in asked} == asked
        assert (sampling.top_k, sampling.stop_tokens) == (40, {10, 13})
        assert sampling.logit_bias == ((5, -100.0), (7, 0.5))
    await house.chat(top_k=-1)
    assert house.engine.streams[-1].request.sampling == SamplingParams()


async def test_the_sdk_raises_its_own_exceptions(openai: AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(sdk.BadRequestError) as bad:
        await openai.chat.completions.create(model=BASE, messages=messages, presence_penalty=3)
    assert (bad.value.param, bad.value.code) == ("presence_penalty", "invalid_value")
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(sdk.NotFoundError) as missing:
        await openai.chat.completions.create(model="nobody", messages=messages)
    assert missing.value.code == "model_not_found"
