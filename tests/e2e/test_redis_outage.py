"""Redis goes away under load, hangs, fills up, and comes back empty: a real server and a real redis-server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ServerProcess, switchyard
from tests.e2e.fleet import answer, ask, decoded_bytes, eventually, metrics, start_replica, traffic, upload
from tests.engine.conftest import Library
from tests.store.redis_server import RedisServer, executable
from tests.tiny import save_base

LOCAL = ("one", "two", "three")


@dataclass
class Scene:
    """A server with three experts, room for one of them on the device, and its Redis."""

    library: Library
    redis: RedisServer
    server: ServerProcess
    cache: Path
    seeds: Iterator[int] = field(default_factory=lambda: itertools.count(100))

    @property
    def url(self) -> str:
        return self.server.url

    def upload_new(self) -> httpx.Response:
        seed = next(self.seeds)
        return upload(self.url, self.library, self.library.add(seed), f"new-{seed}")

    def verify(self) -> str:
        """What `store verify` says; it must find nothing wrong."""
        done = switchyard("store", "verify", self.redis.url)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if executable() is None:
        pytest.skip("there is no redis-server here")
    folder = tmp_path_factory.mktemp("outage")
    library = Library(save_base(folder / "base"), folder)
    digests = [library.add(seed) for seed in range(3)]
    redis = RedisServer(folder / "redis")
    redis.start()
    room = int(1.5 * max(decoded_bytes(library, digest) for digest in digests))
    server = start_replica(library, redis, folder, "--expert-bytes", str(room))
    try:
        for name, digest in zip(LOCAL, digests, strict=True):
            assert upload(server.url, library, digest, name).status_code == 201
        yield Scene(library, redis, server, folder / "cache")
    finally:
        server.kill()
        redis.close()


def catalogue(url: str) -> list[dict[str, object]]:
    """The experts, but for what traffic changes of them."""
    experts = httpx.get(f"{url}/v1/experts").json()["data"]
    return [{key: value for key, value in expert.items() if key not in ("tier", "last_used")} for expert in experts]


def outage(scene: Scene, seconds: float, *, hangs: bool) -> None:
    before, texts = metrics(scene.url), [answer(scene.url, name) for name in LOCAL]
    with traffic(scene.url, LOCAL) as seen:
        (scene.redis.pause if hangs else scene.redis.kill)()
        began, refused = time.monotonic(), 0
        while time.monotonic() < began + seconds or not refused:
            response = scene.upload_new()
            assert response.status_code == 503, response.text
            assert int(response.headers["retry-after"]) > 0
            assert response.json()["error"]["code"] == "store_unavailable"
            refused += 1
            time.sleep(0.2)
        answered = seen[200]
        (scene.redis.resume if hangs else scene.redis.start)()
        eventually(lambda: scene.upload_new().status_code == 201, 60)
    assert set(seen) == {200}, "no request for a local expert failed"
    assert answered > 0
    after, device = metrics(scene.url), "switchyard_expert_tier_evictions_total|device"
    assert after[device] > before[device], "experts were loaded again meanwhile, from the disk cache"
    assert [answer(scene.url, name) for name in LOCAL] == texts
    newest = max(expert["id"] for expert in httpx.get(f"{scene.url}/v1/experts").json()["data"])
    assert ask(scene.url, newest).status_code == 200
    assert "all is well" in scene.verify()


def test_an_outage_fails_no_request_for_local_experts(scene: Scene) -> None:
    outage(scene, 2.0, hangs=False)


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_an_outage_of_half_a_minute(scene: Scene, hangs: bool) -> None:
    outage(scene, 30.0, hangs=hangs)


def test_a_full_redis_is_507_and_corrupts_nothing(scene: Scene) -> None:
    listed = catalogue(scene.url)
    with traffic(scene.url, LOCAL) as seen:
        scene.redis.client.config_set("maxmemory", 1)
        for _ in range(3):
            response = scene.upload_new()
            assert response.status_code == 507, response.text
            assert response.json()["error"]["code"] == "storage_full"
        assert catalogue(scene.url) == listed
        scene.redis.client.config_set("maxmemory", 0)
        assert scene.upload_new().status_code == 201
    assert set(seen) == {200}
    assert "all is well" in scene.verify()


def test_a_redis_that_comes_back_empty_gets_everything_back(scene: Scene) -> None:
    listed = {expert["id"]: expert["digest"] for expert in httpx.get(f"{scene.url}/v1/experts").json()["data"]}
    with traffic(scene.url, LOCAL) as seen:
        scene.redis.restart_empty()
        eventually(lambda: scene.redis.client.hlen("switchyard:records") == len(listed))
    assert set(seen) == {200}
    assert {expert["id"]: expert["digest"] for expert in httpx.get(f"{scene.url}/v1/experts").json()["data"]} == listed
    assert f"{len(listed)} experts checked: all is well" in scene.verify()
