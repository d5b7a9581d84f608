"""The playground: answers stream, say who gave them, and come from whoever was asked for."""

from __future__ import annotations

from typing import Any

import httpx
from playwright.sync_api import Page, expect

from store.errors import EngineDeadError
from tests.api.house import House
from tests.e2e.conftest import ServerProcess
from tests.e2e.console.conftest import Watch, unlock

RIVER = "boats sail along the 9"


def ask(page: Page, text: str) -> None:
    """Ask, and wait for the end of the answer."""
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".turn:last-child .turn-foot")).to_contain_text("tokens")


def greedy(page: Page, tokens: int) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill(str(tokens))


def direct(server: ServerProcess, text: str, **body: Any) -> str:
    """What the API answers without a browser."""
    messages = [{"role": "user", "content": text}]
    given = {"messages": messages, "temperature": 0, "max_tokens": 12, **body}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=given, timeout=120).json()
    content: str = answer["choices"][0]["message"]["content"]
    return content


def chips(page: Page) -> list[str]:
    return page.locator(".turn:last-child .origin .chip").all_inner_texts()


def test_a_routed_answer_streams_and_says_who_gave_it_and_why(page: Page, server: ServerProcess) -> None:
    greedy(page, 12)
    ask(page, RIVER)
    assert page.locator(".answer .text").inner_text() == direct(server, RIVER, model="rivers").strip()
    assert [chip.split() for chip in chips(page)] == [["rivers", "1"]]
    assert page.locator(".origin .badge").inner_text() == "Matched"
    page.get_by_role("button", name="Why?").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("the prompt is in the domain of 'rivers'")
    expect(dialog.locator(".neighbours li").first).to_contain_text("rivers")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)

    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "and 10?")
    said = [message["content"] for message in sent.value.post_data_json["messages"]]
    assert (said[0], said[-1], len(said)) == (RIVER, "and 10?", 3)
    page.get_by_label("Each message by itself").check()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "and 11?")
    assert [message["content"] for message in sent.value.post_data_json["messages"]] == ["and 11?"]
    page.reload()
    expect(page.locator(".turn")).to_have_count(3)
    expect(page.locator(".question").first).to_have_text(RIVER)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_an_expert_can_be_forced_and_the_base_too(page: Page, server: ServerProcess) -> None:
    greedy(page, 12)
    page.get_by_text("Expert", exact=True).click()
    page.locator("#forced").select_option("numbers")
    ask(page, RIVER)
    assert [chip.split() for chip in chips(page)] == [["numbers", "1"]]
    assert page.locator(".answer .text").inner_text() == direct(server, RIVER, model="numbers").strip()
    page.get_by_role("button", name="New conversation").click()
    page.get_by_text("Base", exact=True).click()
    ask(page, RIVER)
    assert chips(page) == ["base"]
    assert page.locator(".answer .text").inner_text() == direct(server, RIVER, model="tiny").strip()


def test_experts_are_mixed_with_sliders(page: Page, server: ServerProcess) -> None:
    greedy(page, 12)
    page.get_by_text("Mix", exact=True).click()
    page.locator("#message").fill("x")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text(["Add an expert to the mix first."])
    for name in ("rivers", "numbers"):
        page.locator("#add-expert").select_option(name)
    page.get_by_label("Weight of rivers").fill("1.5")
    slider = page.get_by_label("Weight of numbers")
    slider.focus()
    for _ in range(30):  # in steps of 0.05, from 1 to -0.5
        page.keyboard.press("ArrowLeft")
    expect(page.locator(".slider output")).to_have_text(["1.5", "−0.5"])
    ask(page, RIVER)
    assert [chip.split() for chip in chips(page)] == [["rivers", "1.5"], ["numbers", "−0.5"]]
    mix = [{"id": "rivers", "weight": 1.5}, {"id": "numbers", "weight": -0.5}]
    assert page.locator(".answer .text").inner_text() == direct(server, RIVER, model="tiny", experts=mix).strip()


def test_a_stream_can_be_stopped(outside: Watch, guarded: tuple[str, House]) -> None:
    engine = guarded[1].engine
    page = unlock(outside)
    engine.reply, engine.delay = lambda request: b"word " * 2000, 0.02
    page.locator("#message").fill("go on for ever")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_contain_text("word word")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn-foot")).to_contain_text("stopped")
    expect(page.locator(".answer .text")).to_contain_text("word word")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
    for _ in range(1000):
        if not engine.open:
            break
        page.wait_for_timeout(10)
    assert not engine.open, "the server goes on generating for nobody"


def test_a_failure_is_told_and_can_be_tried_again(outside: Watch, guarded: tuple[str, House]) -> None:
    engine = guarded[1].engine
    page = unlock(outside)
    outside.excused += "|status of 429"
    engine.max_queue = 0
    page.locator("#message").fill("hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("too many wait")
    engine.max_queue = 8
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .text")).to_contain_text("heard: user: hello")
    engine.failure, engine.fail_after = EngineDeadError("the engine has failed"), 5
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_text("the engine has failed")
    expect(page.locator(".answer .text")).to_have_text("base")  # what had come by then stays
