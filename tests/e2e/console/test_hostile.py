"""What experts say about themselves and what models answer stays text: nothing of it runs, nothing of it is markup."""

from __future__ import annotations

from pathlib import Path

import httpx
from playwright.sync_api import expect

from tests.api.house import House, make_expert
from tests.e2e.console.conftest import KEY, Watch, unlock

PICTURE = "<img src=x onerror=\"window.ran='picture'\">"
SCRIPT = "<script>window.ran='script'</script><svg onload=\"window.ran='svg'\">"
LINK = "javascript:window.ran='link'"
HEADERS = {"authorization": f"Bearer {KEY}"}
FOREIGN = (
    "document.querySelectorAll('main img, main script, dialog img, dialog script, iframe, [onerror], [onload]').length"
)


def test_nothing_that_a_hostile_expert_says_runs(outside: Watch, guarded: tuple[str, House], tmp_path: Path) -> None:
    url, house = guarded
    exemplars = [f"{PICTURE} cake {n} {SCRIPT}" for n in range(8)]
    path = make_expert(
        tmp_path / "evil", value=66, name="evil", description=PICTURE + SCRIPT, exemplars=tuple(exemplars)
    )
    sent = httpx.post(f"{url}/v1/experts", files={"file": ("evil", path.read_bytes())}, headers=HEADERS)
    assert sent.status_code == 201, sent.text
    body = {"metadata": {"site": LINK, "more": PICTURE, "retention": PICTURE}}
    httpx.patch(f"{url}/v1/experts/evil", json=body, headers=HEADERS).raise_for_status()
    page = unlock(outside)
    house.engine.reply = lambda request: (PICTURE + SCRIPT).encode()
    try:
        page.locator("#message").fill(exemplars[0])
        page.keyboard.press("Enter")
        expect(page.locator(".answer .text")).to_have_text(PICTURE + SCRIPT)
        expect(page.locator(".question")).to_have_text(exemplars[0])
        page.get_by_role("button", name="Why?").click()
        expect(page.get_by_role("dialog").locator(".neighbours q").first).to_contain_text(PICTURE)
        assert page.evaluate(FOREIGN) == 0
        page.keyboard.press("Escape")
        page.goto(f"{url}/#map")
        page.locator(".prompt").last.click(force=True)
        expect(page.get_by_role("region", name="Why").locator("q").first).to_contain_text(PICTURE)
        page.goto(f"{url}/#library/evil")
        dialog = page.get_by_role("dialog", name="evil")
        for text in (PICTURE + SCRIPT, LINK, exemplars[7]):
            expect(dialog).to_contain_text(text)
        expect(page.locator("tbody").first).to_contain_text(PICTURE + SCRIPT)
        assert page.evaluate(FOREIGN) == 0
        assert page.evaluate("window.ran ?? null") is None
    finally:
        httpx.delete(f"{url}/v1/experts/evil", headers=HEADERS)


def test_the_page_itself_cannot_be_made_to_run_text(outside: Watch) -> None:
    """The policy, tried: even a script of the page that wrote markup would be stopped by the browser."""
    outside.excused = r"status of 401|policy: |Content Security Policy|Trusted"
    page = outside.page
    page.goto(f"http://{outside.host}/")
    page.locator("dialog").wait_for()
    tried = page.evaluate(
        """async () => {
          const said = [];
          try { document.body.innerHTML = "<b>x</b>"; said.push("markup"); } catch { }
          const script = document.createElement("script");
          try { script.textContent = "window.ran = 1"; document.body.append(script); } catch { }
          await new Promise((resolve) => setTimeout(resolve, 0));
          if (window.ran) said.push("script");
          await fetch("http://localhost:9/").then(() => said.push("fetch"), () => {});
          return said;
        }"""
    )
    assert tried == []
