"""One browser for the console's tests, a server with a tiny model, and one with a dummy whose levers can be moved."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.api.house import CRON, FRENCH, House, make_expert
from tests.e2e.conftest import ROOT, ServerProcess, World, until_ready
from tests.server.live import live_house
from tests.zygote import Zygote, clean_environment

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 30_000
"""Milliseconds; a busy machine is no failure."""
KEY = "root"


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = "there is no Chromium: on Debian, apt-get install chromium (as root, deploy/bootstrap.sh dev does it)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    # Ends with the package: while it runs, no other event loop may run in this thread.
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page has done that it should not have.

    Attributes:
        excused: a pattern of complaints that the test provokes.
    """

    page: Page
    host: str
    complaints: list[str] = field(default_factory=list)
    excused: str = r"(?!)"

    def __post_init__(self) -> None:
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self._look(request.url))
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective))"
        )

    def check(self) -> None:
        left = [text for text in self.complaints if not re.search(self.excused, text)]
        assert not left, left

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _look(self, url: str) -> None:
        if urlsplit(url).netloc != self.host and not url.startswith(("data:", "blob:")):
            self.complaints.append(f"a request to {url}")


def visit(browser: Browser, url: str, **context: object) -> Iterator[Watch]:
    """A page of its own; at the end, nothing that it complained of may be left."""
    opened = browser.new_context(viewport={"width": 1280, "height": 800}, **context)  # type: ignore[arg-type]
    opened.set_default_timeout(PATIENCE)
    watch = Watch(opened.new_page(), urlsplit(url).netloc)
    yield watch
    watch.check()
    opened.close()


@pytest.fixture(scope="package")
def server(zygote: Zygote, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`switchyard serve` on the tiny base with both of its experts, open on loopback."""
    data = tmp_path_factory.mktemp("console")
    command = [
        "switchyard", "serve", "--port", "0", "--base", world.base, "--base-name", "tiny",
        "--data-dir", data / "data", "--cache-dir", data / "cache",
        "--feature-layer", "2", "--kv-bytes", "8MiB", "--routing-wait", "60",
    ]  # fmt: skip
    started = until_ready(zygote.start(command, cwd=ROOT, env=clean_environment()))
    for name, path in world.experts.items():
        publish(started.url, name, path)
    yield started
    started.kill()


def publish(url: str, name: str, path: Path) -> None:
    with path.open("rb") as file:
        answer = httpx.post(f"{url}/v1/experts", files={"file": file}, data={"name": name}, timeout=120)
    assert answer.status_code in (200, 201), answer.text


@pytest.fixture
def watch(browser: Browser, server: ServerProcess) -> Iterator[Watch]:
    yield from visit(browser, server.url)


@pytest.fixture
def page(watch: Watch, server: ServerProcess) -> Page:
    """The console of the tiny server, ready to be used."""
    return at(watch.page, server.url)


def at(page: Page, url: str, view: str = "chat") -> Page:
    """Open a view, and wait until the console knows its server."""
    page.goto(f"{url}/#{view}")
    page.locator("#server .dot.good").wait_for(state="attached")
    return page


@pytest.fixture(scope="package")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, House]]:
    """A server around the dummy engine with two experts, closed to whoever has no key."""
    folder = tmp_path_factory.mktemp("guarded")
    with live_house(folder, api_keys=KEY) as (url, house):
        headers = {"authorization": f"Bearer {KEY}"}
        for value, (name, exemplars) in enumerate((("cron", CRON), ("french", FRENCH)), start=1):
            path = make_expert(folder / name, value=value, name=name, exemplars=tuple(exemplars))
            files = {"file": (name, path.read_bytes())}
            assert httpx.post(f"{url}/v1/experts", files=files, headers=headers).status_code == 201
        yield url, house


@pytest.fixture
def outside(browser: Browser, guarded: tuple[str, House]) -> Iterator[Watch]:
    """A page of the guarded server, by somebody who has no key yet."""
    guarded[1].engine.reset()
    yield from visit(browser, guarded[0])


def unlock(watch: Watch, key: str = KEY) -> Page:
    """Type the key that the console asks for."""
    watch.excused = "status of 401"
    page = watch.page
    page.goto(f"http://{watch.host}/")
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use this key").click()
    page.locator("#server .dot.good").wait_for(state="attached")
    return page
