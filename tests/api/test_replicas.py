"""Two servers of one Redis: a key made or revoked on one counts on the other, and limits are shared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.backends.redis_ledger import RedisLedger
from tests.api.house import BASE, House, open_house
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
