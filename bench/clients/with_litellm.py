"""LiteLLM, with its providers `openai` and `text-completion-openai` pointed at the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import litellm

from bench.clients.example import run_python
from bench.clients.target import MESSAGES, QUESTION, TOOL, TRIP, Target, check_cancelled, check_echo, check_trip, raised

TIMEOUT = 120.0
litellm.telemetry = False


def _to(target: Target, provider: str, how: dict[str, Any]) -> dict[str, Any]:
    model = how.pop("model", target.base)
    own = {"api_base": target.v1, "api_key": target.key, "temperature": 0, "timeout": TIMEOUT, "max_retries": 0}
    return own | {"model": f"{provider}/{model}"} | how


def _chat(target: Target, **how: Any) -> Any:
    return litellm.completion(**_to(target, "openai", {"messages": MESSAGES, "max_tokens": 12} | how))


def _complete(target: Target, prompt: Any, **how: Any) -> Any:
    return litellm.text_completion(prompt=prompt, **_to(target, "text-completion-openai", {"max_tokens": 8} | how))


def _said(target: Target, **how: Any) -> str:
    text: str = _chat(target, **how).choices[0].message.content
    return text


def example(target: Target) -> None:
    run_python(target, "LiteLLM")


def models(target: Target) -> None:
    found = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_key=target.key, api_base=target.v1
    )
    assert {target.base, "auto", *target.experts} <= {name.removeprefix("openai/") for name in found}, found


def chat(target: Target) -> None:
    answer = _chat(target)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def chat_stream(target: Target) -> None:
    pieces = (chunk.choices[0].delta.content or "" for chunk in _chat(target, stream=True))
    assert "".join(pieces) == _said(target)


def stream_usage(target: Target) -> None:
    *_, last = _chat(target, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == _chat(target).usage.completion_tokens


def chat_logprobs(target: Target) -> None:
    told = _chat(target, logprobs=True, top_logprobs=3).choices[0].logprobs
    content = told["content"] if isinstance(told, dict) else told.content
    assert content
    for token in content:
        assert len(token["top_logprobs"] if isinstance(token, dict) else token.top_logprobs) == 3


def several(target: Target) -> None:
    answer = _chat(target, n=3, temperature=1, seed=1)
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert len(answer.choices) == 3


def stop(target: Target) -> None:
    whole = _said(target, max_tokens=24)
    word = whole[3:6]
    assert _said(target, max_tokens=24, stop=[word]) == whole.partition(word)[0]


def seed(target: Target) -> None:
    one, same, other = (_said(target, temperature=1, max_tokens=24, seed=seed) for seed in (7, 7, 8))
    assert one == same
    assert one != other


def penalties(target: Target) -> None:
    bias = {str(target.letter_token): 20}
    plain = _said(target, max_tokens=40, logit_bias=bias)
    punished = _said(target, max_tokens=40, logit_bias=bias, frequency_penalty=2, presence_penalty=2)
    assert punished.count(target.letter) < plain.count(target.letter)


def logit_bias(target: Target) -> None:
    assert _said(target, max_tokens=4, logit_bias={str(target.letter_token): 100}) == target.letter * 4


def json_object(target: Target) -> None:
    assert _said(target, logit_bias={str(target.brace_token): 100}, response_format={"type": "json_object"}) == "{}"


def json_schema(target: Target) -> None:
    schema = {"name": "trip", "schema": TRIP, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    check_trip(json.loads(_said(target, max_tokens=600, response_format=form)))


def tools(target: Target) -> None:
    message = _chat(target, max_tokens=600, tools=[TOOL], tool_choice="required").choices[0].message
    call = message.tool_calls[0]
    check_trip(json.loads(call.function.arguments))
    done = {"role": "tool", "tool_call_id": call.id, "name": "plan", "content": "booked"}
    how = {"tools": [TOOL], "tool_choice": "none", "max_tokens": 4, "logit_bias": {str(target.letter_token): 100}}
    assert _said(target, messages=[*MESSAGES, message, done], **how) == target.letter * 4


def tools_stream(target: Target) -> None:
    chosen = {"type": "function", "function": {"name": "plan"}}
    chunks = list(_chat(target, max_tokens=600, tools=[TOOL], tool_choice=chosen, stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    (call,) = whole.choices[0].message.tool_calls
    check_trip(json.loads(call.function.arguments))


def experts(target: Target) -> None:
    one, other = target.experts
    mix = [{"id": one, "weight": 0.75}, {"id": other, "weight": -0.25}]
    answer = _chat(target, model="auto", extra_body={"experts": mix})
    assert {part["id"]: part["weight"] for part in answer.usage.switchyard["mix"]} == {one: 0.75, other: -0.25}


def auto(target: Target) -> None:
    prompt, mix = target.routed
    answer = _chat(target, model="auto", messages=[{"role": "user", "content": prompt}])
    assert answer._hidden_params["additional_headers"]["llm_provider-x-switchyard-mix"] == mix


def completions(target: Target) -> None:
    answer = _complete(target, [QUESTION, "add 4"])
    assert answer.choices[0].text == _complete(target, QUESTION).choices[0].text
    assert len(answer.choices) == 2


def completions_stream(target: Target) -> None:
    streamed = "".join(chunk.choices[0].text or "" for chunk in _complete(target, QUESTION, stream=True))
    assert streamed == _complete(target, QUESTION).choices[0].text


def echo(target: Target) -> None:
    choice = _complete(target, QUESTION, echo=True, logprobs=1, max_tokens=1).choices[0]
    told = choice.logprobs if isinstance(choice.logprobs, dict) else choice.logprobs.model_dump()
    check_echo(QUESTION, choice.text, told["tokens"], told["token_logprobs"])


def token_prompts(target: Target) -> None:
    tokens = target.post("/tokenize", {"prompt": QUESTION})["tokens"]
    text = _complete(target, QUESTION).choices[0].text
    assert _complete(target, tokens).choices[0].text == text
    assert [choice.text for choice in _complete(target, [tokens, tokens]).choices] == [text, text]


def embeddings(target: Target) -> None:
    how = {"api_base": target.v1, "api_key": target.key, "max_retries": 0}
    found = litellm.embedding(model=f"openai/{target.base}", input=[QUESTION, "add 4"], **how)
    assert len(found.data) == 2
    assert abs(sum(value * value for value in found.data[0]["embedding"]) - 1) < 1e-3


def cancel(target: Target) -> None:
    def give_up() -> None:
        most = target.context - 200
        stream = _chat(target, stream=True, max_tokens=most, extra_body={"ignore_eos": True})
        next(stream)
        stream.completion_stream.close()

    check_cancelled(target, give_up)


def _raised(kind: type[Exception], said: str, ask: Callable[[], object]) -> None:
    error = raised(kind, ask)
    assert said in str(error), error


def auth(target: Target) -> None:
    _raised(litellm.AuthenticationError, "API key", lambda: _said(target, api_key="wrong"))


def unknown_model(target: Target) -> None:
    _raised(litellm.NotFoundError, "nobody", lambda: _said(target, model="nobody"))


def context_length(target: Target) -> None:
    long = [{"role": "user", "content": "x " * (2 * target.context)}]
    _raised(litellm.ContextWindowExceededError, "context", lambda: _said(target, messages=long))


def broken_stream(target: Target) -> None:
    stream = _chat(target, api_base=f"{target.failing}/v1", model=target.failing_model, stream=True)
    assert next(stream)
    _raised(Exception, "the engine has failed", lambda: list(stream))


def best_of(target: Target) -> None:
    _raised(litellm.BadRequestError, "best_of", lambda: _complete(target, QUESTION, best_of=3))


def suffix(target: Target) -> None:
    _raised(litellm.BadRequestError, "suffix", lambda: _complete(target, QUESTION, suffix="end"))


def images(target: Target) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    message = {"role": "user", "content": [part]}
    _raised(litellm.BadRequestError, "messages[0].content[0]", lambda: _said(target, messages=[message]))


def unknown(target: Target) -> None:
    _raised(litellm.BadRequestError, "best: there is no such parameter", lambda: _said(target, extra_body={"best": 1}))


def responses(target: Target) -> None:
    how = {"api_base": target.v1, "api_key": target.key, "max_retries": 0}
    ask = partial(litellm.responses, model=f"openai/{target.base}", input=QUESTION, **how)
    _raised(litellm.BadRequestError, "/v1/responses", ask)  # LiteLLM's reading of a 404 that is not about a model


CHECKS = (
    example, models, chat, chat_stream, stream_usage, chat_logprobs, several, stop, seed, penalties, logit_bias,
    json_object, json_schema, tools, tools_stream, experts, auto, completions, completions_stream, echo, token_prompts,
    embeddings, cancel, auth, unknown_model, context_length, broken_stream, best_of, suffix, images,
    unknown,
    responses,
)  # fmt: skip
