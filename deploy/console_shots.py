"""Take the pictures of docs/console.md: `python -m deploy.console_shots`, from the demo server while it is used.

Needs Chromium and the demo's base; writes docs/console-VIEW-THEME.png. What is shown is what the server answers.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from deploy.healthcheck import ROUTE
from examples.base import packaged_gguf

ROOT = Path(__file__).resolve().parent.parent
PORT = 8765
URL = f"http://127.0.0.1:{PORT}"
SIZE = (1280, 800)
COLOURS = 256
PATIENCE = 240_000
"""Milliseconds."""
GENERAL = ("What is the tallest mountain in Africa?", "Tell me a story about a lighthouse.")
QUESTIONS = ('What is the cron schedule for "Every 15 minutes"?', "What is the capital of France?")


@contextmanager
def demo(folder: Path) -> Iterator[None]:
    """The server of `make demo`, with data of its own."""
    command = [
        sys.executable, "-m", "server.cli", "serve", "--base", str(packaged_gguf()),
        "--base-name", "smollm2-135m-instruct", "--experts", "examples/experts", "--data-dir", str(folder),
        "--cache-dir", ".cache", "--port", str(PORT),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not _is_ready():
            if process.poll() is not None:
                raise SystemExit("the server ended")
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _is_ready() -> bool:
    try:
        return httpx.get(f"{URL}{ROUTE}").status_code == 200
    except httpx.TransportError:
        return False


def tell_retention() -> None:
    """Say of each expert what was measured of it (`python -m bench.first_table`)."""
    measured = json.loads((ROOT / "bench/results/first_table.json").read_text(encoding="utf-8"))["rows"]
    for row in measured:
        if row.get("retention") is not None:
            body = {"metadata": {"retention": f"{row['retention']:.3f}"}}
            httpx.patch(f"{URL}/v1/experts/{row['task']}", json=body)


def prompts() -> list[str]:
    """Some that experts are for, in turn, and some that none is for."""
    found: list[list[str]] = []
    for expert in httpx.get(f"{URL}/v1/experts").json()["data"]:
        exemplars = httpx.get(f"{URL}/v1/experts/{expert['id']}/exemplars").json()["exemplars"]
        found.append(exemplars[3:90:11])
    found.append(list(GENERAL))
    return [prompt for group in zip(*(own * 8 for own in found), strict=False) for prompt in group]


@contextmanager
def traffic(asked: Sequence[str]) -> Iterator[None]:
    """Two clients that ask one thing after the other."""
    ended = threading.Event()

    def ask(mine: Sequence[str]) -> None:
        while not ended.is_set():
            for prompt in mine:
                if ended.is_set():
                    return
                body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "max_tokens": 40}
                httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=300)

    clients = [threading.Thread(target=ask, args=[asked[i::2]]) for i in range(2)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        ended.set()
        for client in clients:
            client.join()


def chat(page: Page) -> None:
    page.goto(f"{URL}/#chat")
    page.get_by_text("Sampling").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("48")
    page.get_by_label("Each message by itself").check()
    page.get_by_text("Sampling").click()
    for question in QUESTIONS:
        _ask(page, question)
    page.get_by_text("Mix", exact=True).click()
    for name, weight in (("num_es", "0.8"), ("num_fr", "-0.2")):
        page.locator("#add-expert").select_option(name)
        page.get_by_label(f"Weight of {name}").fill(weight)
    _ask(page, "Write the number 1518 in Spanish words.")
    page.locator("h1").first.click()


def _ask(page: Page, question: str) -> None:
    page.locator("#message").fill(question)
    page.keyboard.press("Enter")
    page.locator(".turn:last-child .turn-foot", has_text="tokens").wait_for()


def library(page: Page) -> None:
    page.goto(f"{URL}/#library")
    page.locator("tbody button.name").first.wait_for()


def expert(page: Page) -> None:
    page.goto(f"{URL}/#library/cron")
    page.get_by_role("dialog").get_by_text("from its file").wait_for()


def upload(page: Page) -> None:
    page.goto(f"{URL}/#upload")
    page.locator("#files").set_input_files(ROOT / "examples/experts/num_fr.safetensors")
    page.get_by_label("Name", exact=True).fill("french-numbers")
    page.get_by_role("button", name="Publish").click()
    page.get_by_text("french-numbers is live.").wait_for()
    httpx.delete(f"{URL}/v1/experts/french-numbers")
    page.locator("#files").set_input_files(ROOT / "examples/experts/cron.safetensors")


def router_map(page: Page) -> None:
    page.goto(f"{URL}/#map")
    page.locator(".recent button", has_text="cron").first.click()
    page.evaluate("document.querySelector('main').scrollTo(0, 0)")
    page.wait_for_timeout(1000)


def live(page: Page) -> None:
    page.goto(f"{URL}/#live")
    page.wait_for_timeout(60_000)


def take(browser: Browser, views: Sequence[str], themes: Sequence[str]) -> None:
    for theme in themes:
        context = browser.new_context(
            viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="dark" if theme == "dark" else "light"
        )
        context.set_default_timeout(PATIENCE)
        for view in views:
            page = context.new_page()
            VIEWS[view](page)
            path = ROOT / "docs" / f"console-{view}-{theme}.png"
            image = Image.open(BytesIO(page.screenshot())).convert("RGB")
            image.quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)
            sys.stdout.write(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB\n")
            page.close()
        context.close()


VIEWS = {"chat": chat, "library": library, "expert": expert, "upload": upload, "map": router_map, "live": live}


def main() -> None:
    views = sys.argv[1:] or list(VIEWS)
    with tempfile.TemporaryDirectory() as folder, demo(Path(folder)), sync_playwright() as playwright:
        tell_retention()
        asked = prompts()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        with traffic(asked):
            take(browser, [view for view in views if view != "chat"], ("light", "dark"))
        if "chat" in views:  # by itself: a busy machine would tell slow figures
            take(browser, ["chat"], ("light", "dark"))
        browser.close()


if __name__ == "__main__":
    main()
