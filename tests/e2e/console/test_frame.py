"""The frame: keys and roles, light and dark, the keyboard, narrow screens, and an accessibility checker's opinion."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.api.house import House
from tests.e2e.conftest import ServerProcess, World
from tests.e2e.console.conftest import KEY, Watch, at, unlock, visit

VIEWS = ("chat", "library", "upload", "map", "live")
BACKGROUND = "getComputedStyle(document.documentElement).backgroundColor"


def key_of(guarded: tuple[str, House], *roles: str) -> str:
    body = {"tenant": "acme", "roles": [*roles]}
    made = httpx.post(f"{guarded[0]}/v1/admin/keys", json=body, headers={"authorization": f"Bearer {KEY}"})
    key: str = made.json()["key"]
    return key


def test_a_key_is_asked_for_once_and_stays_in_the_tab(outside: Watch, guarded: tuple[str, House]) -> None:
    outside.excused = "status of 401"
    page = outside.page
    page.goto(guarded[0])
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("this API key is not valid")
    dialog.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#server")).to_contain_text("2 experts")
    page.goto(f"{guarded[0]}/#library")
    page.reload()
    expect(page.locator("tbody tr")).to_have_count(2)
    expect(dialog).to_have_count(0)
    assert page.evaluate("[localStorage.length, document.cookie, location.href.includes('root')]") == [0, "", False]
    other = page.context.new_page()
    other.goto(guarded[0])
    expect(other.get_by_role("dialog", name="API key")).to_be_visible()


def test_who_dismisses_the_key_is_left_in_peace(outside: Watch, guarded: tuple[str, House]) -> None:
    outside.excused = "status of 401"
    page = outside.page
    page.goto(guarded[0])
    page.get_by_role("dialog", name="API key").wait_for()
    page.keyboard.press("Escape")
    expect(page.locator("#server")).to_have_text("No API key")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_missing_role_is_named(outside: Watch, guarded: tuple[str, House]) -> None:
    page = unlock(outside, key_of(guarded, "infer"))
    outside.excused += "|status of 403"
    page.goto(f"{guarded[0]}/#live")
    expect(page.locator("#view-live")).to_contain_text("this needs a key with the role monitor")
    expect(page.locator("#view-live")).to_contain_text("this needs a key with the role admin")
    page.goto(f"{guarded[0]}/#upload")
    expect(page.locator("#view-upload")).to_contain_text("this needs a key with the role upload")
    page.goto(f"{guarded[0]}/#library")
    page.get_by_role("button", name="cron").click()
    expect(page.get_by_role("dialog")).to_contain_text("this needs a key with the role upload")
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#toasts")).to_contain_text("the role upload")
    assert guarded[1].registry.get("cron")


@pytest.fixture
def dark(browser: Browser, server: ServerProcess) -> Iterator[Watch]:
    yield from visit(browser, server.url, color_scheme="dark", reduced_motion="reduce")


def test_dark_by_the_system_light_by_choice(dark: Watch, server: ServerProcess) -> None:
    page = at(dark.page, server.url)
    night = page.evaluate(BACKGROUND)
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.get_by_role("button", name="Theme").click()
    assert page.locator("html").get_attribute("data-theme") == "light"
    day = page.evaluate(BACKGROUND)
    assert brightness(night) < 60 < 200 < brightness(day)
    page.reload()
    assert page.evaluate(BACKGROUND) == day


def brightness(colour: str) -> float:
    """Mean of `rgb(r, g, b)`."""
    parts = [float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    return sum(parts) / 3


def test_the_keyboard_reaches_everything(page: Page, server: ServerProcess) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Chat")).to_be_focused()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid", "the focus can be seen"
    page.keyboard.press("2")
    expect(page.get_by_role("heading", name="Library")).to_be_visible()
    expect(page.get_by_role("link", name="Library")).to_have_attribute("aria-current", "page")
    page.keyboard.press("/")
    expect(page.get_by_label("Search experts")).to_be_focused()
    page.keyboard.type("r1")  # a digit in a field is a digit
    expect(page.get_by_label("Search experts")).to_have_value("r1")
    page.get_by_label("Search experts").fill("rivers")
    page.locator("[data-expert=rivers]").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="rivers")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("[data-expert=rivers]")).to_be_focused()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    expect(page.get_by_role("heading", name="Chat")).to_be_visible()
    page.keyboard.press("/")
    expect(page.locator("#message")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_view_has_barriers(browser: Browser, server: ServerProcess, world: World, scheme: str) -> None:
    body = {"model": "auto", "prompt": "the river 3 is long", "max_tokens": 2}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status()
    for watch in visit(browser, server.url, color_scheme=scheme, reduced_motion="reduce"):
        axe = Axe()
        page = at(watch.page, server.url)
        page.locator(".starters button").first.wait_for()
        for view in VIEWS:
            page.goto(f"{server.url}/#{view}")
            page.locator(f"#view-{view} h1").wait_for()
            match view:
                case "chat":
                    page.get_by_text("Mix", exact=True).click()
                    page.locator("#add-expert").select_option("rivers")
                    page.get_by_text("Sampling").click()
                case "upload":
                    page.locator("#files").set_input_files(world.experts["rivers"])
                    page.get_by_role("button", name="Publish").wait_for()
                case "map":
                    page.locator(".recent button").first.click()
                    page.locator(".neighbours li").first.wait_for()
            told = axe.run(page)
            assert told.violations_count == 0, f"{view}: {told.generate_report()}"
        page.goto(f"{server.url}/#library/rivers")
        page.get_by_role("dialog").get_by_text("sha256").wait_for()
        told = axe.run(page)
        assert told.violations_count == 0, told.generate_report()


def test_a_narrow_screen_needs_no_scrolling_sideways(page: Page, server: ServerProcess) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    for view in VIEWS:
        page.goto(f"{server.url}/#{view}")
        page.locator(f"#view-{view} h1").wait_for()
        wide = page.evaluate("document.querySelector('main').scrollWidth - document.querySelector('main').clientWidth")
        assert wide <= 0, f"{view} is {wide} pixels too wide"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
