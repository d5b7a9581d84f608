"""Library and upload: what is there, what is added by file chooser or drop, and what is taken away."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import ServerProcess, World
from tests.e2e.console.conftest import Watch, at
from tests.tiny import save_tuned

DROP = """([name, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    const event = new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.querySelector("#dropzone").dispatchEvent(event);
  }
}"""


def names(page: Page) -> list[str]:
    return page.locator("tbody button.name").all_inner_texts()


def test_experts_are_found_and_sorted(page: Page, server: ServerProcess) -> None:
    at(page, server.url, "library")
    expect(page.locator("tbody tr")).to_have_count(2)
    assert names(page) == ["numbers", "rivers"]
    page.get_by_role("button", name="Name").click()
    assert names(page) == ["rivers", "numbers"]
    expect(page.get_by_role("columnheader", name="Name")).to_have_attribute("aria-sort", "descending")
    row = page.get_by_role("row", name="rivers")
    expect(row).to_contain_text("kB")
    expect(row).to_contain_text("public")
    page.get_by_label("Search experts").fill("knows NUM")
    assert names(page) == ["numbers"]
    page.get_by_label("Search experts").fill("nothing like it")
    expect(page.locator("tbody")).to_contain_text("No expert is like that.")


def test_an_expert_s_page_tells_all_and_exemplars_can_be_changed(page: Page, server: ServerProcess) -> None:
    httpx.patch(f"{server.url}/v1/experts/rivers", json={"metadata": {"retention": "0.97"}}).raise_for_status()
    at(page, server.url, "library")
    page.get_by_role("button", name="rivers").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Density and bits by layer").click()
    expect(dialog.get_by_role("region", name="Layers").get_by_role("row")).to_have_count(6)
    for text in (
        "Same answers",
        "knows rivers",
        "t-switch",
        "97 %",
        "ada",
        "MIT",
        "Smaller than bf16",
        "seed",
        "the river 0 is long",
    ):
        expect(dialog).to_contain_text(text)
    dialog.get_by_role("button", name="Edit").click()
    box = dialog.get_by_label("One prompt a line")
    box.fill(box.input_value() + "\nships on the canal")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_contain_text("25, set on this server")
    dialog.get_by_role("button", name="Back to those of the file").click()
    expect(dialog).to_contain_text("24, from its file")
    dialog.get_by_role("link", name="Chat with it").click()
    expect(page.locator("#forced")).to_have_value("rivers")


def test_a_file_that_is_chosen_is_published_and_deleted_again(page: Page, server: ServerProcess, world: World) -> None:
    at(page, server.url, "upload")
    page.locator("#files").set_input_files(world.experts["rivers"])
    page.get_by_label("Name", exact=True).fill("streams")
    page.get_by_label("Exemplars").fill("a stream is small\nthe brook 7 is loud")
    page.get_by_role("button", name="Publish").click()
    expect(page.locator(".uploads")).to_contain_text("streams is live.")
    expect(page.locator(".uploads")).to_contain_text("Bits per parameter")
    page.get_by_role("link", name="Open it in the library").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("the brook 7 is loud")
    dialog.get_by_role("button", name="Delete …").click()
    question = page.get_by_role("dialog", name="Delete streams?")
    question.get_by_role("button", name="Cancel").click()
    assert httpx.get(f"{server.url}/v1/experts/streams").status_code == 200, "nothing is deleted unasked"
    dialog.get_by_role("button", name="Delete …").click()
    question.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("tbody tr")).to_have_count(2)
    assert httpx.get(f"{server.url}/v1/experts/streams").status_code == 404


def test_a_file_can_be_dropped_and_what_is_wrong_is_told(page: Page, server: ServerProcess, world: World) -> None:
    at(page, server.url, "upload")
    data = world.experts["numbers"].read_bytes()
    page.evaluate(DROP, ["dropped.safetensors", base64.b64encode(data).decode()])
    page.get_by_label("Name", exact=True).fill("dropped")
    page.get_by_role("button", name="Publish").click()
    expect(page.locator(".uploads")).to_contain_text("dropped is live.")
    assert httpx.get(f"{server.url}/v1/experts/dropped").json()["bytes"] == len(data)
    httpx.delete(f"{server.url}/v1/experts/dropped").raise_for_status()
    page.evaluate(DROP, ["notes.pdf", base64.b64encode(b"x").decode()])
    expect(page.locator("#toasts")).to_contain_text("No weights are among them")


def test_a_damaged_file_is_refused_in_words(watch: Watch, server: ServerProcess, world: World) -> None:
    watch.excused = "status of 400"
    page = at(watch.page, server.url, "upload")
    data = world.experts["numbers"].read_bytes()[:-3]
    page.evaluate(DROP, ["short.safetensors", base64.b64encode(data).decode()])
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_role("alert")).not_to_be_empty()
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


@pytest.mark.slow
def test_a_raw_fine_tune_is_compressed_by_the_server(
    page: Page, server: ServerProcess, world: World, tmp_path: Path
) -> None:
    tuned = save_tuned(world.base, tmp_path / "tuned", seed=9)
    at(page, server.url, "upload")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(f'{{"prompt": "paint the wall {i}"}}' for i in range(8)))
    page.locator("#files").set_input_files([*tuned.iterdir(), prompts])
    page.get_by_label("Name", exact=True).fill("painter")
    page.get_by_label("Density").fill("0.3")
    page.get_by_role("button", name="Publish").click()
    expect(page.locator(".uploads")).to_contain_text("painter is live.", timeout=150_000)
    for text in ("KL to the fine-tune", "Same answers", "Relative error", "Smaller than bf16"):
        expect(page.locator(".uploads")).to_contain_text(text)
    page.reload()
    expect(page.locator(".jobs")).to_contain_text("succeeded")
    httpx.delete(f"{server.url}/v1/experts/painter").raise_for_status()
