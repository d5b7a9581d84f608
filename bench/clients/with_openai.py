"""The official `openai` client for Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import openai
from openai import OpenAI
from pydantic import BaseModel, Field

from bench.clients.example import run_python
from bench.clients.target import MESSAGES, QUESTION, TOOL, TRIP, Target, check_cancelled, check_echo, check_trip, raised

PACKAGE = "openai"
TIMEOUT = 120.0


def _client(target: Target, key: str | None = None) -> OpenAI:
    return OpenAI(base_url=target.v1, api_key=key or target.key, max_retries=0, timeout=TIMEOUT)


def _chat(target: Target, **how: Any) -> Any:
    given: dict[str, Any] = {"model": target.base, "messages": MESSAGES, "temperature": 0, "max_tokens": 12} | how
    return _client(target).chat.completions.create(**given)


def _complete(target: Target, prompt: Any, **how: Any) -> Any:
    given: dict[str, Any] = {"model": target.base, "prompt": prompt, "temperature": 0, "max_tokens": 8} | how
    return _client(target).completions.create(**given)


def example(target: Target) -> None:
    run_python(target, "openai, Python")


def models(target: Target) -> None:
    client = _client(target)
    assert {target.base, "auto", *target.experts} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(target.experts[0]).id == target.experts[0]


def chat(target: Target) -> None:
    answer = _chat(target)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def chat_stream(target: Target) -> None:
    chunks = list(_chat(target, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == _chat(target).choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert len({chunk.id for chunk in chunks}) == 1


def stream_usage(target: Target) -> None:
    *chunks, last = _chat(target, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert last.usage.completion_tokens == _chat(target).usage.completion_tokens


def chat_logprobs(target: Target) -> None:
    choice = _chat(target, logprobs=True, top_logprobs=3).choices[0]
    told = choice.logprobs.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in told)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in told), "a greedy token is the likeliest"
    assert (
        bytes(byte for token in told for byte in token.bytes)
        .decode(errors="replace")
        .startswith(choice.message.content)
    )


def several(target: Target) -> None:
    answer = _chat(target, n=3, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def stop(target: Target) -> None:
    whole = _chat(target, max_tokens=24).choices[0].message.content
    word = whole[3:6]
    choice = _chat(target, max_tokens=24, stop=[word, "never said"]).choices[0]
    assert choice.message.content == whole.partition(word)[0]
    assert choice.finish_reason == "stop"


def seed(target: Target) -> None:
    one, same, other = (_chat(target, temperature=1, seed=seed, max_tokens=24) for seed in (7, 7, 8))
    assert one.choices[0].message.content == same.choices[0].message.content
    assert one.choices[0].message.content != other.choices[0].message.content


def penalties(target: Target) -> None:
    bias = {str(target.letter_token): 20}
    plain = _chat(target, max_tokens=40, logit_bias=bias).choices[0].message.content
    for name in ("frequency_penalty", "presence_penalty"):
        assert _chat(target, max_tokens=40, logit_bias=bias, **{name: 2}).choices[0].message.content is not None
    punished = _chat(target, max_tokens=40, logit_bias=bias, frequency_penalty=2).choices[0].message.content
    assert punished.count(target.letter) < plain.count(target.letter)


def logit_bias(target: Target) -> None:
    answer = _chat(target, max_tokens=4, logit_bias={str(target.letter_token): 100})
    assert answer.choices[0].message.content == target.letter * 4


def json_object(target: Target) -> None:
    bias = {str(target.brace_token): 100}
    answer = _chat(target, response_format={"type": "json_object"}, logit_bias=bias)
    assert answer.choices[0].message.content == "{}"


class Trip(BaseModel):
    """As `TRIP`."""

    city: Literal["Rome", "Oslo"]
    days: int = Field(ge=1, le=9)


def json_schema(target: Target) -> None:
    answer = _client(target).chat.completions.parse(
        model=target.base, messages=MESSAGES, temperature=0, max_tokens=600, response_format=Trip
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    check_trip(parsed.model_dump())


def tools(target: Target) -> None:
    message = _chat(target, max_tokens=600, tools=[TOOL], tool_choice="required").choices[0].message
    call = message.tool_calls[0]
    assert call.function.name == "plan"
    check_trip(Trip.model_validate_json(call.function.arguments).model_dump())
    answered = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "booked"}]
    how = {"tools": [TOOL], "tool_choice": "none", "max_tokens": 4, "logit_bias": {str(target.letter_token): 100}}
    assert _chat(target, messages=answered, **how).choices[0].message.content == target.letter * 4


def tools_stream(target: Target) -> None:
    name, arguments, ends = "", "", []
    for chunk in _chat(target, max_tokens=600, tools=[TOOL], tool_choice="required", stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.index == 0:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
        ends.append(chunk.choices[0].finish_reason)
    assert name == "plan"
    check_trip(Trip.model_validate_json(arguments).model_dump())
    assert ends[-1] in ("tool_calls", "length")


def experts(target: Target) -> None:
    one, other = target.experts
    mix = [{"id": one, "weight": 0.75}, {"id": other, "weight": -0.25}]
    answer = _chat(target, model="auto", extra_body={"experts": mix})
    assert {(part["id"], part["weight"]) for part in answer.usage.switchyard["mix"]} == {(one, 0.75), (other, -0.25)}
    assert _chat(target, model=one).usage.switchyard["mix"][0]["id"] == one


def auto(target: Target) -> None:
    prompt, mix = target.routed
    answer = _client(target).chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": prompt}], max_tokens=4
    )
    assert answer.headers["x-switchyard-mix"] == mix


def completions(target: Target) -> None:
    answer = _complete(target, [QUESTION, "add 4"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == _complete(target, QUESTION).choices[0].text


def completions_stream(target: Target) -> None:
    chunks = list(_complete(target, QUESTION, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == _complete(target, QUESTION).choices[0].text
    assert chunks[-1].usage.completion_tokens == 8


def echo(target: Target) -> None:
    choice = _complete(target, QUESTION, echo=True, logprobs=1, max_tokens=1).choices[0]
    check_echo(QUESTION, choice.text, choice.logprobs.tokens, choice.logprobs.token_logprobs)
    alone = _complete(target, QUESTION, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert alone.text == QUESTION


def token_prompts(target: Target) -> None:
    tokens = target.post("/tokenize", {"prompt": QUESTION})["tokens"]
    text = _complete(target, QUESTION).choices[0].text
    assert _complete(target, tokens).choices[0].text == text
    assert [choice.text for choice in _complete(target, [tokens, tokens]).choices] == [text, text]


def embeddings(target: Target) -> None:
    client = _client(target)
    packed = client.embeddings.create(model=target.base, input=[QUESTION, "add 4"])  # base64, by the client's choice
    plain = client.embeddings.create(model=target.base, input=QUESTION, encoding_format="float")
    assert len(packed.data) == 2
    assert abs(sum(value * value for value in packed.data[0].embedding) - 1) < 1e-3
    assert max(abs(a - b) for a, b in zip(packed.data[0].embedding, plain.data[0].embedding, strict=True)) < 1e-5


def cancel(target: Target) -> None:
    def give_up() -> None:
        with _chat(target, stream=True, max_tokens=target.context - 200, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))

    check_cancelled(target, give_up)


def auth(target: Target) -> None:
    error = raised(openai.AuthenticationError, lambda: _client(target, "wrong").models.list())
    assert error.code == "invalid_api_key"


def unknown_model(target: Target) -> None:
    error = raised(openai.NotFoundError, lambda: _chat(target, model="nobody"))
    assert (error.code, error.param) == ("model_not_found", "model")


def context_length(target: Target) -> None:
    error = raised(openai.BadRequestError, lambda: _complete(target, "x " * (2 * target.context)))
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")


def broken_stream(target: Target) -> None:
    client = OpenAI(base_url=f"{target.failing}/v1", api_key=target.key, max_retries=0, timeout=TIMEOUT)
    stream = client.chat.completions.create(model=target.failing_model, messages=MESSAGES, stream=True)
    assert next(iter(stream))
    assert raised(openai.APIError, lambda: list(stream)).code == "engine_dead"


def _refused(param: str, ask: Callable[[], object]) -> None:
    error = raised(openai.BadRequestError, ask)
    assert (error.code, error.param) == ("unsupported_parameter", param), error


def best_of(target: Target) -> None:
    _refused("best_of", lambda: _complete(target, QUESTION, best_of=3))


def suffix(target: Target) -> None:
    _refused("suffix", lambda: _complete(target, QUESTION, suffix="end"))


def images(target: Target) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    _refused("messages[0].content[0].type", lambda: _chat(target, messages=[{"role": "user", "content": [part]}]))


def unknown(target: Target) -> None:
    error = raised(openai.BadRequestError, lambda: _chat(target, extra_body={"best": 1}))
    assert (error.code, error.param) == ("unknown_parameter", "best"), error


def responses(target: Target) -> None:
    ask = partial(_client(target).responses.create, model=target.base, input=QUESTION)
    assert raised(openai.NotFoundError, ask).code == "not_found"


assert TRIP["required"] == list(Trip.model_fields)

CHECKS = (
    example, models, chat, chat_stream, stream_usage, chat_logprobs, several, stop, seed, penalties, logit_bias,
    json_object, json_schema, tools, tools_stream, experts, auto, completions, completions_stream, echo, token_prompts,
    embeddings, cancel, auth, unknown_model, context_length, broken_stream, best_of, suffix, images, unknown,
    responses,
)  # fmt: skip
