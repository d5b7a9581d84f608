"""LangChain: `ChatOpenAI`, `OpenAI` and `OpenAIEmbeddings` of langchain-openai."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from bench.clients.example import run_python
from bench.clients.target import QUESTION, TOOL, TRIP, Target, check_cancelled, check_echo, check_trip, raised

TIMEOUT = 120.0


def _common(target: Target, how: dict[str, Any]) -> dict[str, Any]:
    own = {"base_url": target.v1, "api_key": target.key, "model": target.base, "temperature": 0}
    return own | {"max_retries": 0, "timeout": TIMEOUT} | how


def _chat(target: Target, **how: Any) -> Any:
    return ChatOpenAI(**_common(target, {"max_tokens": 12} | how))


def _llm(target: Target, **how: Any) -> Any:
    return OpenAI(**_common(target, {"max_tokens": 8} | how))


def _said(target: Target, **how: Any) -> str:
    text: str = _chat(target, **how).invoke(QUESTION).content
    return text


def example(target: Target) -> None:
    run_python(target, "LangChain")


def chat(target: Target) -> None:
    agent = AIMessage("the river is deep", name="surveyor")
    answer = _chat(target).invoke([HumanMessage(QUESTION, name="ada"), agent, HumanMessage(QUESTION)])
    assert _said(target)
    assert answer.usage_metadata["output_tokens"] > 0


def chat_stream(target: Target) -> None:
    assert "".join(chunk.content for chunk in _chat(target).stream(QUESTION)) == _said(target)


def stream_usage(target: Target) -> None:
    whole = sum(list(_chat(target, stream_usage=True).stream(QUESTION))[1:], AIMessageChunk(content=""))
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0


def chat_logprobs(target: Target) -> None:
    answer = _chat(target, logprobs=True, top_logprobs=3).invoke(QUESTION)
    told = answer.response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 3 for token in told)


def several(target: Target) -> None:
    found = _chat(target, n=3, temperature=1, seed=1).generate([[HumanMessage(QUESTION)]]).generations[0]
    assert len(found) == 3
    assert len({one.text for one in found}) > 1


def stop(target: Target) -> None:
    whole = _said(target, max_tokens=24)
    word = whole[3:6]
    assert _said(target, max_tokens=24, stop=[word]) == whole.partition(word)[0]


def seed(target: Target) -> None:
    one, same, other = (_said(target, temperature=1, max_tokens=24, seed=seed) for seed in (7, 7, 8))
    assert one == same
    assert one != other


def penalties(target: Target) -> None:
    bias = {target.letter_token: 20}
    plain = _said(target, max_tokens=40, logit_bias=bias)
    punished = _said(target, max_tokens=40, logit_bias=bias, frequency_penalty=2, presence_penalty=2)
    assert punished.count(target.letter) < plain.count(target.letter)


def logit_bias(target: Target) -> None:
    assert _said(target, max_tokens=4, logit_bias={target.letter_token: 100}) == target.letter * 4


def json_object(target: Target) -> None:
    form = {"type": "json_object"}
    bias = {target.brace_token: 100}
    assert _chat(target, logit_bias=bias).bind(response_format=form).invoke(QUESTION).content == "{}"


def json_schema(target: Target) -> None:
    schema = {"title": "trip", "description": "A trip.", **TRIP}
    check_trip(_chat(target, max_tokens=600).with_structured_output(schema, method="json_schema").invoke(QUESTION))


def tools(target: Target) -> None:
    chat = _chat(target, max_tokens=600)
    answer = chat.bind_tools([TOOL], tool_choice="plan").invoke(QUESTION)
    (call,) = answer.tool_calls
    check_trip(call["args"])
    done = ToolMessage("booked", tool_call_id=call["id"], name="plan")
    more = _chat(target, max_tokens=4, logit_bias={target.letter_token: 100})
    assert more.invoke([HumanMessage(QUESTION), answer, done]).content == target.letter * 4


def tools_stream(target: Target) -> None:
    bound = _chat(target, max_tokens=600).bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False)
    first, *more = bound.stream(QUESTION)
    whole = sum(more, first)
    check_trip(whole.tool_calls[0]["args"])


def experts(target: Target) -> None:
    one, other = target.experts
    mix = [{"id": one, "weight": 0.75}, {"id": other, "weight": -0.25}]
    answer = _chat(target, model="auto", extra_body={"experts": mix}, include_response_headers=True).invoke(QUESTION)
    parts = answer.response_metadata["headers"]["x-switchyard-mix"].split(",")
    assert set(parts) == {f"{one}=0.75", f"{other}=-0.25"}


def auto(target: Target) -> None:
    prompt, mix = target.routed
    answer = _chat(target, model="auto", include_response_headers=True).invoke(prompt)
    assert answer.response_metadata["headers"]["x-switchyard-mix"] == mix


def completions(target: Target) -> None:
    alone = _llm(target).invoke(QUESTION)
    assert _llm(target).batch([QUESTION, QUESTION]) == [alone, alone]
    found = _llm(target).generate([QUESTION, "add 4"]).generations
    assert found[0][0].text == alone


def completions_stream(target: Target) -> None:
    assert "".join(_llm(target).stream(QUESTION)) == _llm(target).invoke(QUESTION)


def echo(target: Target) -> None:
    found = _llm(target, max_tokens=1, logprobs=1, model_kwargs={"echo": True}).generate([QUESTION]).generations[0][0]
    told = found.generation_info["logprobs"]
    check_echo(QUESTION, found.text, told["tokens"], told["token_logprobs"])


def embeddings(target: Target) -> None:
    embedder = OpenAIEmbeddings(
        base_url=target.v1, api_key=target.key, model=target.base, check_embedding_ctx_length=False, max_retries=0
    )
    one, other = embedder.embed_documents([QUESTION, "add 4"])
    assert one != other
    assert max(abs(a - b) for a, b in zip(embedder.embed_query(QUESTION), one, strict=True)) < 1e-5


def cancel(target: Target) -> None:
    def give_up() -> None:
        chat = _chat(target, max_tokens=target.context - 200, extra_body={"ignore_eos": True})
        stream = chat.stream(QUESTION)
        next(stream)
        stream.close()

    check_cancelled(target, give_up)


def auth(target: Target) -> None:
    assert raised(openai.AuthenticationError, lambda: _said(target, api_key="wrong")).code == "invalid_api_key"


def unknown_model(target: Target) -> None:
    assert raised(openai.NotFoundError, lambda: _said(target, model="nobody")).code == "model_not_found"


def context_length(target: Target) -> None:
    long = "x " * (2 * target.context)
    assert raised(openai.BadRequestError, lambda: _chat(target).invoke(long)).code == "context_length_exceeded"


def broken_stream(target: Target) -> None:
    stream = _chat(target, base_url=f"{target.failing}/v1", model=target.failing_model).stream(QUESTION)
    assert next(stream)
    assert raised(openai.APIError, lambda: list(stream)).code == "engine_dead"


def _refused(param: str, ask: Callable[[], object]) -> None:
    error = raised(openai.BadRequestError, ask)
    assert (error.code, error.param) == ("unsupported_parameter", param), error


def best_of(target: Target) -> None:
    _refused("best_of", lambda: _llm(target, best_of=3).invoke(QUESTION))


def suffix(target: Target) -> None:
    _refused("suffix", lambda: _llm(target, model_kwargs={"suffix": "end"}).invoke(QUESTION))


def images(target: Target) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    _refused("messages[0].content[0].type", lambda: _chat(target).invoke([HumanMessage([part])]))


def unknown(target: Target) -> None:
    error = raised(openai.BadRequestError, lambda: _said(target, extra_body={"best": 1}))
    assert (error.code, error.param) == ("unknown_parameter", "best"), error


def responses(target: Target) -> None:
    assert raised(openai.NotFoundError, lambda: _said(target, use_responses_api=True)).code == "not_found"


CHECKS = (
    example, chat, chat_stream, stream_usage, chat_logprobs, several, stop, seed, penalties, logit_bias, json_object,
    json_schema, tools, tools_stream, experts, auto, completions, completions_stream, echo, embeddings, cancel, auth,
    unknown_model, context_length, broken_stream, best_of, suffix, images, unknown,
    responses,
)  # fmt: skip
