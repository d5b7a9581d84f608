"""`/debug/engine`: what runs now, for administrators."""

from __future__ import annotations

import asyncio

import pytest

from tests.api.house import House, error

pytestmark = pytest.mark.anyio


async def test_it_shows_what_runs_by_name_and_no_text(house: House) -> None:
    house.engine.delay = 0.01
    asking = asyncio.create_task(house.chat("my-secret-prompt", model="cron"))
    while not house.engine.open:
        await asyncio.sleep(0.001)
    seen = await house.http.get("/debug/engine")
    assert seen.status_code == 200
    view = seen.json()
    (lane,) = view["lanes"]
    (digest,) = lane["mix"]
    assert view["names"] == {digest: ["cron"]}
    assert view["stats"]["running"] == 1
    assert "my-secret" not in seen.text
    await asking


async def test_the_base_s_weights_are_hashed_where_that_is_asked_for(house: House) -> None:
    assert (await house.http.get("/debug/engine")).json()["base_sha256"] is None
    seen = (await house.http.get("/debug/engine", params={"hash": "true"})).json()
    assert seen["base_sha256"] == await house.engine.base_sha256()


async def test_a_dead_engine_says_so(house: House) -> None:
    house.engine.alive = False
    try:
        assert error(await house.http.get("/debug/engine"), 503)["code"] == "engine_dead"
    finally:
        house.engine.alive = True
