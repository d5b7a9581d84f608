// The prompts that an expert is found by: shown to its owner, who may change them.

import { call, getJson } from "./api.js";
import { field, h, show, toast } from "./dom.js";
import { count } from "./format.js";
import { refusal } from "./notices.js";

const SHOWN = 12;

/** A section that loads itself. */
export function exemplarsPart(path) {
  const body = h("div", {}, h("p", { class: "quiet" }, "Loading …"));
  fill(body, `${path}/exemplars`);
  return h("section", { class: "exemplars" }, h("h3", {}, "Exemplars"), body);
}

async function fill(body, path) {
  try {
    const told = await getJson(path, { quiet: true });
    show(
      body,
      list(told),
      h(
        "div",
        { class: "row" },
        h("button", { type: "button", class: "small", onclick: () => edit(body, path, told) }, "Edit"),
        !told.from_file &&
          h(
            "button",
            { type: "button", class: "small", onclick: () => change(body, path, { method: "DELETE" }) },
            "Back to those of the file",
          ),
      ),
    );
  } catch (error) {
    show(body, refusal(error));
  }
}

function list({ exemplars, from_file: fromFile }) {
  if (!exemplars.length)
    return h("p", { class: "quiet" }, "None: no prompt is routed to it, it is reached by name only.");
  const items = h("ul", {}, exemplars.slice(0, SHOWN).map(item));
  const rest = exemplars.length - SHOWN;
  const more =
    rest > 0 &&
    h(
      "button",
      {
        type: "button",
        class: "small",
        onclick: () => {
          items.append(...exemplars.slice(SHOWN).map(item));
          more.remove();
        },
      },
      `Show ${count(rest)} more`,
    );
  return [
    h("p", { class: "quiet" }, `${count(exemplars.length)}, ${fromFile ? "from its file" : "set on this server"}.`),
    items,
    more,
  ];
}

const item = (text) => h("li", {}, text);

function edit(body, path, { exemplars }) {
  const input = h("textarea", { rows: 10, value: exemplars.join("\n") });
  const save = () => {
    const lines = input.value
      .split("\n")
      .map((line) => line.trim())
      .filter(Boolean);
    change(body, path, { method: "PUT", json: { exemplars: lines } });
  };
  const lossy = exemplars.some((text) => text.includes("\n"));
  show(
    body,
    field("One prompt a line", input, lossy && "Some have several lines; they would become several prompts."),
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", class: "small primary", onclick: save }, "Save"),
      h("button", { type: "button", class: "small", onclick: () => fill(body, path) }, "Cancel"),
    ),
  );
  input.focus();
}

async function change(body, path, how) {
  try {
    await call(path, how);
    toast("Prompts are routed by these exemplars from now on");
    await fill(body, path);
  } catch (error) {
    toast(error.message, "bad");
  }
}
