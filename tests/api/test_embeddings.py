"""Embeddings, tokens of texts and texts of tokens."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI

from tests.api.dummy_engine import CONTEXT, SPECIAL
from tests.api.house import BASE, House, error

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("a river", ["a river"]),
        (["a river", "b"], ["a river", "b"]),
        ([97, 32, 98], ["a b"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ],
)
async def test_vectors_have_length_one(house: House, openai: AsyncOpenAI, given: Any, texts: list[str]) -> None:
    answer = await openai.embeddings.create(model=BASE, input=given)  # the client asks for base64
    plain = await openai.embeddings.create(model=BASE, input=given, encoding_format="float")
    assert [one.index for one in answer.data] == list(range(len(texts)))
    features = await house.engine.features(texts)
    for one, same, expected in zip(answer.data, plain.data, features, strict=True):
        np.testing.assert_allclose(one.embedding, expected, atol=1e-6)
        np.testing.assert_allclose(same.embedding, expected, atol=1e-6)
    assert (answer.model, answer.usage.prompt_tokens) == (BASE, sum(map(len, texts)))


async def test_base64_is_little_endian(house: House) -> None:
    body = {"model": BASE, "input": "x", "encoding_format": "base64"}
    response = await house.http.post("/v1/embeddings", json=body)
    vector = np.frombuffer(base64.b64decode(response.json()["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(vector, (await house.engine.features(["x"]))[0], atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"model": "cron"}, 400, "model", "invalid_request"),
        ({"model": "auto"}, 400, "model", "invalid_request"),
        ({"model": "nobody"}, 404, "model", "model_not_found"),
        ({"input": ""}, 400, "input", "invalid_value"),
        ({"input": []}, 400, "input", "invalid_value"),
        ({"input": ["x"] * 257}, 400, "input", "invalid_value"),
        ({"input": [SPECIAL + 2]}, 400, "input", "invalid_request"),
        ({"input": "a" * (CONTEXT + 1)}, 400, "input", "context_length_exceeded"),
        ({"dimensions": 8}, 400, "dimensions", "unsupported_parameter"),
        ({"encoding_format": "int8"}, 400, "encoding_format", "invalid_value"),
    ],
)
async def test_refused(house: House, body: dict[str, Any], status: int, param: str, code: str) -> None:
    asked = {"model": BASE, "input": "x", **body}
    detail = error(await house.http.post("/v1/embeddings", json=asked), status)
    assert (detail["param"], detail["code"]) == (param, code)


async def test_too_many_at_a_time(house: House) -> None:
    house.engine.max_queue = 0
    answer = await house.http.post("/v1/embeddings", json={"model": BASE, "input": "x"})
    assert error(answer, 429)["code"] == "queue_full"
    assert answer.headers["retry-after"] == "7"


async def test_tokenize_and_back(house: House) -> None:
    tokens = (await house.http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
    assert tokens == {
        "count": 3,
        "max_model_len": CONTEXT,
        "tokens": [0x68, 0xC3, 0xA9],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    text = await house.http.post("/detokenize", json={"model": BASE, "tokens": [*tokens["tokens"], SPECIAL]})
    assert text.json() == {"prompt": "hé<special>"}


async def test_tokenize_a_conversation(house: House) -> None:
    body = {"model": "cron", "messages": [{"role": "user", "content": "x"}]}
    tokens = (await house.http.post("/tokenize", json=body)).json()
    assert bytes(tokens["tokens"]) == b"user: x\nassistant: "
    assert tokens["token_strs"] is None


async def test_what_the_tokenizer_is(house: House) -> None:
    assert (await house.http.get("/tokenizer_info")).json() == {
        "bos_token": None,
        "eos_token": "<special>",
        "pad_token": None,
        "unk_token": None,
        "chat_template": None,
        "model_max_length": CONTEXT,
    }


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": "x", "bogus": 1}, "bogus"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
    ],
)
async def test_tokens_refused(house: House, path: str, body: dict[str, Any], param: str) -> None:
    assert error(await house.http.post(path, json=body), 400)["param"] == param
