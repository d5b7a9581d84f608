// Who answers: routed by the prompt, the base, one expert, or a mix with sliders.

import { field, h, options, show } from "./dom.js";
import { all, colour, server, subscribe } from "./experts.js";
import { weight } from "./format.js";
import { keep, recall } from "./kept.js";

const MODES = [
  ["auto", "Routed"],
  ["expert", "Expert"],
  ["mix", "Mix"],
  ["base", "Base"],
];
const MOST = 16;

export class Mixer {
  constructor() {
    this.state = recall("mixer", { mode: "auto", expert: "", mix: [], soft: "", confidence: 0 });
    this.body = h("div", { class: "mixer-body" });
    this.element = h(
      "fieldset",
      { class: "mixer" },
      h("legend", {}, "Who answers"),
      h(
        "div",
        { class: "segments" },
        MODES.map(([mode, text]) => this.#radio(mode, text)),
      ),
      this.body,
    );
    subscribe(() => this.#draw());
    this.#draw();
  }

  /** The fields of a request that say who answers. */
  request() {
    const { mode, expert, mix, soft, confidence } = this.state;
    if (mode === "base") return { model: server.base };
    if (mode === "expert") return { model: expert };
    if (mode === "mix") return { model: server.base, experts: mix.map(({ id, weight }) => ({ id, weight })) };
    const routing = { ...(soft && { mode: soft }), ...(confidence && { min_confidence: confidence }) };
    return { model: "auto", ...(Object.keys(routing).length && { routing }) };
  }

  /** What is missing before anything can be asked; "" if nothing is. */
  get gap() {
    const { mode, expert, mix } = this.state;
    if (mode === "expert" && !expert) return "Choose an expert first.";
    if (mode === "mix" && !mix.length) return "Add an expert to the mix first.";
    return "";
  }

  /** Ask this expert from now on. */
  force(name) {
    this.#set({ mode: "expert", expert: name });
  }

  #set(change) {
    Object.assign(this.state, change);
    keep("mixer", this.state);
    this.#draw();
  }

  #radio(mode, text) {
    const input = h("input", { type: "radio", name: "mode", value: mode, onchange: () => this.#set({ mode }) });
    return h("label", {}, input, h("span", {}, text));
  }

  #draw() {
    for (const input of this.element.querySelectorAll("input[name=mode]"))
      input.checked = input.value === this.state.mode;
    if (!this.state.expert) this.state.expert = all()[0]?.id ?? "";
    show(
      this.body,
      { auto: () => this.#routed(), expert: () => this.#one(), mix: () => this.#mix(), base: () => this.#base() }[
        this.state.mode
      ](),
    );
  }

  #base() {
    return h("p", { class: "quiet" }, `${server.base || "The base"} alone, without any expert.`);
  }

  #routed() {
    const { soft, confidence } = this.state;
    const style = h(
      "select",
      { onchange: (event) => this.#set({ soft: event.target.value }) },
      options(
        [
          ["", "As the server is set"],
          ["top1", "The best expert"],
          ["soft", "A weighted mix"],
        ],
        soft,
      ),
    );
    const told = h("output", {}, confidence ? `${Math.round(100 * confidence)} %` : "off");
    const least = h("input", {
      type: "range",
      min: 0,
      max: 1,
      step: 0.05,
      value: confidence,
      oninput: (event) => show(told, Number(event.target.value) ? `${Math.round(100 * event.target.value)} %` : "off"),
      onchange: (event) => {
        this.state.confidence = Number(event.target.value);
        keep("mixer", this.state);
      },
    });
    return [
      h("p", { class: "quiet" }, "The prompt's own features pick the expert; what fits none goes to the base."),
      field("Routed to", style),
      h("div", { class: "beside" }, field("Least confidence", least), told),
    ];
  }

  #one() {
    if (!all().length) return h("p", { class: "quiet" }, "There is no expert yet. Upload one.");
    const names = all().map((expert) => [expert.id, expert.id]);
    const choice = h(
      "select",
      { id: "forced", onchange: (event) => this.#set({ expert: event.target.value }) },
      options(names, this.state.expert),
    );
    const chosen = all().find((expert) => expert.id === this.state.expert);
    return [field("Expert", choice), chosen?.description && h("p", { class: "quiet" }, chosen.description)];
  }

  #mix() {
    const { mix } = this.state;
    const rest = all().filter((expert) => !mix.some((part) => part.id === expert.id));
    const add = h(
      "select",
      {
        id: "add-expert",
        disabled: !rest.length || mix.length >= MOST,
        onchange: (event) => this.#add(event.target.value),
      },
      options(
        [["", rest.length ? "Add an expert …" : "No other expert"], ...rest.map((expert) => [expert.id, expert.id])],
        "",
      ),
    );
    return [
      h("p", { class: "quiet" }, "Weights multiply each expert's task vector; below 0 they push away from it."),
      h(
        "div",
        { class: "sliders" },
        mix.map((part) => this.#slider(part)),
      ),
      field("Add", add),
    ];
  }

  #add(id) {
    if (!id) return;
    this.#set({ mix: [...this.state.mix, { id, weight: 1 }] });
    this.body.querySelector(`.slider:last-of-type input`)?.focus();
  }

  #slider(part) {
    const told = h("output", {}, weight(part.weight));
    const input = h("input", {
      type: "range",
      min: -2,
      max: 2,
      step: 0.05,
      value: part.weight,
      "aria-label": `Weight of ${part.id}`,
      css: { "--own": colour(part.id) },
      oninput: (event) => {
        part.weight = Number(event.target.value);
        show(told, weight(part.weight));
        keep("mixer", this.state);
      },
    });
    const remove = h(
      "button",
      {
        type: "button",
        class: "plain",
        "aria-label": `Take ${part.id} out of the mix`,
        onclick: () => this.#set({ mix: this.state.mix.filter((other) => other !== part) }),
      },
      "✕",
    );
    return h(
      "div",
      { class: "slider" },
      h("span", { class: "swatch", css: { "--own": colour(part.id) } }),
      h("span", { class: "name" }, part.id),
      told,
      remove,
      input,
    );
  }
}
