"""The router map and the live figures, while requests come."""

from __future__ import annotations

import httpx
from playwright.sync_api import Page, expect

from tests.e2e.conftest import ServerProcess
from tests.e2e.console.conftest import at


def route(server: ServerProcess, prompt: str) -> None:
    body = {"model": "auto", "prompt": prompt, "max_tokens": 4}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status()


def test_a_prompt_lands_on_the_map_and_is_explained(page: Page, server: ServerProcess) -> None:
    route(server, "boats sail along the 9")
    at(page, server.url, "map")
    expect(page.locator(".centres")).to_have_count(2)
    for name in ("rivers", "numbers"):
        expect(page.locator(".map .label", has_text=name)).to_be_attached()
    dots = page.locator(".prompt")
    expect(dots.last).to_have_attribute("aria-label", "A prompt that went to rivers")
    before = dots.count()
    route(server, "what is 35 times 12")
    expect(dots).to_have_count(before + 1)  # by itself: the page follows
    dots.last.click(force=True)
    why = page.get_by_role("region", name="Why")
    expect(why).to_contain_text("in the domain of 'numbers'")
    expect(why.locator(".neighbours q").first).not_to_be_empty()
    expect(dots.last).to_have_attribute("aria-pressed", "true")

    dots.nth(before - 1).focus()
    page.keyboard.press("Enter")
    expect(why).to_contain_text("in the domain of 'rivers'")
    page.get_by_label("Where would this go?").fill("boats sail along the 4")
    page.keyboard.press("Enter")
    expect(why).to_contain_text("Where it would go")
    expect(why).to_contain_text("in the domain of 'rivers'")
    page.get_by_role("list", name="Experts on the map").get_by_role("button", name="rivers").click()
    expect(page.locator(".centres.faded")).to_have_count(1)


def test_live_figures_move(page: Page, server: ServerProcess) -> None:
    route(server, "boats sail along the 9")  # so that its expert is there
    at(page, server.url, "live")
    generated = page.get_by_role("img", name="Tokens per second")
    expect(generated).to_have_attribute("aria-label", "Tokens per second: generated 0, prompt 0")
    route(server, "boats sail along the 9")
    memory = page.get_by_role("img", name="Memory")
    expect(memory.locator(".line").first).to_be_attached()
    expect(page.get_by_role("img", name="Found in a tier")).to_have_attribute(
        "aria-label", "Found in a tier: device 100 %, host none, cache none, store none"
    )
    expect(page.get_by_role("img", name="Time to first token")).not_to_have_attribute(
        "aria-label", "Time to first token: p50 none, p95 none"
    )
    expect(page.locator(".engine")).to_contain_text("rivers")


def test_figures_are_read_as_prometheus_does(page: Page) -> None:
    """Escaped labels, rates, and quantiles interpolated in their bucket, against numbers worked out by hand."""
    told = page.evaluate(
        r"""async () => {
          const { parse, quantile, rate, sum, labels } = await import("/console/metrics.js");
          const buckets = (one, two, all) => `# HELP t x
            t_bucket{le="1.0"} ${one}
            t_bucket{le="2.0"} ${two}
            t_bucket{le="+Inf"} ${all}
            c_total{a="x",b="q\\"y"} ${all}
            c_total{a="z",b="1"} 2`.replace(/^ +/gm, "");
          const [before, now, fresh] = [buckets(1, 1, 1), buckets(3, 7, 9), buckets(0, 0, 0)].map(parse);
          return {
            median: quantile(before, now, "t", 0.5), last: quantile(before, now, "t", 0.99),
            nothing: quantile(now, now, "t", 0.5), rate: rate(before, now, 4, "c_total"),
            anew: rate(now, fresh, 4, "c_total"), sum: sum(now, "c_total", { a: "z" }),
            labels: labels(now, "c_total", "b"),
          };
        }"""
    )
    # 8 new: 2 up to 1, 4 up to 2, 2 beyond. The fourth is half-way through the second bucket.
    assert told == {
        "median": 1.5,
        "last": 2,
        "nothing": None,
        "rate": 2,
        "anew": None,
        "sum": 2,
        "labels": ['q"y', "1"],
    }
