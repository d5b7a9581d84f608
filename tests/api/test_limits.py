"""Limits, usage and the audit log over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai as sdk
import pytest

from tests.api.house import BASE, CRON, House, error, events, make_expert, open_house
from tests.api.test_tenants import ROOT, key_of, publish

pytestmark = pytest.mark.anyio


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path, api_keys="root", tenant_max_experts=2) as house:
        yield house


async def limit(house: House, **limits: int) -> None:
    answer = await house.http.put("/v1/admin/tenants/acme", json=limits, headers=ROOT)
    assert answer.status_code == 200, answer.text


async def ask(house: House, headers: dict[str, str], **body: Any) -> Any:
    given = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], **body}
    return await house.http.post("/v1/chat/completions", json=given, headers=headers)


async def usage(house: House, headers: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = (await house.http.get("/v1/usage", headers=headers)).json()
    return found


async def test_answers_tell_what_is_left_and_what_is_too_much_is_refused(house: House) -> None:
    acme = await key_of(house, "acme")
    assert not [name for name in (await ask(house, acme)).headers if name.startswith("x-ratelimit")]
    await limit(house, requests_per_minute=2, tokens_per_minute=100_000)
    first = await ask(house, acme, stream=True)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) <= 100_000
    assert first.headers["x-ratelimit-reset-requests"]
    await ask(house, acme)
    refused = await ask(house, acme)
    detail = error(refused, 429)
    assert (detail["type"], detail["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(sdk.RateLimitError):
        await house.openai(acme["authorization"].removeprefix("Bearer ")).completions.create(model=BASE, prompt="x")
    assert (await house.http.get("/v1/models", headers=acme)).status_code == 200, "looking costs nothing"
    assert (await ask(house, ROOT)).status_code == 200, "others are not held up"


async def test_tokens_are_charged_whole_streamed_abandoned_and_embedded(house: House) -> None:
    acme = await key_of(house, "acme")
    whole = (await ask(house, acme)).json()["usage"]
    assert (await usage(house, acme))["prompt_tokens"] == whole["prompt_tokens"]
    streamed = events(await ask(house, acme, stream=True, stream_options={"include_usage": True}))[-1]["usage"]
    told = await usage(house, acme)
    assert told["completion_tokens"] == whole["completion_tokens"] + streamed["completion_tokens"]
    assert told["requests"] == 2
    body = {"model": BASE, "input": "abcdef"}
    embedded = (await house.http.post("/v1/embeddings", json=body, headers=acme)).json()["usage"]["prompt_tokens"]
    assert (await usage(house, acme))["prompt_tokens"] == 2 * whole["prompt_tokens"] + embedded
    house.engine.delay = 0.01
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(ask(house, acme, stream=True), 0.1)
    while house.engine.open:
        await asyncio.sleep(0.01)
    told = await usage(house, acme)
    assert told["prompt_tokens"] == 3 * whole["prompt_tokens"] + embedded
    assert told["days"].keys() == {told["month"] + day[7:] for day in told["days"]}
    assert sum(spent["requests"] for spent in told["keys"].values()) == told["requests"] == 4


async def test_a_debt_of_tokens_holds_the_next_request_up(house: House) -> None:
    acme = await key_of(house, "acme")
    await limit(house, tokens_per_minute=20)
    assert (await ask(house, acme)).status_code == 200
    await house.app.state.services.meter.settle()
    refused = await ask(house, acme)
    assert "tokens per minute" in error(refused, 429)["message"]
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_a_tenant_keeps_as_many_experts_and_bytes_as_it_may(house: House) -> None:
    acme = await key_of(house, "acme")
    for i in range(2):
        assert (await publish(house, acme, f"e{i}", i + 1, CRON)).status_code == 201
    assert error(await publish(house, acme, "e2", 3, CRON), 403)["code"] == "quota_exceeded"
    assert (await publish(house, acme, "e1", 2, CRON)).status_code == 200, "what is there already costs nothing"
    assert (await publish(house, await key_of(house, "globex"), "g", 3, CRON)).status_code == 201
    for i in range(3):
        assert (await publish(house, ROOT, f"root{i}", i + 1, CRON)).status_code == 201
    kept = await usage(house, acme)
    assert (kept["experts"], kept["limits"]["max_experts"]) == (2, 2)
    await limit(house, max_bytes=kept["expert_bytes"] + 10)
    path = make_expert(house.folder / "new", value=7)
    put = await house.http.put("/v1/experts/e0", files={"file": ("f", path.read_bytes())}, headers=acme)
    assert error(put, 403)["code"] == "quota_exceeded"
    assert not house.quarantined
    assert (await house.http.delete("/v1/experts/e1", headers=acme)).status_code == 200
    again = await house.http.put("/v1/experts/e0", files={"file": ("f", path.read_bytes())}, headers=acme)
    assert again.status_code == 200, again.text


async def test_administrators_see_and_set_limits(house: House) -> None:
    await key_of(house, "acme")
    await limit(house, max_experts=5)
    listed = (await house.http.get("/v1/admin/tenants", headers=ROOT)).json()["data"]
    assert listed == [
        {"id": "acme", "object": "tenant", "requests_per_minute": None, "tokens_per_minute": None, "max_experts": 5,
         "max_bytes": None, "is_usual": False},
    ]  # fmt: skip
    reset = (await house.http.delete("/v1/admin/tenants/acme", headers=ROOT)).json()
    assert (reset["max_experts"], reset["is_usual"]) == (2, True)
    assert error(await house.http.delete("/v1/admin/tenants/acme", headers=ROOT), 404)["code"] == "tenant_not_found"
    bad = await house.http.put("/v1/admin/tenants/Bad", json={}, headers=ROOT)
    assert error(bad, 400)["param"] == "tenant"
    bad = await house.http.put("/v1/admin/tenants/acme", json={"max_bytes": -1}, headers=ROOT)
    assert error(bad, 400)["param"] == "max_bytes"
    month = await house.http.get("/v1/admin/usage", params={"month": "november"}, headers=ROOT)
    assert error(month, 400)["param"] == "month"
    everyone = (await house.http.get("/v1/admin/usage", headers=ROOT)).json()["data"]
    assert [one["tenant"] for one in everyone] == []


async def audit(house: House, **filters: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        await house.http.get("/v1/admin/audit", params=filters, headers=ROOT)
    ).json()["data"]  # fmt: skip
    return found


async def test_every_change_is_written_down_and_no_secret(house: House) -> None:
    acme, globex = await key_of(house, "acme"), await key_of(house, "globex")
    key_id = acme["authorization"].split("_")[1]
    answer = await publish(house, acme, "cron", 1, CRON)
    error(await house.http.delete("/v1/experts/cron", headers=globex), 404)
    await house.http.delete("/v1/experts/cron", headers={**acme, "x-request-id": "mine"})
    error(await house.http.delete("/v1/experts/cron", headers={"authorization": "Bearer wrong"}), 401)
    error(await house.http.post("/v1/admin/keys", json={}, headers=acme), 403)
    await ask(house, acme)
    deleted, refused, published = (await audit(house, target="cron"))[:3]
    assert {name: deleted[name] for name in ("action", "outcome", "key", "tenant", "request_id")} == {
        "action": "expert.delete", "outcome": "done", "key": key_id, "tenant": "acme", "request_id": "mine",
    }  # fmt: skip
    assert (refused["outcome"], refused["code"], refused["tenant"]) == ("refused", "model_not_found", "globex")
    assert published["request_id"] == answer.headers["x-request-id"]
    assert published["details"]["digest"] == answer.json()["digest"]
    made = await audit(house, action="key.create", tenant="acme")
    assert [(one["outcome"], one["code"]) for one in made] == [("refused", "insufficient_role")]
    made = await audit(house, action="key.create")
    assert {"for": "acme", "roles": "infer upload", "label": ""} in [one.get("details") for one in made]
    text = (house.folder / "data/audit.jsonl").read_text()
    assert len(text.splitlines()) == len(await audit(house))
    for headers in (acme, globex, ROOT):
        assert headers["authorization"].removeprefix("Bearer ") not in text
    assert "hello" not in text
    assert all(json.loads(line)["time"].endswith("Z") for line in text.splitlines())


async def test_a_change_is_in_the_log_before_its_answer_is_out(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(house.app.state.services.audit, "write", full)
    assert (await publish(house, ROOT, "cron", 1, CRON)).status_code == 201, "what is done is not taken back"


async def test_resumable_uploads_are_their_tenants(house: House) -> None:
    acme, globex = await key_of(house, "acme"), await key_of(house, "globex")
    body = {"filename": "a.safetensors", "bytes": 10, "sha256": "0" * 64}
    made = (await house.http.post("/v1/uploads", json=body, headers=acme)).json()
    other = (await house.http.post("/v1/uploads", json=body, headers=globex)).json()
    assert made["id"] != other["id"]
    assert (await house.http.post("/v1/uploads", json=body, headers=acme)).json()["id"] == made["id"]
    seen = [(await house.http.get("/v1/uploads", headers=who)).json()["data"] for who in (acme, globex, ROOT)]
    assert [[one["id"] for one in some] for some in seen[:2]] == [[made["id"]], [other["id"]]]
    assert len(seen[2]) == 2
    path, piece = f"/v1/uploads/{made['id']}", {"content-type": "application/offset+octet-stream", "upload-offset": "0"}
    for answer in (
        await house.http.get(path, headers=globex),
        await house.http.patch(path, content=b"x", headers=globex | piece),
        await house.http.delete(path, headers=globex),
        await house.http.post("/v1/experts", json={"upload": made["id"]}, headers=globex),
    ):
        assert error(answer, 404)["code"] == "upload_not_found"
    assert (await house.http.patch(path, content=b"x", headers=acme | piece)).status_code == 204
