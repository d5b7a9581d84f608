// The router map: where experts lie, where prompts come down, and why each went where it did.

import { getJson } from "./api.js";
import { field, h, s, show, toast } from "./dom.js";
import { colour, load } from "./experts.js";
import { explanation, mixChips, reasonWords } from "./explain.js";
import { ago, percent } from "./format.js";
import { refusal } from "./notices.js";
import { drawMap } from "./scatter.js";

const EVERY = 2000;
const MOST = 64;
const KEPT = 128;

export function mapView(root) {
  const view = new MapView(root);
  return {
    title: "Router map",
    start: () => view.start(),
    stop: () => clearInterval(view.timer),
    focus: () => view.probe.focus(),
  };
}

class MapView {
  constructor(root) {
    this.map = null;
    this.prompts = [];
    this.chosen = null;
    this.only = "";
    this.svg = s("svg", { class: "map", role: "group", "aria-label": "Map of experts and routed prompts" });
    this.legend = h("ul", { class: "legend", "aria-label": "Experts on the map" });
    this.told = h("p", { class: "quiet", role: "status" });
    this.fault = h("div");
    this.list = h("ol", { class: "recent", "aria-label": "Prompts routed lately" });
    this.detail = h("div", { class: "detail", role: "region", "aria-label": "Why", tabindex: "-1" });
    this.probe = h("input", { type: "text", id: "probe", placeholder: "A prompt …", autocomplete: "off" });
    const form = h(
      "form",
      {
        class: "probe",
        onsubmit: (event) => {
          event.preventDefault();
          this.#try();
        },
      },
      field("Where would this go?", this.probe),
      h("button", { type: "submit", class: "primary" }, "Route"),
    );
    show(
      root,
      h("div", { class: "view-head" }, h("h1", { id: "title-map" }, "Router map"), this.told),
      this.fault,
      h(
        "div",
        { class: "split" },
        h("div", { class: "card" }, this.svg, this.legend),
        h("div", { class: "panel" }, form, this.detail, h("h2", {}, "Lately"), this.list),
      ),
    );
    this.#hint();
  }

  async start() {
    clearInterval(this.timer);
    this.timer = setInterval(() => document.hidden || this.#follow(true), EVERY);
    await this.#follow(false);
  }

  /** Ask for what is new; a library that has changed has another map, on which all prompts lie elsewhere. */
  async #follow(quiet) {
    if (this.asking) return;
    this.asking = true;
    try {
      const after = this.prompts.at(-1)?.number ?? 0;
      let map = await getJson(`/v1/route/map?experts=${MOST}&after=${after}`, { quiet });
      if (this.map && map.edition !== this.map.edition) {
        await load({ quiet });
        map = await getJson(`/v1/route/map?experts=${MOST}`, { quiet });
        this.prompts = [];
      }
      this.prompts = [...this.prompts, ...map.recent].slice(-KEPT);
      this.map = map;
      show(this.fault);
      this.#draw();
    } catch (error) {
      show(this.fault, refusal(error));
    } finally {
      this.asking = false;
    }
  }

  #draw() {
    const { map } = this;
    const [one, two] = map.axes;
    const hidden = map.left_out ? ` · ${map.left_out} experts not shown` : "";
    show(
      this.told,
      map.experts.length
        ? `Two directions, ${percent(one + two)} of the spread${hidden}`
        : "No expert has exemplars yet.",
    );
    const focused = document.activeElement?.dataset?.number;
    drawMap(this.svg, map, this.prompts, {
      chosen: this.chosen,
      only: this.only,
      pick: (prompt) => this.#pick(prompt),
    });
    show(
      this.legend,
      map.experts.map((expert) => this.#entry(expert)),
    );
    const latest = this.prompts.slice(-12).reverse();
    show(
      this.list,
      latest.length
        ? latest.map((prompt) => this.#recent(prompt))
        : h("li", { class: "quiet" }, "Nothing was routed yet. Chat with “Routed”."),
    );
    if (focused) this.#refocus(focused);
  }

  #refocus(number) {
    document.querySelector(`#view-map [data-number="${number}"]`)?.focus({ preventScroll: true });
  }

  #entry(expert) {
    const press = () => {
      this.only = this.only === expert.id ? "" : expert.id;
      this.#draw();
      this.#refocus(`expert-${expert.digest}`);
    };
    return h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          class: "chip",
          "aria-pressed": String(this.only === expert.id),
          "data-number": `expert-${expert.digest}`,
          onclick: press,
        },
        h("span", { class: "swatch", css: { "--own": colour(expert.id) } }),
        expert.id,
      ),
    );
  }

  #recent(prompt) {
    return h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          "data-number": `list-${prompt.number}`,
          class: prompt.number === this.chosen ? "chosen" : "",
          onclick: () => this.#pick(prompt),
        },
        h("span", { class: "chips" }, mixChips(prompt.mix)),
        h("span", { class: "quiet" }, `${reasonWords(prompt.code)} · ${ago(prompt.at)}`),
      ),
    );
  }

  #pick(prompt) {
    this.chosen = prompt.number;
    this.#draw();
    show(
      this.detail,
      h("h2", {}, "Why it went there"),
      h("p", { class: "quiet" }, `Routed ${ago(prompt.at)}. The server keeps where a prompt lies, not its text.`),
      explanation(prompt),
    );
  }

  #hint() {
    show(
      this.detail,
      h(
        "p",
        { class: "quiet" },
        "Circles are centres of experts' exemplars, grey ones general text; diamonds are prompts. " +
          "Choose one to see why it went where it did.",
      ),
    );
  }

  async #try() {
    const prompt = this.probe.value.trim();
    if (!prompt) return;
    try {
      const decision = await getJson("/v1/route", { method: "POST", json: { prompt } });
      show(this.detail, h("h2", {}, "Where it would go"), explanation(decision));
    } catch (error) {
      toast(error.message, "bad");
    }
  }
}
