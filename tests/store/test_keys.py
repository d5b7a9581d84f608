"""API keys: only digests are kept, and what is revoked or expired opens nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store.access import OPERATOR, Access, Caller, Role, Visibility
from store.backends.disk_ledger import DiskLedger
from store.errors import InvalidRequestError, NotFoundError
from store.keys import LATEST_EXPIRY, Keys

INFER = frozenset({Role.INFER})


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[DiskLedger]:
    ledger = DiskLedger(tmp_path / "ledger")
    yield ledger
    ledger.close()


@pytest.fixture
def keys(ledger: DiskLedger) -> Keys:
    return Keys(ledger)


def test_a_key_opens_until_it_is_revoked(keys: Keys, ledger: DiskLedger) -> None:
    assert not keys
    key, token = keys.create(tenant="acme", roles=INFER, label="ci", by="test")
    assert keys
    found = Keys(ledger).find(token)
    assert found == key
    assert found.caller == Caller(key.id, "acme", INFER)
    assert keys.revoke(key.id).revoked is not None
    assert keys.find(token) is None
    assert Keys(ledger).find(token) is None
    assert keys.revoke(key.id) == keys.list()[0]
    assert keys, "a store whose last key is revoked is not one that never had any"


def test_nothing_of_the_secret_is_kept(keys: Keys, tmp_path: Path) -> None:
    key, token = keys.create(tenant="acme", roles=INFER, by="test")
    secret = token.removeprefix(f"sy_{key.id}_")
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(secret) == 43
    assert key.id.encode() in kept
    assert secret.encode() not in kept
    assert secret not in repr(keys.list())


def test_expiry(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    _, token = keys.create(tenant="acme", roles=INFER, expires=int(now) + 60, by="test")
    assert keys.find(token)
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert keys.find(token) is None


@pytest.mark.parametrize(
    "change", [lambda t: t[:-1], lambda t: t + "x", lambda t: t[:-1] + "!", str.upper, lambda t: ""]
)
def test_what_is_like_a_key_is_none(keys: Keys, change: Any) -> None:
    _, token = keys.create(tenant="acme", roles=INFER, by="test")
    other, _ = keys.create(tenant="acme", roles=INFER, by="test")
    assert keys.find(change(token)) is None
    assert keys.find(f"sy_{other.id}_{token[-43:]}") is None
    assert keys.find(f"sy_{'0' * 12}_{token[-43:]}") is None


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tenant": "Acme"}, "tenant"),
        ({"tenant": None}, "tenant"),
        ({"roles": frozenset()}, "roles"),
        ({"expires": 1}, "expires"),
        ({"expires": LATEST_EXPIRY + 1}, "expires"),
        ({"label": "ü" * 101}, "label"),
    ],
)
def test_bad_values_are_named(keys: Keys, given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        keys.create(**{"tenant": "acme", "roles": INFER, "by": "test", **given})
    assert refusal.value.param == param
    with pytest.raises(NotFoundError):
        keys.revoke("nobody")


def test_a_damaged_key_opens_nothing_and_shows(keys: Keys, ledger: DiskLedger) -> None:
    key, token = keys.create(tenant="acme", roles=INFER, by="test")
    for data in (b"{", b"[]", b'{"digest": 1}', b'{"roles": ["root"]}'):
        ledger.put("keys", key.id, data)
        assert keys.find(token) is None
        assert [(one.id, one.label) for one in keys.list()] == [(key.id, "(damaged)")]


def test_who_sees_and_owns_what() -> None:
    acme, other = Caller("k", "acme", INFER), Caller("k", "other", INFER)
    nobody, admin = Caller("k"), Caller("k", None, frozenset({Role.ADMIN}))
    private = Access("acme", Visibility.PRIVATE)
    shared = Access("acme", Visibility.SHARED, ("other",))
    public = Access("acme", Visibility.PUBLIC)
    assert [
        [who.sees(what) for who in (acme, other, nobody, admin)] for what in (private, shared, public, Access())
    ] == [
        [True, False, False, True],
        [True, True, False, True],
        [True, True, True, True],
        [True, True, True, True],
    ]
    assert [who.owns(what) for who in (acme, other, nobody) for what in (private, shared, public, Access())] == [
        True, True, True, False, *[False] * 8,
    ]  # fmt: skip
    assert all(OPERATOR.owns(what) for what in (private, shared, public, Access()))
    # A tenant that lost its name must not match experts of nobody.
    assert not Caller("k", None, INFER).owns(Access(None, Visibility.PRIVATE))
    assert not Caller("k", None, INFER).sees(Access(None, Visibility.PRIVATE))
