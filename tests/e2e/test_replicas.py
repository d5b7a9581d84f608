"""Two whole servers on one Redis: what one of them takes, replaces or deletes, the other follows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest

from store.backends.redis_link import chunk_key
from tests.e2e.conftest import ServerProcess
from tests.e2e.fleet import answer, ask, eventually, metrics, start_replica, traffic, upload
from tests.engine.conftest import Library
from tests.store.redis_server import RedisServer, executable
from tests.tiny import save_base


@dataclass
class Pair:
    """Two servers that share nothing but a Redis."""

    library: Library
    redis: RedisServer
    here: ServerProcess
    there: ServerProcess


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if executable() is None:
        pytest.skip("there is no redis-server here")
    folder = tmp_path_factory.mktemp("replicas")
    library = Library(save_base(folder / "base"), folder)
    redis = RedisServer(folder / "redis")
    redis.start()
    with ThreadPoolExecutor() as pool:
        starting = [pool.submit(start_replica, library, redis, folder / name) for name in ("here", "there")]
    try:
        yield Pair(library, redis, *(start.result() for start in starting))
    finally:
        for start in starting:
            if start.exception() is None:
                start.result().kill()
        redis.close()


def test_an_upload_a_replacement_and_a_removal_reach_the_other_server(pair: Pair) -> None:
    first, second = pair.library.add(1), pair.library.add(2)
    here, there = pair.here.url, pair.there.url
    assert ask(there, "shared").status_code == 404
    assert upload(here, pair.library, first, "shared").status_code == 201
    eventually(lambda: ask(there, "shared").status_code == 200)
    assert answer(here, "shared") == answer(there, "shared")
    assert answer(there, "shared")[1] == first

    with traffic(there, ["shared"], threads=2) as seen:
        assert upload(here, pair.library, second, "shared", replace=True).status_code == 200
        eventually(lambda: answer(there, "shared")[1] == second)
    assert set(seen) == {200}, "the name always pointed to something"
    assert answer(here, "shared") == answer(there, "shared")

    assert upload(there, pair.library, first, "other").status_code == 201, "either may take uploads"
    eventually(lambda: ask(here, "other").status_code == 200)
    assert answer(here, "other")[1] == first


def test_a_new_name_reaches_the_other_server(pair: Pair) -> None:
    """An alias moves from one expert to another, and the old name of either goes on."""
    digests = {name: pair.library.add(seed) for seed, name in enumerate(("old", "newer"), start=10)}
    here, there = pair.here.url, pair.there.url
    for name, digest in digests.items():
        assert upload(here, pair.library, digest, name).status_code == 201
    for name, digest in digests.items():
        assert httpx.put(f"{here}/v1/aliases/stable", json={"target": name}, timeout=60).is_success
        eventually(lambda: ask(there, "stable").status_code == 200)
        eventually(lambda digest=digest: answer(there, "stable")[1] == digest)  # type: ignore[misc]
        assert answer(there, name)[1] == digest
    assert httpx.delete(f"{there}/v1/aliases/stable", timeout=60).is_success
    eventually(lambda: ask(here, "stable").status_code == 404)


def test_a_bit_flipped_in_redis_is_healed_by_the_server_that_has_a_copy(pair: Pair) -> None:
    digest = pair.library.add(3)
    assert upload(pair.here.url, pair.library, digest, "flipped").status_code == 201
    key = chunk_key(digest, 0)
    byte = pair.redis.client.getrange(key, 999, 999)[0]
    pair.redis.client.setrange(key, 999, bytes([byte ^ 4]))
    refused = ask(pair.there.url, "flipped")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "expert_damaged"
    assert int(refused.headers["retry-after"]) > 0
    eventually(lambda: ask(pair.there.url, "flipped").status_code == 200)
    assert answer(pair.there.url, "flipped") == answer(pair.here.url, "flipped")
    assert metrics(pair.there.url)["switchyard_expert_tier_faults_total|store"] >= 1
    assert metrics(pair.here.url)["switchyard_expert_tier_healed_total|store"] == 1
    assert any("integrity" in line for line in pair.there.screen)


def test_a_removal_reaches_the_other_server(pair: Pair) -> None:
    digest = pair.library.add(4)
    assert upload(pair.here.url, pair.library, digest, "passing").status_code == 201
    eventually(lambda: ask(pair.there.url, "passing").status_code == 200)
    assert httpx.delete(f"{pair.here.url}/v1/experts/passing").status_code == 200
    eventually(lambda: ask(pair.there.url, "passing").status_code == 404)
    assert ask(pair.here.url, "passing").status_code == 404
