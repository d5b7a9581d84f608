"""API keys over HTTP and on the command line: made, listed, revoked, and seen by a running server at once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app as cli
from store.access import Role
from store.backends.disk_ledger import DiskLedger
from store.errors import InvalidRequestError
from store.keys import KIND, LATEST_EXPIRY, Keys
from tests.api.house import House, error, open_house

pytestmark = pytest.mark.anyio

ROOT = {"authorization": "Bearer root"}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("guarded"), api_keys="root") as house:
        yield house


async def test_a_key_is_made_used_listed_and_revoked(guarded: House) -> None:
    body = {"tenant": "acme", "roles": ["infer"], "label": "ci", "expires": int(time.time()) + 1000}
    made = (await guarded.http.post("/v1/admin/keys", json=body, headers=ROOT)).json()
    assert made["key"].startswith(f"sy_{made['id']}_")
    assert {key: made[key] for key in body} == body
    assert made["created_by"].startswith("settings-")
    assert (await guarded.http.get("/v1/models", headers=bearer(made["key"]))).status_code == 200
    listed = (await guarded.http.get("/v1/admin/keys", headers=ROOT)).json()["data"]
    assert [key for key in listed if key["id"] == made["id"]] == [{k: v for k, v in made.items() if k != "key"}]
    gone = (await guarded.http.delete(f"/v1/admin/keys/{made['id']}", headers=ROOT)).json()
    assert gone["revoked"] is not None
    assert error(await guarded.http.get("/v1/models", headers=bearer(made["key"])), 401)["code"] == "invalid_api_key"
    missing = await guarded.http.delete("/v1/admin/keys/nobody", headers=ROOT)
    assert error(missing, 404)["code"] == "key_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tenant": "ACME"}, "tenant"),
        ({}, "tenant"),
        ({"tenant": "acme", "roles": ["root"]}, "roles[0]"),
        ({"tenant": "acme", "roles": []}, "roles"),
        ({"tenant": "acme", "expires": 5}, "expires"),
        ({"tenant": "acme", "expires": LATEST_EXPIRY + 1}, "expires"),
        ({"tenant": "acme", "requests_per_minute": 0}, "requests_per_minute"),
        ({"tenant": "acme", "secret": "x"}, "secret"),
    ],
)
async def test_bad_bodies_are_named(guarded: House, body: dict[str, object], param: str) -> None:
    answer = await guarded.http.post("/v1/admin/keys", json=body, headers=ROOT)
    assert error(answer, 400)["param"] == param


async def test_the_command_line_works_on_the_store_of_a_running_server(guarded: House) -> None:
    store = ["--store", str(guarded.folder / "data")]
    made = CliRunner().invoke(cli, ["keys", "create", "--tenant", "acme", "--expires", "2h", "--label", "x", *store])
    assert made.exit_code == 0, made.output
    token = next(line for line in made.stdout.splitlines() if line.startswith("sy_"))
    assert (await guarded.http.get("/v1/models", headers=bearer(token))).status_code == 200
    key_id = token.split("_")[1]
    listed = CliRunner().invoke(cli, ["keys", "list", *store])
    assert key_id in listed.stdout
    assert token not in listed.stdout
    assert CliRunner().invoke(cli, ["keys", "revoke", key_id, *store]).exit_code == 0
    error(await guarded.http.get("/v1/models", headers=bearer(token)), 401)


def test_what_expires_beyond_all_dates_is_listed(tmp_path: Path) -> None:
    """Keys from before there was a latest expiry."""
    ledger = DiskLedger(tmp_path / "ledger")
    key, _ = Keys(ledger).create(tenant="acme", roles=frozenset({Role.INFER}), expires=LATEST_EXPIRY, by="test")
    kept = ledger.documents(KIND)[key.id]
    ledger.put(KIND, key.id, kept.replace(str(LATEST_EXPIRY).encode(), str(2**53).encode()))
    ledger.close()
    listed = CliRunner().invoke(cli, ["keys", "list", "--store", str(tmp_path)])
    assert listed.exit_code == 0, listed.output
    assert "9999" in listed.stdout
    made = CliRunner().invoke(
        cli, ["keys", "create", "--tenant", "acme", "--expires", "999999w", "--store", str(tmp_path)]
    )
    assert isinstance(made.exception, InvalidRequestError)


@pytest.mark.parametrize("words", [["list"], ["revoke", "0" * 12]])
def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path, words: list[str]) -> None:
    for folder in (tmp_path, tmp_path / "mistyped"):
        refused = CliRunner().invoke(cli, ["keys", *words, "--store", str(folder)])
        assert isinstance(refused.exception, InvalidRequestError)
    assert list(tmp_path.iterdir()) == []
    DiskLedger(tmp_path / "ledger").close()
    assert "no keys yet" in CliRunner().invoke(cli, ["keys", "list", "--store", str(tmp_path)]).stdout


@pytest.mark.parametrize("words", [["--expires", "soon"], ["--tenant", "A B"], [], ["--role", "root"]])
def test_the_command_line_refuses_what_is_wrong(tmp_path: Path, words: list[str]) -> None:
    assert CliRunner().invoke(cli, ["keys", "create", *words, "--store", str(tmp_path)]).exit_code != 0


async def test_an_open_server_closes_with_its_first_key_and_stays_closed(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        assert (await house.http.get("/v1/models")).status_code == 200
        made = (await house.http.post("/v1/admin/keys", json={"roles": ["admin"]})).json()
        error(await house.http.get("/v1/models"), 401)
        gone = await house.http.delete(f"/v1/admin/keys/{made['id']}", headers=bearer(made["key"]))
        assert gone.status_code == 200
        error(await house.http.get("/v1/models"), 401)
    async with open_house(tmp_path) as again:
        error(await again.http.get("/v1/models"), 401)


async def test_a_server_beyond_loopback_without_keys_answers_nobody(tmp_path: Path) -> None:
    async with open_house(tmp_path, host="0.0.0.0") as house:
        error(await house.http.get("/v1/models"), 401)
        assert (await house.http.get("/health")).status_code == 200
        keys: Keys = house.app.state.services.keys
        assert not keys
