"""`GET /v1/route/report`: how well experts are told apart, of those that exist for the caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.route_reports import REMEMBERED, RouteReports
from store.access import Caller, Role
from store.errors import QueueFullError
from tests.api.house import CRON, FRENCH, ROOT, House, error, key_of, make_expert, open_house

pytestmark = pytest.mark.anyio

RECIPES = [f"how long do I bake a cake of {n} eggs" for n in range(1, 13)]


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """`cron` is acme's, `french` is globex's, `cake` is everyone's, `bare` has no exemplars."""
    folder: Path = tmp_path_factory.mktemp("report")
    async with open_house(folder, api_keys="root") as house:
        given: list[tuple[str, dict[str, str], list[str]]] = [
            ("cron", await key_of(house, "acme"), CRON),
            ("french", await key_of(house, "globex"), FRENCH),
            ("cake", ROOT, RECIPES),
            ("bare", ROOT, []),
        ]
        for value, (name, headers, exemplars) in enumerate(given, start=1):
            path = make_expert(folder / name, value=value, exemplars=tuple(exemplars))
            files, data = {"file": (name, path.read_bytes())}, {"name": name}
            assert (await house.http.post("/v1/experts", files=files, data=data, headers=headers)).status_code == 201
        yield house


async def ask(house: House, prompt: str, headers: dict[str, str]) -> str:
    body = {"model": "auto", "prompt": prompt}
    answer = await house.http.post("/v1/completions", json=body, headers=headers)
    return answer.headers["x-switchyard-mix"]


async def report(house: House, headers: dict[str, str], **query: Any) -> dict[str, Any]:
    answer = await house.http.get("/v1/route/report", params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def test_each_sees_its_own(house: House) -> None:
    acme, globex = await key_of(house, "acme"), await key_of(house, "globex")
    assert await ask(house, CRON[1], acme) == "cron=1"
    assert await ask(house, FRENCH[1], globex) == "french=1"
    assert await ask(house, RECIPES[1], globex) == "cake=1"
    assert await ask(house, "How high is the tallest mountain in Africa?", acme) == "base"

    told = await report(house, ROOT)
    assert [expert["id"] for expert in told["experts"]] == ["cake", "cron", "french"]
    assert [one["id"] for one in told["recent"]] == ["cron", "french", "cake", None]
    for i, expert in enumerate(told["experts"]):
        assert len(expert["routed_to"]) == 3
        assert expert["held_out"]
        assert 0 < expert["routed_to"][i] == sum(expert["routed_to"]), expert
        assert 4 <= sum(expert["routed_to"]) + expert["routed_to_base"] <= 24
        assert expert["routed_to_others"] == 0
        assert expert["recent_requests"] == 1
        assert all(len(point) == 2 for point in expert["centres"])
    assert told["left_out"] == 0
    assert len(told["background"]) > 100
    assert "held out" in told["method"]
    assert all(text not in str(told) for text in (CRON[1], FRENCH[1], "Africa")), "no text of anybody"

    told = await report(house, acme)
    assert [expert["id"] for expert in told["experts"]] == ["cake", "cron"]
    assert [one["id"] for one in told["recent"]] == ["cron", None], "other tenants' requests do not exist"
    assert [expert["recent_requests"] for expert in told["experts"]] == [0, 1]
    assert "french" not in str(told)

    few = await report(house, ROOT, experts=1)
    assert len(few["experts"]) == 1
    assert few["left_out"] == 2


async def test_what_is_remembered_is_bounded(house: House) -> None:
    key = await key_of(house, "acme")
    for _ in range(REMEMBERED // 128 + 1):
        body = {"model": "auto", "prompt": [CRON[3]] * 128, "max_tokens": 1}
        await house.http.post("/v1/completions", json=body, headers=key)
    assert len((await report(house, ROOT))["recent"]) == REMEMBERED


async def test_one_is_made_at_a_time_and_few_wait(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that asks for many has a few made; one whose client has gone is not begun, or ends before the next."""
    reports: RouteReports = house.app.state.services.reports
    made: list[str] = []
    real, go = reports._router.report, asyncio.Event()

    async def slow(*given: Any) -> Any:
        made.append("begin")
        await go.wait()
        made.append("end")
        return await real(*given)

    monkeypatch.setattr(reports._router, "report", slow)
    acme, root = Caller("k", "acme"), Caller("r", None, frozenset({Role.ADMIN}))
    gone = asyncio.create_task(reports.make(4, acme))
    async with asyncio.timeout(60):
        while not made:
            await asyncio.sleep(0.001)
    waiting = asyncio.create_task(reports.make(4, acme))  # not before: either might be the first to have its turn
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await reports.make(4, acme)
    answer = await house.http.get("/v1/route/report", headers=await key_of(house, "acme"))
    assert error(answer, 429)["code"] == "queue_full"
    other = asyncio.create_task(reports.make(4, root))
    for task in (gone, waiting):
        task.cancel()
    await asyncio.sleep(0.05)
    assert waiting.cancelled()
    assert made == ["begin"]
    go.set()
    await other
    assert gone.cancelled()
    assert made == ["begin", "end", "begin", "end"]


async def test_faults_are_named(house: House) -> None:
    for wrong in (0, 65, "many"):
        answer = await house.http.get("/v1/route/report", params={"experts": wrong}, headers=ROOT)
        assert error(answer, 400)["param"] == "experts"
    assert error(await house.http.get("/v1/route/report"), 401)


async def test_without_experts(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        told = await report(house, {})
        assert (told["experts"], told["recent"], told["left_out"]) == ([], [], 0)
