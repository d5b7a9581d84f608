"""An expert that stands on another one answers together with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from store.mix import Mix
from tests.api.house import CRON, House, error, make_expert, open_house

pytestmark = pytest.mark.anyio


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """`skill` stands on `knowledge`."""
    async with open_house(tmp_path) as house:
        below = house.publish("knowledge", value=1)
        path = make_expert(tmp_path / "skill", value=2, name="skill", exemplars=tuple(CRON), relative_to=below.digest)
        assert (await house.upload(path)).status_code == 201
        yield house


def digests(house: House) -> tuple[str, str]:
    return house.registry.get("skill").digest, house.registry.get("knowledge").digest


async def test_by_name_and_by_routing(house: House) -> None:
    skill, knowledge = digests(house)
    for body, weights in (
        ({"model": "skill"}, {skill: 1.0, knowledge: 1.0}),
        ({"model": "auto"}, {skill: 1.0, knowledge: 1.0}),
        ({"experts": [{"id": "skill", "weight": 0.5}]}, {skill: 0.5, knowledge: 0.5}),
        (
            {"experts": [{"id": "skill", "weight": 0.5}, {"id": "knowledge", "weight": 0.25}]},
            {skill: 0.5, knowledge: 0.75},
        ),
        # What the one takes away the other brings back: the mix is that of the skill alone.
        ({"experts": [{"id": "skill", "weight": 1}, {"id": "knowledge", "weight": -1}]}, {skill: 1.0}),
    ):
        answer = await house.chat(CRON[2], **body)
        assert answer.status_code == 200, answer.text
        assert house.engine.streams[-1].request.mix == Mix.of(weights)
        told = answer.json()["usage"]["switchyard"]["mix"]
        assert told[0]["id"] == "skill"
        assert told[0]["stands_on"] == [knowledge]
        assert all("stands_on" not in part for part in told[1:])


async def test_it_is_told_and_kept(house: House) -> None:
    _, knowledge = digests(house)
    assert (await house.http.get("/v1/experts/skill")).json()["relative_to"] == knowledge
    refused = error(await house.http.delete("/v1/experts/knowledge?force=true"), 409)
    assert refused["code"] == "has_children"
    assert "skill" in refused["message"]
    orphan = make_expert(house.folder / "orphan", value=5, relative_to="b" * 64)
    detail = error(await house.upload(orphan), 400)
    assert (detail["code"], detail["param"]) == ("parent_not_found", "relative_to")
    assert (await house.http.delete("/v1/experts/skill")).status_code == 200
    assert (await house.http.delete("/v1/experts/knowledge")).status_code == 200
