"""Servers of one Redis: keys made or revoked on one count on the other, limits are shared, and a Redis that hangs loses
nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.backends.redis import RedisStore
from store.backends.redis_ledger import RedisLedger
from store.upkeep import verify
from tests.api.house import BASE, House, error, make_expert, open_house
from tests.api.test_uploads import sent
from tests.store.redis_server import RedisServer, executable

pytestmark = pytest.mark.anyio

ROOT = {"authorization": "Bearer root"}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    if executable() is None:
        pytest.skip("no redis-server")
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.close()


async def status(house: House, headers: dict[str, str], path: str = "/v1/models") -> int:
    return (await house.http.get(path, headers=headers)).status_code


async def until(house: House, headers: dict[str, str], wanted: int) -> None:
    async with asyncio.timeout(60):
        while await status(house, headers) != wanted:
            await asyncio.sleep(0.005)


async def test_keys_and_limits_are_shared(redis: RedisServer, tmp_path: Path) -> None:
    async with (
        open_house(tmp_path / "a", ledger=RedisLedger(redis.url), api_keys="root") as one,
        open_house(tmp_path / "b", ledger=RedisLedger(redis.url), api_keys="root") as two,
    ):
        body = {"tenant": "acme", "roles": ["infer"], "requests_per_minute": 3}
        made = (await one.http.post("/v1/admin/keys", json=body, headers=ROOT)).json()
        headers = {"authorization": f"Bearer {made['key']}"}
        assert await status(one, headers) == 200
        await until(two, headers, 200)
        asked = [
            (await house.http.post("/v1/completions", json={"model": BASE, "prompt": "x"}, headers=headers)).status_code
            for house in (one, two, one, two)
        ]
        assert asked == [200, 200, 200, 429]
        await one.app.state.services.meter.settle()
        used = (await two.http.get("/v1/usage", headers=headers)).json()
        assert used["requests"] == 3
        await two.http.delete(f"/v1/admin/keys/{made['id']}", headers=ROOT)
        assert await status(two, headers) == 401
        await until(one, headers, 401)


async def test_uploads_are_refused_while_redis_hangs_and_none_is_lost(redis: RedisServer, tmp_path: Path) -> None:
    store = RedisStore(redis.url, tmp_path / "copies", cache_bytes=1 << 30, timeout=0.5)
    ledger = RedisLedger(redis.url, timeout=0.5)
    async with open_house(tmp_path, store=store, ledger=ledger) as house:
        assert (await house.upload(make_expert(tmp_path / "old", name="old"))).status_code == 201
        upload = await sent(house, make_expert(tmp_path / "kept", value=2, name="kept").read_bytes())
        files = [make_expert(tmp_path / f"e{i}", value=3 + i, name=f"e{i}") for i in range(8)]
        redis.pause()
        async with asyncio.timeout(60):
            published = house.http.post("/v1/experts", json={"upload": upload})
            for refused in await asyncio.gather(published, *map(house.upload, files)):
                assert error(refused, 503)["code"] == "store_unavailable"
                assert int(refused.headers["retry-after"]) > 0
        assert [path.name for path in (tmp_path / "copies").rglob("quarantine/*/*") if path.name != ".lock"] == []
        assert [expert["id"] for expert in (await house.http.get("/v1/experts")).json()["data"]] == ["old"]
        redis.resume()
        async with asyncio.timeout(60):
            while (again := await house.http.post("/v1/experts", json={"upload": upload})).status_code == 503:
                await asyncio.sleep(0.05)
        assert again.status_code == 201, "what was uploaded before is still there"
        for path in files:
            assert (await house.upload(path)).status_code == 201
        listed = {expert["id"] for expert in (await house.http.get("/v1/experts")).json()["data"]}
        assert listed == {"old", "kept", *(f"e{i}" for i in range(8))}
        found = await asyncio.to_thread(lambda: list(verify(store)))
        assert sorted(finding.subject for finding in found) == sorted(listed)
        assert not [finding for finding in found if finding.verdict.is_fault]
