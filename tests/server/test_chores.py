"""Chores run side by side; what goes wrong is said once, and tried again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from server.chores import Chore, do_all
from store.errors import StoreError

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def test_one_that_fails_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    turns = {"bad": 0, "broken": 0, "good": 0}

    async def bad() -> None:
        turns["bad"] += 1
        if turns["bad"] != 5:
            raise StoreError("the store is away")

    async def broken() -> None:
        turns["broken"] += 1
        raise KeyError("a bug")

    async def good() -> None:
        turns["good"] += 1

    names = (("mirroring", bad), ("counting", broken), ("tidying", good))
    with caplog.at_level(logging.WARNING, "server.chores"):
        doing = asyncio.create_task(do_all([Chore(name, 0.001, work) for name, work in names]))
        async with asyncio.timeout(30):
            while min(turns.values()) < 10:
                await asyncio.sleep(0.001)
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing
    said = [record.getMessage() for record in caplog.records]
    assert said.count("mirroring must wait: the store is away") == 2, "once, and again after it had gone well"
    assert said.count("counting failed") == 1
