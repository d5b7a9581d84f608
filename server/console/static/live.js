// Live figures out of /metrics, and what the engine is doing out of /debug/engine.

import { getJson, getText } from "./api.js";
import { Chart } from "./chart.js";
import { h, show } from "./dom.js";
import { engineView } from "./engine.js";
import { bytes, digits, percent, seconds } from "./format.js";
import { labels, parse, quantile, rate, sum } from "./metrics.js";
import { refusal } from "./notices.js";

const EVERY = 2000;
const KEPT = 150; // samples: five minutes
const WINDOW = 15; // samples over which quantiles and shares are taken

const TIERS = [
  ["device", "var(--c0)"],
  ["host", "var(--c1)"],
  ["cache", "var(--c2)"],
  ["store", "var(--c3)"],
];
const perSecond = (value) => digits(value);

export function liveView(root) {
  const view = new Live(root);
  return { title: "Live", start: () => view.start(), stop: () => clearInterval(view.timer) };
}

class Live {
  constructor(root) {
    this.samples = [];
    this.charts = {
      throughput: new Chart(
        "Tokens per second",
        [
          { name: "generated", colour: "var(--c0)" },
          { name: "prompt", colour: "var(--c4)" },
        ],
        { format: perSecond },
      ),
      requests: new Chart(
        "Requests",
        [
          { name: "running", colour: "var(--c0)" },
          { name: "waiting", colour: "var(--c3)" },
        ],
        { format: digits },
      ),
      first: new Chart(
        "Time to first token",
        [
          { name: "p50", colour: "var(--c0)" },
          { name: "p95", colour: "var(--c3)" },
        ],
        { format: seconds, hint: "Over the last half minute" },
      ),
      between: new Chart(
        "Between tokens",
        [
          { name: "p50", colour: "var(--c0)" },
          { name: "p95", colour: "var(--c3)" },
        ],
        { format: seconds, hint: "Over the last half minute" },
      ),
      hits: new Chart(
        "Found in a tier",
        TIERS.map(([name, colour]) => ({ name, colour })),
        { format: percent, most: 1, hint: "Share of look-ups over the last half minute" },
      ),
      memory: new Chart(
        "Memory",
        [
          { name: "experts on the device", colour: "var(--c0)" },
          { name: "key/value cache", colour: "var(--c4)" },
        ],
        { format: bytes },
      ),
    };
    this.figures = h(
      "div",
      { class: "charts" },
      Object.values(this.charts).map((chart) => chart.element),
    );
    this.metricsFault = h("div");
    this.engine = h("div", { class: "card engine" });
    this.told = h("p", { class: "quiet" }, "Every two seconds, the last five minutes");
    show(
      root,
      h("div", { class: "view-head" }, h("h1", { id: "title-live" }, "Live"), this.told),
      this.metricsFault,
      this.figures,
      h("h2", {}, "The engine now"),
      this.engine,
    );
  }

  async start() {
    clearInterval(this.timer);
    this.timer = setInterval(() => document.hidden || this.#look(true), EVERY);
    await this.#look(false);
  }

  async #look(quiet) {
    if (this.looking) return;
    this.looking = true;
    await Promise.all([this.#metrics(quiet), this.#engine(quiet)]);
    this.looking = false;
  }

  async #metrics(quiet) {
    try {
      const text = await getText("/metrics", { quiet });
      this.samples.push({ at: performance.now() / 1000, series: parse(text) });
      if (this.samples.length > WINDOW + 1) this.samples.shift();
      show(this.metricsFault);
      this.figures.hidden = false;
      if (this.samples.length > 1) this.#draw();
    } catch (error) {
      this.figures.hidden = true;
      show(this.metricsFault, refusal(error));
    }
  }

  #draw() {
    const [oldest, previous, now] = [this.samples[0], this.samples.at(-2), this.samples.at(-1)];
    const step = now.at - previous.at;
    const per = (name) => rate(previous.series, now.series, step, name);
    const among = (name, q) => quantile(oldest.series, now.series, name, q);
    const gauge = (name, match) => sum(now.series, name, match);
    const both = (name) => [0.5, 0.95].map((q) => among(name, q));
    const here = new Set(labels(now.series, "switchyard_expert_tier_hits_total", "tier"));
    const { throughput, requests, first, between, hits, memory } = this.charts;
    throughput.push([per("switchyard_generated_tokens_total"), per("switchyard_prompt_tokens_total")], KEPT);
    requests.push([gauge("switchyard_requests_running"), gauge("switchyard_requests_waiting")], KEPT);
    first.push(both("switchyard_time_to_first_token_seconds"), KEPT);
    between.push(both("switchyard_inter_token_seconds"), KEPT);
    hits.push(
      TIERS.map(([tier]) => (here.has(tier) ? found(oldest.series, now.series, tier) : null)),
      KEPT,
    );
    memory.push([gauge("switchyard_expert_tier_bytes", { tier: "device" }), gauge("switchyard_kv_used_bytes")], KEPT);
  }

  async #engine(quiet) {
    try {
      show(this.engine, engineView(await getJson("/debug/engine", { quiet })));
    } catch (error) {
      show(this.engine, refusal(error));
    }
  }
}

/** Share of a tier's look-ups that found their expert; null without any. */
function found(before, now, tier) {
  const grown = (what) =>
    sum(now, `switchyard_expert_tier_${what}_total`, { tier }) -
    sum(before, `switchyard_expert_tier_${what}_total`, { tier });
  const [hits, misses] = [grown("hits"), grown("misses")];
  return hits < 0 || hits + misses <= 0 ? null : hits / (hits + misses);
}
