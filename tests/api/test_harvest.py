"""Exemplars out of an expert's own named traffic, where the operator asks for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from server.audit import AuditLog
from server.choices import Part
from server.chores import Chore
from server.harvest import ENOUGH, Harvest
from server.prompts import ChatPrompt, TextPrompt, TokenPrompt
from store.access import OPERATOR
from store.errors import StoreError
from tests.api.dummy_engine import DummyTokenizer
from tests.api.house import CRON, House, make_expert, open_house

pytestmark = pytest.mark.anyio

MOST = 40
PLANTS = [f"water plant {n} now" for n in range(100, 160)]
"""Short enough for the 24 tokens, here bytes, that routing looks at."""


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path, harvest_exemplars=MOST) as house:
        house.publish("bare", value=1)
        house.publish("cron", value=2, exemplars=CRON)
        yield house


def chore(house: House) -> Chore:
    return next(one for one in house.app.state.services.chores if one.name == "harvesting exemplars")


def exemplars(house: House, name: str) -> list[str]:
    return list(house.registry.exemplars(house.registry.get(name)))


async def ask(house: House, name: str, prompts: list[str]) -> None:
    answer = await house.http.post("/v1/completions", json={"model": name, "prompt": prompts, "max_tokens": 1})
    assert answer.status_code == 200, answer.text


async def test_an_expert_without_exemplars_is_found_after_a_while(house: House) -> None:
    digest = house.registry.get("bare").digest
    await ask(house, "bare", [*PLANTS[: ENOUGH - 1], *PLANTS[:5]])
    await chore(house).work()
    assert house.registry.get("bare").exemplar_count == 0, "the same again is no more"
    await ask(house, "bare", [PLANTS[ENOUGH - 1]])
    assert house.registry.get("bare").exemplar_count == 0, "not while somebody waits"
    await chore(house).work()
    assert exemplars(house, "bare") == PLANTS[:ENOUGH]
    assert house.registry.get("bare").digest == digest
    assert (await house.chat("water plant 777 now", model="auto")).headers["x-switchyard-mix"] == "bare=1"
    [entry] = AuditLog(house.settings.data_dir / "audit.jsonl").latest(9, {"action": "expert.exemplars_harvest"})
    assert (entry["target"], entry["key"], entry["details"]["count"]) == ("bare", "server", str(ENOUGH))
    assert "water" not in str(entry)

    await ask(house, "bare", PLANTS)
    await chore(house).work()
    assert exemplars(house, "bare") == PLANTS[:MOST], "and no more than asked for"
    await ask(house, "bare", PLANTS[40:])
    await chore(house).work()
    assert exemplars(house, "bare") == PLANTS[:MOST]


async def test_those_it_came_with_stay(house: House) -> None:
    await ask(house, "cron", CRON)
    await ask(house, "cron", PLANTS[:MOST])
    await chore(house).work()
    kept = exemplars(house, "cron")
    assert kept[: len(CRON)] == CRON
    assert len(kept) == MOST
    assert set(kept[len(CRON) :]) <= {*PLANTS, *(text[:24].strip() for text in CRON)}
    reset = await house.http.delete("/v1/experts/cron/exemplars")
    assert reset.json()["exemplar_count"] == len(CRON)


async def test_only_what_names_one_expert_counts(house: House) -> None:
    for text in PLANTS[:ENOUGH]:
        await house.chat(text, model="auto", experts=[{"id": "bare"}])
        await house.chat(text, model="auto")
        await house.chat(text)
        await house.complete(list(text.encode()), model="bare")
        await house.chat(text, model="bare", n=99)  # refused
    await chore(house).work()
    assert house.registry.get("bare").exemplar_count == 0


async def test_only_what_routing_looks_at_is_kept(house: House) -> None:
    for text in PLANTS[:ENOUGH]:
        turns = [
            {"role": "user", "content": "an earlier question"},
            {"role": "assistant", "content": "an answer"},
            {"role": "user", "content": f"{text} é and my password is {text}"},
        ]
        await house.http.post("/v1/chat/completions", json={"model": "bare", "messages": turns, "max_tokens": 1})
    await chore(house).work()
    assert exemplars(house, "bare") == [f"{text} é a" for text in PLANTS[:ENOUGH]]


async def test_prompts_that_begin_alike_are_one(house: House) -> None:
    begin = "the same twenty-three bé"  # a character is torn at its end
    assert len(begin.encode()) == 25
    alike = [f"{begin} and {n}" for n in range(MOST)]
    await ask(house, "bare", alike)
    await chore(house).work()
    assert house.registry.get("bare").exemplar_count == 0
    await ask(house, "bare", PLANTS[: ENOUGH - 1])
    await chore(house).work()
    assert exemplars(house, "bare") == [begin[:-1], *PLANTS[: ENOUGH - 1]], "they leave room for others"


async def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        assert "harvesting exemplars" not in {one.name for one in house.app.state.services.chores}


async def test_what_a_name_meant_before_is_forgotten(house: House) -> None:
    await ask(house, "bare", PLANTS[:ENOUGH])
    new = make_expert(house.folder / "new", value=9).read_bytes()
    await house.http.put("/v1/experts/bare", files={"file": ("e", new)})
    await ask(house, "cron", PLANTS[:ENOUGH])
    await house.http.delete("/v1/experts/cron")
    await chore(house).work()
    assert house.registry.get("bare").exemplar_count == 0
    assert [record.name for record in house.registry.list()] == ["bare"]


async def test_a_store_that_fails_loses_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await ask(house, "bare", PLANTS[:ENOUGH])
    with monkeypatch.context() as patched:
        library = house.app.state.services.library
        patched.setattr(library, "set_exemplars", AsyncMock(side_effect=StoreError("no disk today")))
        with pytest.raises(StoreError):
            await chore(house).work()
    await chore(house).work()
    assert exemplars(house, "bare") == PLANTS[:ENOUGH]


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.harvest._MEMORY", 2000)
    harvest = Harvest(AsyncMock(), DummyTokenizer(), AuditLog(tmp_path / "log"), most=30, tokens=2)
    for i in range(20):
        prompts = [TextPrompt(f"{n} " + "x" * 1000) for n in range(50)]
        harvest.note(
            [*prompts, TextPrompt(" "), TokenPrompt((1, 2)), ChatPrompt(())], Part(f"e{i}", "d", 1.0), OPERATOR
        )
        held = {key: list(texts) for key, texts in harvest._waiting.items()}
        assert sum(len(text) for texts in held.values() for text in texts) == harvest._size <= 2000
        assert all(len(text) <= 32 for texts in held.values() for text in texts)
        assert len(held[f"e{i}", "d"]) == 30, "the one named last stays"
    assert len(held) < 4
