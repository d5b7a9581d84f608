"""Every route says what it asks of its caller, in one table; none is forgotten there."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from starlette.routing import BaseRoute

from server.api.rules import PUBLIC_PATHS, RULES, path_of, rule_of
from store.access import Role
from tests.api.house import House, error, open_house

pytestmark = pytest.mark.anyio

READS = {"GET", "HEAD", "OPTIONS"}


def declared(house: House) -> list[tuple[str, str]]:
    """Every method and path that the application answers, whatever put it there."""
    found: list[tuple[str, str]] = []

    def walk(routes: list[BaseRoute]) -> None:
        for route in routes:
            if included := getattr(route, "original_router", None):  # FastAPI keeps routers as they were included
                walk(included.routes)
            else:
                found.extend(
                    (method, getattr(route, "path", "?")) for method in getattr(route, "methods", None) or ["?"]
                )

    walk(house.app.routes)
    documented = {
        (method.upper(), path)
        for path, methods in house.app.openapi()["paths"].items()
        for method in methods
    }  # fmt: skip
    plain = {(method, path.replace(":path}", "}")) for method, path in found}
    assert documented <= plain, "the walk misses routes that the API's own description has"
    return found


async def test_every_route_of_the_app_has_a_rule(house: House) -> None:
    routes = declared(house)
    assert len(routes) > 15
    missing = [(method, path) for method, path in routes if rule_of(method, path) is None]
    assert not missing, f"declare {missing} in server/api/rules.py"


async def test_every_rule_is_of_a_route(house: House) -> None:
    known = set(declared(house))
    assert not [entry for entry in RULES if entry not in known]


async def test_a_request_is_judged_by_the_rule_of_the_route_it_reaches(house: House) -> None:
    for _, path in declared(house):
        sample = path.replace("{model:path}", "a/b").replace("{", "").replace("}", "")
        assert path_of(sample) == path


def test_what_changes_something_is_audited_and_what_costs_is_metered() -> None:
    for (method, path), rule in RULES.items():
        if rule.role in (Role.UPLOAD, Role.ADMIN) and method not in READS:
            assert rule.action, f"{method} {path} changes something and has no name for the audit log"
        if rule.role is Role.INFER and method not in READS:
            assert rule.is_metered, f"{method} {path} costs compute"
    assert {"/health", "/ready", "/", "/console/{name}"} == PUBLIC_PATHS


@pytest.fixture(scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("guarded"), api_keys="root") as house:
        yield house


async def make_key(house: House, *roles: Role, **given: object) -> dict[str, str]:
    """Headers of a new key."""
    tenant = None if {*roles} <= {Role.ADMIN, Role.MONITOR} else "acme"
    body = {"tenant": tenant, "roles": [*roles], **given}
    made = await house.http.post("/v1/admin/keys", json=body, headers={"authorization": "Bearer root"})
    assert made.status_code == 201, made.text
    return {"authorization": f"Bearer {made.json()['key']}"}


@pytest.mark.parametrize("role", list(Role))
async def test_each_role_opens_its_routes_and_no_others(guarded: House, role: Role) -> None:
    headers = await make_key(guarded, role)
    for method, path in declared(guarded):
        rule = rule_of(method, path)
        assert rule is not None
        if method == "HEAD":
            continue
        answer = await guarded.http.request(method, path.replace("{id}", "x").replace("{name}", "x"), headers=headers)
        refused = answer.status_code == 403 and answer.json()["error"]["code"] == "insufficient_role"
        assert refused == (rule.role is not None and role not in (rule.role, Role.ADMIN)), (method, path, answer.text)


async def test_a_forgotten_route_runs_for_administrators_only(guarded: House) -> None:
    @guarded.app.get("/forgotten")
    async def forgotten() -> dict[str, str]:
        return {"secret": "x"}

    try:
        infer, admin = await make_key(guarded, Role.INFER), await make_key(guarded, Role.ADMIN)
        error(await guarded.http.get("/forgotten"), 401)
        assert error(await guarded.http.get("/forgotten", headers=infer), 404)["code"] == "not_found"
        assert (await guarded.http.get("/forgotten", headers=admin)).json() == {"secret": "x"}
    finally:
        guarded.app.router.routes.pop()


async def test_wrong_methods_and_paths_are_what_they_were(guarded: House) -> None:
    infer = await make_key(guarded, Role.INFER)
    answer = await guarded.http.get("/v1/chat/completions", headers=infer)
    assert error(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    assert error(await guarded.http.get("/nowhere", headers=infer), 404)["code"] == "not_found"
