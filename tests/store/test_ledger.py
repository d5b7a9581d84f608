"""The ledger: one suite for the folder and for a real Redis."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.backends.disk_ledger import DiskLedger
from store.backends.ledger import Ledger, LocalBuckets, Rate
from store.backends.redis_ledger import RedisLedger
from store.errors import StoreError, StoreUnavailableError
from tests.store.redis_server import RedisServer, executable

Opener = Callable[[], Ledger]
NEVER = -1e18


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if executable() is None:
        pytest.skip("no redis-server")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.close()


@pytest.fixture(params=["disk", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens the same ledger as often as it is called: each is another server's."""
    opened: list[Ledger] = []
    if request.param == "redis":
        server = request.getfixturevalue("redis")
        server.client.flushall()

    def open_one() -> Ledger:
        opened.append(DiskLedger(tmp_path / "ledger") if request.param == "disk" else RedisLedger(server.url))
        return opened[-1]

    yield open_one
    for ledger in opened:
        ledger.close()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_documents_come_and_go(opener: Opener) -> None:
    ledger = opener()
    assert ledger.documents("keys") == {}
    assert ledger.put("keys", "b", b"2")
    assert ledger.put("keys", "a", b"1", absent=True)
    assert not ledger.put("keys", "a", b"9", absent=True)
    assert ledger.documents("keys") == {"a": b"1", "b": b"2"}
    assert ledger.documents("tenants") == {}
    assert ledger.delete("keys", "a")
    assert not ledger.delete("keys", "a")
    assert ledger.documents("keys") == {"b": b"2"}


def test_what_one_server_changes_another_sees(opener: Opener) -> None:
    mine, yours = opener(), opener()
    assert yours.documents("keys") == {}
    before = yours.edition()
    mine.put("keys", "a", b"1")
    assert eventually(lambda: yours.edition() != before)
    assert yours.documents("keys") == {"a": b"1"}
    before = yours.edition()
    assert yours.edition() == before
    mine.delete("keys", "a")
    assert eventually(lambda: yours.edition() != before and yours.documents("keys") == {})


def test_it_survives_its_process(opener: Opener) -> None:
    first = opener()
    first.put("keys", "a", b"1")
    first.add("usage", {"x": 3})
    second = opener()
    assert (second.documents("keys"), second.sums("usage")) == ({"a": b"1"}, {"x": 3})


def test_nothing_is_lost_of_sums_that_many_add_to(opener: Opener) -> None:
    ledgers = [opener(), opener()]

    def work(ledger: Ledger) -> None:
        for _ in range(10):
            ledger.add("usage", {"requests": 1, "tokens": 7})

    threads = [threading.Thread(target=work, args=(ledger,)) for ledger in ledgers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledgers[0].sums("usage") == {"requests": 40, "tokens": 280}


def test_a_bucket_empties_goes_into_debt_and_fills(opener: Opener) -> None:
    ledger, rate = opener(), Rate(10, 50)
    assert ledger.take("k", rate, 9, least=1).granted
    assert ledger.take("k", rate, 30, least=1).granted  # at least one was there: the rest is a debt
    refused = ledger.take("k", rate, 1, least=1)
    assert not refused.granted
    assert refused.level < 0
    assert ledger.take("other", rate, 1, least=1).granted
    assert eventually(lambda: ledger.take("k", rate, 0, least=9).granted)
    assert ledger.take("k", rate, 500, least=NEVER).level < -400


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    ledger = DiskLedger(tmp_path / "ledger")
    ledger.put("keys", "a", b"1")
    assert stat.S_IMODE((tmp_path / "ledger").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "ledger/keys/a.json").stat().st_mode) == 0o600
    for name in ("../a", "", "A", "a/b"):
        with pytest.raises(StoreError):
            ledger.put("keys", name, b"1")
    ledger.close()


def test_a_writer_that_was_killed_half_way_leaves_nobody_stale(tmp_path: Path) -> None:
    ledger = DiskLedger(tmp_path / "ledger")
    with ledger._edition.changing():
        assert ledger.edition() != ledger.edition()
        again = DiskLedger(tmp_path / "ledger")
        assert again.edition() == again.edition()
    ledger.close()
    again.close()


def test_without_redis_keys_and_rates_go_on_from_what_is_known(redis: RedisServer) -> None:
    redis.client.flushall()
    ledger = RedisLedger(redis.url, timeout=0.3)
    ledger.put("keys", "a", b"1")
    assert ledger.documents("keys") == {"a": b"1"}
    redis.kill()
    try:
        assert ledger.documents("keys") == {"a": b"1"}
        with pytest.raises(StoreUnavailableError):
            ledger.put("keys", "b", b"2")
        rate = Rate(2, 0.001)
        assert [ledger.take("k", rate, 1, least=1).granted for _ in range(3)] == [True, True, False]
    finally:
        redis.start()
        ledger.close()


def test_a_key_revoked_in_an_older_copy_is_revoked_everywhere(redis: RedisServer) -> None:
    """The edition is the same as before: a change was lost, and another one made."""
    redis.client.flushall()
    mine, yours = RedisLedger(redis.url), RedisLedger(redis.url)
    mine.put("keys", "a", b"1")
    copy = redis.copy()
    mine.put("keys", "b", b"2")
    assert mine.documents("keys") == {"a": b"1", "b": b"2"}
    with mine._reading:  # it sees nothing meanwhile
        redis.go_back(copy)
        yours.delete("keys", "a")
    assert eventually(lambda: mine.documents("keys") == {})
    mine.close()
    yours.close()


def test_changes_by_servers_of_an_earlier_version_are_seen(redis: RedisServer) -> None:
    redis.client.flushall()
    ledger = RedisLedger(redis.url)
    assert ledger.documents("keys") == {}
    for count in (1, 2):
        redis.client.hset("switchyard:ledger:keys", str(count), b"x")
        redis.client.incr("switchyard:ledger:edition")
        assert eventually(lambda count=count: len(ledger.documents("keys")) == count)
    ledger.close()


def test_whatever_breaks_the_listener_it_goes_on(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    redis.client.flushall()
    mine, yours = RedisLedger(redis.url), RedisLedger(redis.url)
    broken = threading.Event()

    def fail() -> None:
        monkeypatch.undo()
        broken.set()
        raise RuntimeError("a bug")

    assert mine.documents("keys") == {}
    monkeypatch.setattr(mine, "_refresh", fail)
    assert broken.wait(60)
    yours.put("keys", "a", b"1")
    assert eventually(lambda: mine.documents("keys") == {"a": b"1"})
    assert "a bug" in caplog.text
    mine.close()
    yours.close()


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 20)), max_size=30))
def test_nobody_gets_more_than_the_rate(steps: list[tuple[float, float]]) -> None:
    now = 0.0
    buckets, rate = LocalBuckets(lambda: now), Rate(10, 2)
    spent = 0.0
    for wait, cost in steps:
        now += wait
        if buckets.take("k", rate, cost, least=min(cost, rate.capacity)).granted:
            spent += cost
        overdraft = max(0.0, max(cost for _, cost in steps) - rate.capacity)
        assert spent <= rate.capacity + rate.per_second * now + overdraft + 1e-6
