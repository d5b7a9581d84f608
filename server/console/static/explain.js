// A route, explained: who was chosen, by which votes, and what the prompt lies near.

import { h } from "./dom.js";
import { colour } from "./experts.js";
import { digits, percent, weight } from "./format.js";

const SHOWN = 5;

/** Chips of a mix; "base" where nobody else answers. */
export function mixChips(mix) {
  if (!mix?.length) return [h("span", { class: "chip" }, h("span", { class: "swatch" }), "base")];
  return mix.map((part) =>
    h(
      "span",
      { class: `chip${part.weight < 0 ? " against" : ""}`, title: part.digest ? `sha256 ${part.digest}` : null },
      h("span", { class: "swatch", css: { "--own": colour(part.id) } }),
      part.id,
      h("b", {}, weight(part.weight)),
    ),
  );
}

/** A bar in which each expert has the share of its weight. */
export function mixBar(mix) {
  const total = mix.reduce((sum, part) => sum + Math.abs(part.weight), 0);
  return h(
    "div",
    { class: "mixbar", "aria-hidden": "true" },
    total
      ? mix.map((part) =>
          h("i", {
            class: part.weight < 0 ? "against" : "",
            css: { "--own": colour(part.id), "flex-grow": String(Math.abs(part.weight) / total) },
          }),
        )
      : h("i", { css: { "flex-grow": "1" } }),
  );
}

const WORDS = {
  matched: "Matched",
  kept: "Kept from the conversation",
  out_of_domain: "Out of every domain",
  low_confidence: "Too unsure",
  no_experts: "No expert to route to",
  empty_prompt: "Nothing to route by",
  base_requested: "Base asked for",
  expert_requested: "Asked by name",
  mix_requested: "Mix asked for",
};

/** What a reason's code means, in a few words. */
export const reasonWords = (code) => WORDS[code] ?? code;

/** All that a decision of `/v1/route` or of the map tells. */
export function explanation(decision) {
  const facts = [
    ["Confidence", percent(decision.confidence)],
    ["Distance", digits(decision.distance)],
    ["Domain ends at", digits(decision.threshold)],
  ];
  const rest = decision.neighbours.slice(SHOWN);
  const list = (some) =>
    h(
      "ol",
      { class: "neighbours" },
      some.map((near) => neighbour(near, longest)),
    );
  const longest = Math.max(...decision.neighbours.map((near) => near.distance), 1e-9);
  return h(
    "div",
    { class: "explanation" },
    h("div", { class: "chips" }, mixChips(decision.mix), h("span", { class: "badge" }, reasonWords(decision.code))),
    h("p", {}, decision.reason),
    h(
      "dl",
      { class: "facts" },
      facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    ),
    decision.neighbours.length > 0 && h("h3", {}, "Nearest centres"),
    list(decision.neighbours.slice(0, SHOWN)),
    rest.length > 0 && h("details", {}, h("summary", { class: "quiet" }, `${rest.length} more`), list(rest)),
  );
}

function neighbour(near, longest) {
  return h(
    "li",
    {},
    h("span", { class: "swatch", css: { "--own": near.id ? colour(near.id) : "var(--grey)" } }),
    h("span", { class: "name" }, near.id ?? "general text"),
    h(
      "span",
      { class: "meter", "aria-hidden": "true" },
      h("i", {
        css: { width: `${(100 * near.distance) / longest}%`, "--own": near.id ? colour(near.id) : "var(--grey)" },
      }),
    ),
    h("span", { class: "number" }, digits(near.distance)),
    h("q", {}, near.exemplar),
  );
}
