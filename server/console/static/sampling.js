// How tokens are chosen, and what goes along with a message.

import { field, h } from "./dom.js";
import { keep, recall } from "./kept.js";

// Name of the API's parameter, label, range, step, and the value that a new tab begins with ("" is the server's own).
const FIELDS = [
  ["temperature", "Temperature", 0, 2, 0.1, 0.7],
  ["top_p", "Top p", 0.01, 1, 0.01, ""],
  ["top_k", "Top k", 0, 1000, 1, ""],
  ["min_p", "Min p", 0, 1, 0.01, ""],
  ["max_tokens", "Most tokens", 1, 100000, 1, 256],
  ["repetition_penalty", "Repetition penalty", 0.1, 10, 0.05, ""],
  ["seed", "Seed", 0, 2 ** 31, 1, ""],
];

export class Sampling {
  constructor() {
    this.given = recall("sampling", Object.fromEntries(FIELDS.map(([name, , , , , first]) => [name, first])));
    this.system = recall("system", "");
    /** Whether a message goes without what was said before: many experts know single questions only. */
    this.alone = recall("alone", false);
    const inputs = FIELDS.map(([name, label, min, max, step]) => field(label, this.#input(name, min, max, step)));
    const system = h("textarea", {
      rows: 3,
      value: this.system,
      placeholder: "None",
      oninput: (event) => {
        this.system = event.target.value;
        keep("system", this.system);
      },
    });
    const alone = h("input", {
      type: "checkbox",
      id: "alone",
      checked: this.alone,
      onchange: (event) => {
        this.alone = event.target.checked;
        keep("alone", this.alone);
      },
    });
    this.element = h(
      "details",
      { class: "sampling" },
      h("summary", {}, "Sampling"),
      h("div", { class: "grid" }, inputs),
      field("System message", system),
      h("label", { class: "check" }, alone, "Each message by itself"),
    );
  }

  /** The parameters that were given. */
  request() {
    return Object.fromEntries(Object.entries(this.given).filter(([, value]) => value !== ""));
  }

  #input(name, min, max, step) {
    return h("input", {
      type: "number",
      min,
      max,
      step,
      value: this.given[name],
      placeholder: "default",
      id: `sampling-${name}`,
      onchange: (event) => {
        if (!event.target.reportValidity()) return;
        this.given[name] = event.target.value === "" ? "" : Number(event.target.value);
        keep("sampling", this.given);
      },
    });
  }
}
