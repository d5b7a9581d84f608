"""Rates and usage, with a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.metering import Meter, duration
from store.access import Caller, Role
from store.backends.disk_ledger import DiskLedger
from store.backends.ledger import Balance, LocalBuckets, Rate
from store.errors import RateLimitError, StoreError
from store.keys import Keys
from store.tenants import Limits, Tenants

pytestmark = pytest.mark.anyio

ACME = Caller("key", "acme", frozenset({Role.INFER}))


class World:
    """A meter whose time stands still."""

    def __init__(self, folder: Path, usual: Limits) -> None:
        self.now = 1_795_600_000.0
        self.ledger = DiskLedger(folder)
        self.ledger._buckets = LocalBuckets(lambda: self.now)
        self.keys = Keys(self.ledger)
        self.tenants = Tenants(self.ledger, usual)
        self.meter = Meter(self.ledger, self.keys, self.tenants, clock=lambda: self.now)

    def spent(self) -> dict[tuple[str | None, str, str], int]:
        return {(use.tenant, use.key, use.field): use.amount for use in self.meter.usage("2026-11")}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "ledger", Limits(requests_per_minute=3, tokens_per_minute=60))
    yield world
    world.ledger.close()


async def test_requests_are_refused_when_they_are_used_up_and_come_back(world: World) -> None:
    left = [(await world.meter.admit(ACME))[-1].remaining for _ in range(3)]
    assert left == [2, 1, 0]
    with pytest.raises(RateLimitError) as refusal:
        await world.meter.admit(ACME)
    assert refusal.value.retry_after == 20
    assert refusal.value.headers["x-ratelimit-limit-requests"] == "3"
    assert refusal.value.headers["x-ratelimit-remaining-requests"] == "0"
    assert refusal.value.headers["x-ratelimit-reset-requests"] == "1m0s"
    world.now += 20
    await world.meter.admit(ACME)
    await world.meter.admit(Caller("key", "globex"))


async def test_tokens_leave_a_debt_that_must_be_filled(world: World) -> None:
    world.tenants.put("acme", Limits(tokens_per_minute=60))
    await world.meter.admit(ACME)
    world.meter.charge(ACME, prompt_tokens=50, completion_tokens=50)
    await world.meter.settle()
    with pytest.raises(RateLimitError, match="60 tokens per minute") as refusal:
        await world.meter.admit(ACME)
    assert refusal.value.retry_after == 41
    world.now += 40.5
    with pytest.raises(RateLimitError):
        await world.meter.admit(ACME)
    world.now += 1
    await world.meter.admit(ACME)


async def test_a_keys_own_limit_counts_besides_its_tenants(world: World) -> None:
    made = [
        world.keys.create(tenant="acme", roles=frozenset({Role.INFER}), requests_per_minute=n, by="t")[0]
        for n in (1, 9)
    ]
    narrow, wide = (key.caller for key in made)
    await world.meter.admit(narrow)
    with pytest.raises(RateLimitError, match="1 requests"):
        await world.meter.admit(narrow)
    left = [(await world.meter.admit(wide))[-1].remaining for _ in range(2)]
    assert left == [1, 0], "the refused one has cost its tenant nothing"
    with pytest.raises(RateLimitError, match="3 requests"):
        await world.meter.admit(wide)


@pytest.mark.parametrize("failure", [RateLimitError, StoreError])
async def test_a_request_that_is_not_let_in_costs_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    key, _ = world.keys.create(tenant="acme", roles=frozenset({Role.INFER}), requests_per_minute=2, by="t")
    world.tenants.put("acme", Limits(requests_per_minute=0 if failure is RateLimitError else 9))
    take = world.ledger.take

    def broken(bucket: str, rate: Rate, cost: float, *, least: float) -> Balance:
        if bucket == "tenant-acme-requests":
            raise StoreError("no disk")
        return take(bucket, rate, cost, least=least)

    with monkeypatch.context() as patched:
        patched.setattr(world.ledger, "take", broken if failure is StoreError else take)
        for _ in range(5):
            with pytest.raises(failure):
                await world.meter.admit(key.caller)
    world.tenants.reset("acme")
    assert [(await world.meter.admit(key.caller))[-1].remaining for _ in range(2)] == [1, 0]


async def test_no_limits_cost_nothing_and_are_counted_all_the_same(world: World) -> None:
    operator = Caller("settings-1", None, frozenset({Role.ADMIN}))
    assert [await world.meter.admit(operator) for _ in range(50)] == [[]] * 50
    world.meter.charge(operator, prompt_tokens=10**9)
    await world.meter.settle()
    assert world.spent() == {(None, "settings-1", "requests"): 50, (None, "settings-1", "prompt_tokens"): 10**9}


async def test_a_limit_of_nothing_lets_nothing_in(world: World) -> None:
    world.tenants.put("acme", Limits(requests_per_minute=0))
    with pytest.raises(RateLimitError) as refusal:
        await world.meter.admit(ACME)
    assert refusal.value.retry_after == 3600
    world.tenants.reset("acme")
    await world.meter.admit(ACME)


async def test_usage_is_kept_by_day_key_and_field_and_survives_failures(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.meter.admit(ACME)
    world.meter.charge(ACME, prompt_tokens=7)
    world.meter.charge(ACME, completion_tokens=3)
    with monkeypatch.context() as broken:
        broken.setattr(world.ledger, "add", lambda *_: (_ for _ in ()).throw(StoreError("no disk")))
        with pytest.raises(StoreError):
            await world.meter.settle()
    await world.meter.settle()
    await world.meter.settle()
    world.now += 86400
    world.meter.charge(ACME, completion_tokens=5)
    await world.meter.settle()
    assert [(use.day, use.field, use.amount) for use in world.meter.usage("2026-11")] == [
        ("2026-11-25", "completion_tokens", 3),
        ("2026-11-25", "prompt_tokens", 7),
        ("2026-11-25", "requests", 1),
        ("2026-11-26", "completion_tokens", 5),
    ]
    assert world.spent().keys() == {
        ("acme", "key", field) for field in ("completion_tokens", "prompt_tokens", "requests")
    }


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0123, "13ms"), (1, "1s"), (1.54, "1.5s"), (60, "1m0s"), (3661.2, "61m1.2s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_damaged_limits_are_the_usual_ones(tmp_path: Path) -> None:
    ledger, usual = DiskLedger(tmp_path), Limits(max_experts=2)
    tenants = Tenants(ledger, usual)
    for data in (b"{", b'{"max_experts": -1}', b'{"max_bytes": "much"}'):
        ledger.put("tenants", "acme", data)
        assert tenants.limits("acme") == usual
    ledger.put("tenants", "acme", b"{}")
    assert tenants.limits("acme") == Limits()
    assert tenants.limits(None) == Limits()
    ledger.close()
