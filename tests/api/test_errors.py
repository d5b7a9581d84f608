"""Failures of every kind have one shape, tell what helps, and leave nothing running."""

from __future__ import annotations

import json
from pathlib import Path

import openai as sdk
import pytest
from openai import AsyncOpenAI

from store.errors import ExpertUnavailableError
from tests.api.house import BASE, House, error, open_house

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"


async def test_no_such_route(house: House) -> None:
    detail = error(await house.http.get("/v1/nothing"), 404)
    assert (detail["code"], detail["message"]) == ("not_found", "there is no GET /v1/nothing")


async def test_wrong_method(house: House) -> None:
    response = await house.http.get(CHAT)
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model": ', "invalid_json"),
        (b"", "invalid_value"),
        (b"[]", "invalid_value"),
        (b'"text"', "invalid_value"),
        (b"\xff\xfe\x00", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"n": ' + b"1" * 5000 + b"}", "invalid_json"),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', "invalid_value"),
        (b'{"\\ud800": 1}', "invalid_value"),
        (b'{"model": "x", "messages": [], "\\ud800": 1}', "invalid_value"),
        (b'{"model": "x", "messages": [{"role": "user", "content": "\\udfff"}]}', "invalid_value"),
        (b'{"model": "x", "messages": [{"role": "user", "content": "x"}], "stop": ["\\udfff"]}', "invalid_value"),
    ],
)
async def test_bad_json(house: House, body: bytes, code: str) -> None:
    assert error(await house.http.post(CHAT, content=body, headers=JSON), 400)["code"] == code


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b'{"bytes": ' + b"1" * 5000 + b"}"])
async def test_bad_json_where_other_bodies_are_read_too(house: House, body: bytes) -> None:
    assert error(await house.http.post("/v1/uploads", content=body, headers=JSON), 400)["code"] == "invalid_json"


async def test_json_must_say_so(house: House) -> None:
    body = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "x"}]})
    detail = error(await house.http.post(CHAT, content=body, headers={"content-type": "text/plain"}), 400)
    assert "application/json" in detail["message"]


async def test_request_ids(house: House) -> None:
    assert (await house.http.get("/health")).headers["x-request-id"].startswith("req_")
    given = await house.http.get("/health", headers={"x-request-id": "my-id.7"})
    assert given.headers["x-request-id"] == "my-id.7"
    for bad in ("a b", "x" * 129, "<script>", ""):
        answer = await house.http.get("/health", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"].startswith("req_")


async def test_queue_full(house: House, openai: AsyncOpenAI) -> None:
    house.engine.max_queue = 2
    response = await house.chat(n=3)
    detail = error(response, 429)
    assert (detail["type"], detail["code"]) == ("rate_limit_error", "queue_full")
    assert response.headers["retry-after"] == "7"
    assert house.engine.open == 0, "what was queued before the refusal is cancelled"
    with pytest.raises(sdk.RateLimitError):
        await openai.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "x"}], n=3)


@pytest.mark.parametrize("stream", [False, True])
async def test_failure_before_the_first_token_has_a_status(house: House, stream: bool) -> None:
    house.engine.failure = ExpertUnavailableError("its bytes are gone")
    response = await house.chat(stream=stream, n=2)
    detail = error(response, 503)
    assert (detail["message"], detail["type"]) == ("its bytes are gone", "server_error")
    assert int(response.headers["retry-after"]) > 0
    assert house.engine.open == 0


async def test_failure_in_mid_stream_is_an_event(house: House, openai: AsyncOpenAI) -> None:
    house.engine.failure, house.engine.fail_after = ExpertUnavailableError("its bytes are gone"), 3
    response = await house.chat(stream=True, n=2)
    assert response.status_code == 200
    last = response.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: ")) == {
        "error": {
            "message": "its bytes are gone",
            "type": "server_error",
            "param": None,
            "code": "expert_unavailable",
        }
    }
    assert "[DONE]" not in response.text
    assert house.engine.open == 0
    stream = await openai.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "x"}], stream=True)
    with pytest.raises(sdk.APIError, match="its bytes are gone"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("fail_after", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_failures_leak_nothing(
    house: House, caplog: pytest.LogCaptureFixture, stream: bool, fail_after: int
) -> None:
    house.engine.failure, house.engine.fail_after = ZeroDivisionError("secret"), fail_after
    response = await house.chat(stream=stream)
    assert response.status_code == (200 if stream and fail_after else 500)
    assert "internal_error" in response.text
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in response.text
    assert "secret" in caplog.text


async def test_a_stream_that_just_ends_is_a_failure(house: House) -> None:
    house.engine.reply = lambda _: b""
    assert (await house.chat()).json()["choices"][0]["message"]["content"] == ""
    house.engine.failure = StopAsyncIteration()
    assert error(await house.chat(), 500)["code"] == "internal_error"


async def test_bodies_are_limited(tmp_path: Path) -> None:
    async def pieces() -> object:
        for _ in range(100):
            yield b" " * 100

    async with open_house(tmp_path, max_body_bytes=1000, max_upload_bytes=2000) as house:
        announced = await house.http.post(CHAT, content=b" " * 1001, headers=JSON)
        assert error(announced, 413)["code"] == "payload_too_large"
        streamed = await house.http.post(CHAT, content=pieces(), headers=JSON)
        assert error(streamed, 413)["code"] == "payload_too_large"
        upload = await house.http.post("/v1/experts", files={"file": ("f", b"x" * 1500)})
        assert error(upload, 400)["code"] == "invalid_expert_file"
        upload = await house.http.post("/v1/experts", files={"file": ("f", b"x" * 2001)})
        assert error(upload, 413)["type"] == "invalid_request_error"
        form = {"content-type": "multipart/form-data; boundary=b"}
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'

        async def parts() -> object:
            yield head
            async for piece in pieces():
                yield piece

        upload = await house.http.post("/v1/experts", content=parts(), headers=form)
        assert error(upload, 413)["code"] == "payload_too_large"
        assert house.quarantined == []
