"""Default deny: with keys, everything but health asks for one; without, foreign pages are kept out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai as sdk
import pytest

from tests.api.house import House, error, open_house

pytestmark = pytest.mark.anyio

ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/cron"),
    ("GET", "/v1/experts"),
    ("POST", "/v1/experts"),
    ("GET", "/v1/experts/cron"),
    ("DELETE", "/v1/experts/cron"),
    ("POST", "/v1/route"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/no/such/route"),
    ("GET", "//health"),
    ("GET", "/health/"),
]


@pytest.fixture(scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("guarded"), api_keys="first-key,second-key") as house:
        yield house


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_asks_for_a_key(guarded: House, method: str, path: str) -> None:
    # As it stands: put together from its parts, a URL of "//health" would be the page "/" of a host called health.
    url = guarded.http.base_url.copy_with(raw_path=path.encode())
    response = await guarded.http.request(method, url)
    detail = error(response, 401)
    assert (detail["type"], detail["code"]) == ("authentication_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_none(guarded: House, path: str) -> None:
    assert (await guarded.http.get(path)).status_code == 200


@pytest.mark.parametrize("header", ["Bearer first-key", "bearer second-key", "Bearer  first-key"])
async def test_any_key_opens(guarded: House, header: str) -> None:
    assert (await guarded.http.get("/v1/models", headers={"authorization": header})).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer first-ke", "Bearer first-key2",
        "Bearer first-key,second-key", "Bearer ünïcode",
    ],
)  # fmt: skip
async def test_other_credentials_do_not(guarded: House, header: str) -> None:
    response = await guarded.http.get("/v1/models", headers={"authorization": header.encode("latin-1")})
    assert error(response, 401)["code"] == "invalid_api_key"


async def test_keys_of_an_open_server_are_ignored(house: House) -> None:
    assert (await house.http.get("/v1/models", headers={"authorization": "Bearer any"})).status_code == 200


async def test_the_sdk_raises_its_own_exception(guarded: House) -> None:
    assert (await guarded.openai("first-key").models.list()).data[0].id == "dummy-base"
    with pytest.raises(sdk.AuthenticationError):
        await guarded.openai("wrong").models.list()


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "localhost"])
async def test_an_open_server_answers_on_local_names(house: House, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    assert (await house.http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example"},
        {"host": ""},
        {"host": "["},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"origin": "http://localhost:9999"},
    ],
)
async def test_an_open_server_refuses_foreign_pages(house: House, headers: dict[str, str]) -> None:
    detail = error(await house.http.get("/v1/models", headers=headers), 403)
    assert (detail["type"], detail["code"]) == ("permission_error", "forbidden")


async def test_keys_open_every_name(guarded: House) -> None:
    headers = {"host": "llm.example", "origin": "https://app.example", "authorization": "Bearer first-key"}
    assert (await guarded.http.get("/v1/models", headers=headers)).status_code == 200


async def test_anonymous_on_a_network_answers_on_any_name(tmp_path: Path) -> None:
    async with open_house(tmp_path, host="0.0.0.0", allow_anonymous=True) as house:
        assert (await house.http.get("/v1/models", headers={"host": "llm.example"})).status_code == 200
        assert (await house.http.get("/v1/models", headers={"origin": "http://evil.example"})).status_code == 403
