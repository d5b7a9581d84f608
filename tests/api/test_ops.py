"""Health, readiness, version, metrics, and the route without an answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import __version__
from server.metrics import EXPERT_LABELS, Metrics
from tests.api.dummy_engine import DummyEngine
from tests.api.house import BASE, CRON, House, error, make_expert, open_house

pytestmark = pytest.mark.anyio


async def test_ready_when_the_router_is_restored(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        await house.upload(make_expert(tmp_path / "e", name="cron", exemplars=tuple(CRON)))
    for cached in (tmp_path / "cache").rglob("*.*"):
        cached.unlink()
    engine = DummyEngine()
    engine.featurize.clear()
    async with open_house(tmp_path, engine=engine, wait=False) as house:
        await asyncio.sleep(0.01)
        assert (await house.http.get("/health")).status_code == 200
        assert (await house.http.get("/v1/models/cron")).status_code == 200
        for method, path, body in (
            ("GET", "/ready", None),
            ("POST", "/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": "x"}]}),
            ("POST", "/v1/route", {"prompt": "x"}),
            ("DELETE", "/v1/experts/cron", None),
        ):
            response = await house.http.request(method, path, json=body)
            assert error(response, 503)["code"] == "not_ready"
            assert int(response.headers["retry-after"]) > 0
        engine.featurize.set()
        await house.until_ready()
        assert (await house.chat(CRON[2], model="auto")).headers["x-switchyard-mix"].startswith("cron=")
    assert not engine.alive


async def test_one_damaged_expert_does_not_keep_the_server_down(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        await house.upload(make_expert(tmp_path / "e", value=1, name="cron", exemplars=tuple(CRON)))
        damaged = (await house.upload(make_expert(tmp_path / "f", value=2, name="bad", exemplars=("a", "b")))).json()
    [blob] = (tmp_path / "data").rglob(damaged["digest"])
    blob.chmod(0o600)
    blob.write_bytes(b"damaged")
    async with open_house(tmp_path) as house:
        assert (await house.chat(CRON[2], model="auto")).headers["x-switchyard-mix"].startswith("cron=")
        assert error(await house.http.get("/v1/experts/bad"), 503)["code"] == "expert_damaged"
        assert (await scrape(house))["switchyard_expert_tier_faults_total|store"] >= 1


async def test_what_nobody_has_foreseen_does_not_end_the_following(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        whole, failed, loop = house.registry.restore_lost, asyncio.Event(), asyncio.get_running_loop()

        def fails_once() -> None:
            house.registry.restore_lost = whole  # type: ignore[method-assign]
            loop.call_soon_threadsafe(failed.set)
            raise RuntimeError("a disk that fails")

        house.registry.restore_lost = fails_once  # type: ignore[method-assign]
        await asyncio.wait_for(failed.wait(), 30)
        house.publish("cron", exemplars=CRON)
        for _ in range(200):
            if (await house.chat(CRON[0], model="auto")).headers["x-switchyard-mix"] == "cron=1":
                return
            await asyncio.sleep(0.05)
        pytest.fail("the expert was never routed to")


async def test_health_follows_the_engine(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await house.http.get("/health")).json() == {"status": "ok"}
    assert (await house.http.get("/ready")).json() == {"status": "ok"}
    monkeypatch.setattr(house.engine, "alive", False)
    for path in ("/health", "/ready"):
        assert error(await house.http.get(path), 503)["code"] == "engine_dead"
    assert error(await house.chat(), 503)["code"] == "engine_dead"


async def test_version(house: House) -> None:
    assert (await house.http.get("/version")).json() == {
        "version": __version__,
        "base": BASE,
        "fingerprint": house.engine.base.manifest.fingerprint,
    }


async def test_the_api_describes_itself(house: House) -> None:
    document = (await house.http.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            assert operation["responses"]["4XX"]["content"]["application/json"]["schema"]
    upload = document["paths"]["/v1/experts"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert upload["properties"].keys() == {"file", "exemplars", "name", "signature"}
    assert (await house.http.get("/docs")).status_code == 404


@pytest.mark.parametrize("body", [{"prompt": CRON[2]}, {"messages": [{"role": "user", "content": CRON[2]}]}])
async def test_route(house: House, body: dict[str, object]) -> None:
    decision = (await house.http.post("/v1/route", json=body)).json()
    digest = house.registry.get("cron").digest
    assert decision["object"] == "route"
    assert (decision["mix"][0]["id"], decision["mix"][0]["digest"]) == ("cron", digest)
    assert 0 < decision["mix"][0]["weight"] <= 1
    assert 0 <= decision["distance"] <= decision["threshold"]
    nearest = decision["neighbours"][0]
    assert nearest.keys() == {"id", "digest", "distance", "threshold", "exemplar"}
    assert (nearest["id"], nearest["digest"], nearest["threshold"]) == ("cron", digest, decision["threshold"])
    assert "backup job" in nearest["exemplar"]
    assert 0.5 < decision["confidence"] <= 1
    assert max(decision["votes"], key=decision["votes"].__getitem__) == "cron"
    assert decision["reason"]
    assert decision["code"]
    assert house.engine.streams == []


async def test_route_to_the_base(house: House) -> None:
    decision = (
        await house.http.post("/v1/route", json={"prompt": "How high is the tallest mountain in Africa?"})
    ).json()
    assert decision["mix"] == []
    assert decision["code"] == "out_of_domain"
    assert any(neighbour["id"] is None for neighbour in decision["neighbours"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"prompt": "x", "n": 1}, "n"),
    ],
)
async def test_route_refuses(house: House, body: dict[str, object], param: str) -> None:
    assert error(await house.http.post("/v1/route", json=body), 400)["param"] == param


async def scrape(house: House) -> dict[str, float]:
    response = await house.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_metrics(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        size = (await house.upload(make_expert(tmp_path / "e", name="cron", exemplars=tuple(CRON)))).json()["bytes"]
        await house.chat(model="cron")
        await house.chat(CRON[2], model="auto", stream=True)
        await house.chat("How high is the tallest mountain in Africa?", model="auto")
        await house.chat(model="nobody")
        await house.chat(bogus=1)
        await house.http.get("/some/where/else")
        figures = await scrape(house)
    assert figures["switchyard_requests_total|/v1/chat/completions|200"] == 3
    assert figures["switchyard_requests_total|/v1/chat/completions|404"] == 1
    assert figures["switchyard_requests_total|/v1/experts|201"] == 1
    assert figures["switchyard_requests_total|unmatched|404"] == 1
    assert figures["switchyard_failures_total|model_not_found"] == 1
    assert figures["switchyard_failures_total|unknown_parameter"] == 1
    assert figures["switchyard_time_to_first_token_seconds_count"] == 3
    assert figures["switchyard_request_duration_seconds_count"] == 3
    assert figures["switchyard_inter_token_seconds_count"] > 30
    assert figures["switchyard_router_distance_count"] == 2
    assert figures["switchyard_router_fallbacks_total"] == 1
    assert figures["switchyard_expert_requests_total|cron"] == 2
    assert figures["switchyard_generated_tokens_total"] == house.engine.generated
    assert figures["switchyard_experts"] == 1
    assert figures["switchyard_expert_tier_bytes|device"] == 2048
    assert figures["switchyard_expert_tier_bytes|store"] == size
    for name in (
        "requests_running", "requests_waiting", "kv_used_bytes", "kv_limit_bytes", "patch_seconds_total",
        "mix_switches_total",
    ):  # fmt: skip
        assert f"switchyard_{name}" in figures


async def test_metric_labels_are_bounded() -> None:
    metrics = Metrics(DummyEngine().stats, list)
    for i in range(EXPERT_LABELS + 50):
        metrics.count_expert(f"expert-{i}")
    metrics.count_expert("expert-0")
    text = metrics.render().decode()
    assert text.count("switchyard_expert_requests_total{") == EXPERT_LABELS + 1
    assert 'switchyard_expert_requests_total{expert="other"} 50.0' in text
    assert 'switchyard_expert_requests_total{expert="expert-0"} 2.0' in text
