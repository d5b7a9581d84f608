// What runs, waits and is resident just now, as `/debug/engine` tells administrators.

import { h } from "./dom.js";
import { colour } from "./experts.js";
import { bytes, count, digits, seconds } from "./format.js";

export function engineView(view) {
  const called = (digest) => view.names[digest]?.join(", ") ?? digest.slice(0, 12);
  return [
    h(
      "p",
      { class: "quiet" },
      `${view.stats.mode_is_mixed ? "Mixed" : "Merged"} mode · ${count(view.stats.steps)} steps · `,
      `${count(view.stats.patches)} patches · ${count(view.stats.preemptions)} preemptions`,
    ),
    view.step_seconds !== null &&
      h("p", { class: "quiet" }, `The present step has taken ${seconds(view.step_seconds)} so far.`),
    table(
      "Lanes",
      ["Mix", "Running", "Waiting", "Tokens so far", "Oldest"],
      view.lanes.map((lane) => lineOf(lane, called)),
      "Nothing runs.",
    ),
    table(
      "Experts on the device",
      ["Expert", "Bytes", "Used by"],
      view.experts.map((expert) => [named(called(expert.digest)), bytes(expert.bytes), count(expert.used_by)]),
      "None.",
    ),
    view.waiting_for_experts.length > 0 &&
      table(
        "Waiting for experts",
        ["Mix", "For"],
        view.waiting_for_experts.map((one) => [mixOf(one.mix, called), seconds(one.seconds)]),
        "",
      ),
  ];
}

function lineOf(lane, called) {
  const tokens = lane.sequences.reduce((total, one) => total + one.output_tokens, 0);
  const oldest = Math.max(0, ...lane.sequences.map((one) => one.age_seconds));
  return [mixOf(lane.mix, called), count(lane.running), count(lane.waiting), count(tokens), seconds(oldest)];
}

function mixOf(mix, called) {
  const parts = Object.entries(mix);
  return parts.length
    ? parts.map(([digest, weight]) => named(`${called(digest)} ${digits(weight)}`, called(digest)))
    : named("base");
}

function named(text, name = text) {
  return h("span", { class: "chip" }, h("span", { class: "swatch", css: { "--own": colour(name) } }), text);
}

function table(title, heads, rows, otherwise) {
  return h(
    "section",
    {},
    h("h3", {}, title),
    rows.length
      ? h(
          "div",
          { class: "scroll", tabindex: "0", role: "region", "aria-label": title },
          h(
            "table",
            {},
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                heads.map((head) => h("th", { scope: "col" }, head)),
              ),
            ),
            h(
              "tbody",
              {},
              rows.map((cells) =>
                h(
                  "tr",
                  {},
                  cells.map((cell) => h("td", {}, cell)),
                ),
              ),
            ),
          ),
        )
      : h("p", { class: "quiet" }, otherwise),
  );
}
