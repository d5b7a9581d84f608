"""Aliases follow their expert, shadow nothing, point to no alias, and never to nothing."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from store.access import Caller, Role
from store.alias import Alias, alias_to_json, parse_entry
from store.backends import ABSENT, BlobStore
from store.backends.disk import DiskStore
from store.backends.redis import RedisStore
from store.errors import (
    ConflictError,
    ExpertUnavailableError,
    InvalidRequestError,
    NotFoundError,
    QuotaExceededError,
)
from store.garbage import used_in
from store.ownership import MAX_ALIASES
from store.registry import Registry
from store.upkeep import Finding, Verdict, migrate, verify
from tests.store.builders import base_manifest, write_sample
from tests.store.conftest import Opener
from tests.store.redis_server import RedisServer

RESERVED = frozenset({"auto", "base"})


@pytest.fixture
def registry(store: BlobStore) -> Registry:
    return Registry(store, base_manifest(), RESERVED)


def publish(store: BlobStore, registry: Registry, name: str, seed: int = 0) -> str:
    path = write_sample(store.quarantine() / f"upload-{name}-{seed}", seed)
    return registry.publish(path, name=name, replace=True)[0].digest


def test_an_alias_follows_its_expert(store: BlobStore, registry: Registry, opener: Opener) -> None:
    first = publish(store, registry, "cron-v1")
    alias, created = registry.alias_changes.put("cron", "cron-v1")
    assert created
    assert (alias.name, alias.target) == ("cron", "cron-v1")
    assert registry.get("cron") == registry.get("cron-v1")
    assert registry.get("cron").name == "cron-v1", "answers tell the expert's own name"
    assert [record.name for record in registry.list()] == ["cron-v1"]
    assert registry.aliases() == [(alias, registry.get("cron-v1"))]
    assert registry.aliases_of("cron-v1") == ("cron",)
    second = publish(store, registry, "cron-v1", 1)
    assert registry.get("cron").digest == second
    registry.roll_back("cron-v1")
    assert registry.get("cron").digest == first
    third = publish(store, registry, "other", 2)
    assert registry.alias_changes.put("cron", "other")[1] is False
    assert registry.get("cron").digest == third
    assert registry.alias_changes.put("cron", "other") == (registry.alias("cron"), False)
    assert Registry(opener(), base_manifest(), RESERVED).get("cron").digest == third
    assert registry.alias_changes.remove("cron").target == "other"
    with pytest.raises(NotFoundError, match="did you mean cron-v1"):
        registry.get("cron")
    with pytest.raises(NotFoundError, match="no alias"):
        registry.alias_changes.remove("cron")


def test_what_cannot_be(store: BlobStore, registry: Registry) -> None:
    publish(store, registry, "a")
    publish(store, registry, "b", 1)
    registry.alias_changes.put("x", "a")
    for name, target, kind, param in (
        ("a", "b", ConflictError, "alias"),
        ("y", "x", InvalidRequestError, "target"),
        ("x", "x", InvalidRequestError, "target"),
        ("y", "y", InvalidRequestError, "target"),
        ("y", "none", NotFoundError, "target"),
        ("auto", "a", InvalidRequestError, "name"),
        ("Upper", "a", InvalidRequestError, "name"),
    ):
        with pytest.raises(kind) as caught:
            registry.alias_changes.put(name, target)
        assert caught.value.param == param
    assert registry.alias("x").target == "a"
    for change in (
        lambda: publish(store, registry, "x", 2),
        lambda: registry.roll_back("x"),
        lambda: registry.describe("x", description="y"),
        lambda: registry.remove("x"),
        lambda: registry.remove("x", force=True),
    ):
        with pytest.raises(ConflictError, match="is an alias of a") as refused:
            change()
        assert refused.value.code == "is_alias"
    other = Registry(store, base_manifest(seed=1), RESERVED)
    with pytest.raises(ExpertUnavailableError):
        other.get("x")
    assert other.aliases() == []


def test_an_expert_with_aliases_goes_only_with_them(store: BlobStore, registry: Registry) -> None:
    publish(store, registry, "a")
    registry.alias_changes.put("x", "a")
    registry.alias_changes.put("y", "a")
    with pytest.raises(ConflictError, match="also called x, y") as caught:
        registry.remove("a")
    assert caught.value.code == "has_aliases"
    assert registry.get("x").name == "a"
    registry.remove("a", force=True)
    assert store.records() == {}
    assert registry.aliases_of("a") == ()
    publish(store, registry, "b")
    registry.alias_changes.put("z", "b")
    registry.undo(registry.get("b"))
    assert store.records() == {}


def test_another_process_sees_it(store: BlobStore, registry: Registry, opener: Opener) -> None:
    other = Registry(opener(), base_manifest(), RESERVED)
    publish(store, registry, "a")
    registry.alias_changes.put("x", "a")
    deadline = time.monotonic() + 60
    while not other.aliases():
        assert time.monotonic() < deadline
    assert other.get("x").name == "a"
    registry.alias_changes.remove("x")
    while other.aliases():
        assert time.monotonic() < deadline


def test_an_alias_never_points_to_nothing(store: BlobStore, registry: Registry, opener: Opener) -> None:
    """One process aliases while another one removes: whoever comes second is refused, or takes both away."""
    elsewhere = opener()
    other = Registry(elsewhere, base_manifest(), RESERVED)
    done = threading.Event()

    def give_names() -> None:
        turn = 0
        while not done.is_set():
            with suppress(NotFoundError):
                other.alias_changes.put(f"x{turn % 3}", "a")
            turn += 1

    naming = threading.Thread(target=give_names)
    naming.start()
    try:
        for turn in range(15):
            publish(store, registry, "a", turn % 2)
            registry.remove("a", force=True)
            found = {name: parse_entry(name, data) for name, data in store.records().items()}
            assert not [one for one in found.values() if isinstance(one, Alias) and one.target not in found]
    finally:
        done.set()
        naming.join()


def test_garbage_verification_and_migration_know_aliases(
    store: BlobStore, registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> None:
    digest = publish(store, registry, "m")
    registry.alias_changes.put("a", "m")
    assert used_in(store) == {digest}
    registry.collect_garbage(0)
    assert store.blobs() == {digest}
    assert list(verify(store)) == [Finding("a", Verdict.SOUND), Finding("m", Verdict.SOUND)]
    target = DiskStore(tmp_path_factory.mktemp("target"))
    steps = migrate(store, target)
    assert next(steps) == ("m", True), "the expert first"
    assert list(steps) == [("a", True)]
    assert Registry(target, base_manifest(), RESERVED).get("a").digest == digest
    target.delete_record("m")
    assert next(verify(target)) == Finding("a", Verdict.DANGLING)
    assert Verdict.DANGLING.is_fault
    with pytest.raises(NotFoundError):
        Registry(target, base_manifest(), RESERVED).get("a")
    target.close()


def test_damaged_aliases_hide_nothing(store: BlobStore, registry: Registry) -> None:
    publish(store, registry, "a")
    for data in (
        b'{"alias_of": 1}',
        b'{"name": "y", "alias_of": "a", "created": 1}',
        alias_to_json(Alias("x", "x", 1)),
    ):
        store.put_record("x", data, expected=store.get_record("x") or ABSENT)
        assert registry.aliases() == []
        assert [record.name for record in registry.list()] == ["a"]
        assert used_in(store) is None


def test_a_redis_that_lost_everything_gets_aliases_back(
    own_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = RedisStore(own_redis.url, tmp_path_factory.mktemp("cache"), cache_bytes=1 << 30)
    registry = Registry(store, base_manifest(), RESERVED)
    publish(store, registry, "m")
    registry.alias_changes.put("a", "m")
    own_redis.restart_empty()
    deadline = time.monotonic() + 60
    while store.lost().keys() != {"a", "m"}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    registry.restore_lost()
    assert store.lost() == {}
    assert store.get_record("a") is not None
    assert registry.get("a").name == "m"
    store.close()


def test_a_tenant_gives_an_expert_so_many_aliases_and_no_more(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    registry = Registry(store, base_manifest(), RESERVED)
    acme = Caller("a", "acme", frozenset({Role.UPLOAD}))
    for name in ("one", "two"):
        registry.publish(write_sample(store.quarantine() / name), name=name, by=acme)
    for turn in range(MAX_ALIASES):
        registry.alias_changes.put(f"x{turn}", "one", acme)
    with pytest.raises(QuotaExceededError, match="remove one first") as caught:
        registry.alias_changes.put("more", "one", acme)
    assert (caught.value.code, caught.value.param) == ("quota_exceeded", "target")
    assert registry.alias_changes.put("x0", "one", acme)[1] is False, "what is there is no new one"
    registry.alias_changes.put("x0", "two", acme)
    registry.alias_changes.put("more", "one", acme)
    registry.alias_changes.put("the-operator-s", "one")
    store.close()


def test_many_aliases_of_one_expert_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying those before each took the square of their number: minutes, of so many."""
    store = DiskStore(tmp_path / "store")
    registry = Registry(store, base_manifest(), RESERVED)
    publish(store, registry, "one")
    names = [f"x{turn:05}" for turn in range(60_000)]
    monkeypatch.setattr("store.catalogue.parse_entry", lambda name, _: Alias(name, "one", 1))
    monkeypatch.setattr(store, "records", lambda: dict.fromkeys(names, b""))
    monkeypatch.setattr(store, "edition", lambda: -1)
    registry.list()
    assert registry.aliases_of("one") == tuple(names)
    store.close()
