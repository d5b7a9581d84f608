from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from tests.api.house import CRON, FRENCH, House, make_expert, open_house


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def shared_house(tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> AsyncIterator[House]:
    """One server with two experts; making one for each test would take most of the suite's time."""
    async with open_house(tmp_path_factory.mktemp("house")) as house:
        for value, (name, exemplars) in enumerate((("cron", CRON), ("french", FRENCH)), start=1):
            path = make_expert(house.folder / name, value=value, name=name, exemplars=tuple(exemplars))
            assert (await house.upload(path)).status_code == 201
        yield house


@pytest.fixture
def house(shared_house: House) -> House:
    """The shared server, with the engine's levers back in place. For tests that leave the experts alone."""
    shared_house.engine.reset()
    return shared_house


@pytest.fixture
def openai(house: House) -> AsyncOpenAI:
    return house.openai()
