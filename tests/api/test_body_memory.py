"""Memory that bodies take is counted from their first byte to the end of their answer, and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.api.body_limit import FREE_BYTES, BodyMemory
from server.settings import Settings
from tests.api.house import BASE, House, error, open_house
from tests.api.test_ops import scrape

pytestmark = pytest.mark.anyio

MIB = 1 << 20


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path, body_bytes=4 * MIB, max_body_bytes=4 * MIB) as house:
        yield house


async def held(house: House) -> float:
    return (await scrape(house))["switchyard_body_bytes"]


async def test_it_is_held_to_the_end_of_the_answer(own: House) -> None:
    own.engine.delay = 3600
    asking = asyncio.create_task(own.chat("hello", user="x" * 3 * MIB))
    async with asyncio.timeout(60):
        while not own.engine.open:
            await asyncio.sleep(0.01)
    assert await held(own) > 2.9 * MIB
    refused = await own.chat("hello", user="x" * 2 * MIB)
    assert error(refused, 503)["code"] == "body_memory_full"
    assert int(refused.headers["retry-after"]) > 0
    own.engine.delay = 0
    assert (await own.chat("hello", user="x" * 1000)).status_code == 200
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert await held(own) == 0
    assert (await own.chat("hello", user="x" * 2 * MIB)).status_code == 200


async def test_a_body_of_unknown_length_is_refused_when_there_is_no_room_for_more_of_it(own: House) -> None:
    own.engine.delay = 3600
    asking = asyncio.create_task(own.chat("hello", user="x" * 3 * MIB))
    async with asyncio.timeout(60):
        while not own.engine.open:
            await asyncio.sleep(0.01)
    before, given = await held(own), 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(8):
            given += MIB // 2
            yield b" " * (MIB // 2)

    answer = await own.http.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert error(answer, 503)["code"] == "body_memory_full"
    assert given < 4 * MIB, "it is refused in its midst"
    assert await held(own) == before
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_an_upload_takes_no_more_than_its_way_to_the_disk_needs(own: House) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="e"\r\n\r\n'
        for _ in range(16):
            yield b"x" * MIB
        assert 0 < await held(own) <= 2 * MIB
        yield b"\r\n--b--\r\n"

    form = {"content-type": "multipart/form-data; boundary=b"}
    answer = await own.http.post("/v1/experts", content=pieces(), headers=form)
    assert error(answer, 400)["code"] == "invalid_expert_file"
    assert await held(own) == 0


def test_a_body_that_may_be_larger_than_all_of_them_is_a_contradiction() -> None:
    with pytest.raises(ValidationError, match="body_bytes must be at least max_body_bytes"):
        Settings(base=BASE, body_bytes=2 * MIB, max_body_bytes=3 * MIB)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40_000)), max_size=60))
def test_what_is_used_is_what_is_held_and_never_more_than_the_limit(pieces: list[tuple[int, int]]) -> None:
    memory, bodies = BodyMemory(100_000), [0] * 6
    for body, more in pieces:
        if memory.grow(bodies[body], bodies[body] + more):
            bodies[body] += more
        else:
            memory.free(bodies[body])
            bodies[body] = 0
        assert memory.used == sum(max(0, size - FREE_BYTES) for size in bodies) <= memory.limit
