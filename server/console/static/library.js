// The library: every expert that exists for this key, to be searched, sorted and opened.

import { h, options, show } from "./dom.js";
import { all, areLoaded, colour, load, retention, subscribe } from "./experts.js";
import { ago, bytes, count, digits, percent } from "./format.js";
import { openExpert } from "./expert.js";
import { refusal } from "./notices.js";

const SHOWN = 200;
const REFRESH = 10_000;
const TIERS = { device: 0, host: 1, store: 2 };

// Heading, what it is sorted by, what a cell shows, whether numbers stand in it.
const COLUMNS = [
  { id: "id", text: "Name", by: (expert) => expert.id, cell: nameCell },
  { id: "bytes", text: "Size", by: (expert) => expert.bytes, cell: (expert) => bytes(expert.bytes), number: true },
  {
    id: "bits",
    text: "Bits/param",
    by: (expert) => expert.bits_per_param,
    cell: (expert) => digits(expert.bits_per_param),
    number: true,
  },
  {
    id: "retention",
    text: "Retention",
    by: (expert) => retention(expert) ?? -1,
    cell: (expert) => percent(retention(expert)),
    number: true,
    hint: "Share of the fine-tune's gain that is kept, measured on labelled exemplars when it was made",
  },
  {
    id: "agreement",
    text: "Same answers",
    by: (expert) => expert.report?.agreement ?? -1,
    cell: (expert) => percent(expert.report?.agreement),
    number: true,
    hint: "Share of the fine-tune's greedy answers that it gives too, measured when it was made",
  },
  {
    id: "tier",
    text: "Tier",
    by: (expert) => TIERS[expert.tier],
    cell: (expert) => h("span", { class: `badge tier-${expert.tier}` }, expert.tier),
  },
  {
    id: "used",
    text: "Last used",
    by: (expert) => -(expert.last_used ?? 0),
    cell: (expert) => ago(expert.last_used),
    hint: "By this server, since its start",
  },
  {
    id: "exemplars",
    text: "Exemplars",
    by: (expert) => expert.exemplar_count,
    cell: (expert) => count(expert.exemplar_count),
    number: true,
  },
  { id: "visibility", text: "Visibility", by: (expert) => expert.visibility, cell: (expert) => expert.visibility },
];

export function libraryView(root) {
  const view = new Library(root);
  return {
    title: "Library",
    start: ([name]) => view.start(name),
    stop: () => clearInterval(view.timer),
    focus: () => view.search.focus(),
  };
}

class Library {
  constructor(root) {
    this.sort = { id: "id", up: true };
    this.most = SHOWN;
    this.search = h("input", {
      type: "search",
      placeholder: "Search names, descriptions, tags …",
      "aria-label": "Search experts",
      oninput: () => this.#draw(),
    });
    this.tag = h("select", { "aria-label": "Tag", onchange: () => this.#draw() });
    this.told = h("p", { class: "quiet", role: "status" });
    this.head = h("tr");
    this.rows = h("tbody");
    this.table = h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Experts" },
      h("table", { class: "experts" }, h("thead", {}, this.head), this.rows),
    );
    this.more = h(
      "button",
      {
        type: "button",
        hidden: true,
        onclick: () => {
          this.most += SHOWN;
          this.#draw();
        },
      },
      "Show more",
    );
    this.fault = h("div");
    show(
      root,
      h(
        "div",
        { class: "view-head" },
        h("h1", { id: "title-library" }, "Library"),
        h("a", { class: "button primary", href: "#upload" }, "Upload an expert"),
      ),
      h("div", { class: "toolbar" }, this.search, this.tag, this.told),
      this.fault,
      this.table,
      this.more,
    );
    subscribe(() => this.#draw());
    this.#draw();
  }

  async start(name) {
    clearInterval(this.timer);
    this.timer = setInterval(() => document.hidden || this.#refresh(true), REFRESH);
    await this.#refresh(false);
    if (name) {
      history.replaceState(null, "", "#library");
      this.#open(name);
    }
  }

  async #refresh(quiet) {
    try {
      await load({ quiet });
      show(this.fault);
    } catch (error) {
      show(this.fault, refusal(error));
    }
  }

  #matching() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const tag = this.tag.value;
    const { by } = COLUMNS.find((column) => column.id === this.sort.id);
    const order = this.sort.up ? 1 : -1;
    return all()
      .filter((expert) => !tag || expert.tags.includes(tag))
      .filter((expert) => words.every((word) => haystack(expert).includes(word)))
      .sort((one, other) => order * compare(by(one), by(other)) || compare(one.id, other.id));
  }

  #draw() {
    const tags = [...new Set(all().flatMap((expert) => expert.tags))].sort();
    const tag = tags.includes(this.tag.value) ? this.tag.value : "";
    show(this.tag, options([["", "Every tag"], ...tags.map((one) => [one, one])], tag));
    this.tag.hidden = !tags.length;
    const found = this.#matching();
    const size = found.reduce((sum, expert) => sum + expert.bytes, 0);
    show(this.told, areLoaded() ? `${count(found.length)} of ${count(all().length)} · ${bytes(size)}` : "");
    show(
      this.head,
      COLUMNS.map((column) => this.#heading(column)),
    );
    const focused = document.activeElement?.dataset?.expert;
    show(
      this.rows,
      found.slice(0, this.most).map((expert) => this.#row(expert)),
    );
    if (!found.length)
      show(
        this.rows,
        h(
          "tr",
          {},
          h(
            "td",
            { colspan: COLUMNS.length, class: "empty" },
            nothing(),
          ),
        ),
      );
    this.more.hidden = found.length <= this.most;
    // Drawn anew by a timer: whoever is on a row by keyboard stays there.
    if (focused) this.rows.querySelector(`[data-expert="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }

  #heading({ id, text, number, hint }) {
    const { sort } = this;
    const direction = sort.id === id ? (sort.up ? "ascending" : "descending") : "none";
    const press = () => {
      this.sort = { id, up: sort.id === id ? !sort.up : true };
      this.#draw();
      this.head.querySelector(`[data-column="${id}"]`).focus();
    };
    return h(
      "th",
      { scope: "col", "aria-sort": direction, class: number ? "number" : "" },
      h(
        "button",
        { type: "button", class: "plain", "data-column": id, title: hint, onclick: press },
        text,
        h("span", { "aria-hidden": "true", class: "arrow" }, { ascending: "▲", descending: "▼", none: "" }[direction]),
      ),
    );
  }

  #row(expert) {
    return h(
      "tr",
      { onclick: (event) => event.target.closest("a, button") || this.#open(expert.id) },
      COLUMNS.map((column) =>
        column.id === "id"
          ? h(
              "th",
              { scope: "row" },
              column.cell(expert, () => this.#open(expert.id)),
            )
          : h("td", { class: column.number ? "number" : "", "data-label": column.text }, column.cell(expert)),
      ),
    );
  }

  async #open(name) {
    await openExpert(name);
    // Rows may have been drawn anew meanwhile: the one that the dialog was opened from may be gone.
    this.rows.querySelector(`[data-expert="${CSS.escape(name)}"]`)?.focus({ preventScroll: true });
    await this.#refresh(true);
  }
}

function nameCell(expert, open) {
  return [
    h(
      "button",
      { type: "button", class: "plain name", "data-expert": expert.id, onclick: open },
      h("span", { class: "swatch", css: { "--own": colour(expert.id) } }),
      expert.id,
    ),
    expert.description && h("span", { class: "quiet line" }, expert.description),
    expert.tags.length > 0 &&
      h(
        "span",
        { class: "tags" },
        expert.tags.map((tag) => h("span", { class: "tag" }, tag)),
      ),
  ];
}

/** What stands where experts would, if there are none to show. */
function nothing() {
  if (!areLoaded()) return "Loading …";
  return all().length ? "No expert is like that." : "No expert yet: drop one on the page “Upload”.";
}

function haystack(expert) {
  return [expert.id, expert.description, expert.author, ...expert.tags, ...expert.aliases].join("\n").toLowerCase();
}

const compare = (one, other) => (one < other ? -1 : Number(one > other));
