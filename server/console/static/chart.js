// Lines over time as SVG: drawn anew at each sample, read aloud as one sentence.

import { h, s, show } from "./dom.js";

const WIDTH = 400;
const HEIGHT = 120;
const LEFT = 6;
const TOP = 8;
const LEAST = 30; // samples that fill the width: a young chart is not squeezed into a corner

export class Chart {
  /** `lines` are `{ name, colour }`; `format` writes a value; `most` fixes the top of the axis. */
  constructor(title, lines, { format, most = null, hint = "" }) {
    Object.assign(this, { title, lines, format, most });
    this.values = lines.map(() => []);
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.figures = h("dl", { class: "figures" });
    this.top = h("span", { class: "axis" });
    this.element = h(
      "figure",
      { class: "chart card", title: hint },
      h("figcaption", {}, title, this.top),
      this.svg,
      this.figures,
    );
    this.draw();
  }

  /** Add a value to each line, null where there is none, and forget what is older than `kept` samples. */
  push(values, kept) {
    this.values.forEach((line, i) => {
      line.push(values[i]);
      if (line.length > kept) line.shift();
    });
    this.draw();
  }

  draw() {
    const known = this.values.flat().filter((value) => value !== null);
    const top = this.most ?? Math.max(...known, 0) * 1.1;
    const last = this.values.map((line) => line.at(-1) ?? null);
    const told = this.lines.map((line, i) => `${line.name} ${last[i] === null ? "none" : this.format(last[i])}`);
    this.svg.setAttribute("aria-label", `${this.title}: ${told.join(", ")}`);
    show(
      this.svg,
      [0.25, 0.5, 0.75, 1].map((share) => s("path", { class: "rule", d: `M0 ${y(share)}H${WIDTH}` })),
      this.lines.map((line, i) => this.#line(this.values[i], top || 1, line.colour)),
    );
    show(this.top, known.length && top ? `up to ${this.format(top)}` : "");
    show(
      this.figures,
      this.lines.map((line, i) =>
        h(
          "div",
          {},
          h("dt", {}, h("span", { class: "swatch", css: { "--own": line.colour } }), line.name),
          h("dd", {}, last[i] === null ? "–" : this.format(last[i])),
        ),
      ),
    );
  }

  #line(values, top, colour) {
    const step = (WIDTH - LEFT) / (Math.max(values.length, LEAST) - 1);
    const start = WIDTH - (values.length - 1) * step;
    const runs = [[]];
    values.forEach((value, i) => {
      if (value === null) runs.push([]);
      else runs.at(-1).push([start + i * step, y(1 - Math.min(1, value / top))]);
    });
    return runs
      .filter((run) => run.length)
      .map((run) => {
        const path = `M${run.map(([x, height]) => `${x.toFixed(1)} ${height}`).join("L")}`;
        const [from, to] = [run[0][0], run.at(-1)[0]];
        return s(
          "g",
          { css: { "--own": colour } },
          s("path", { class: "area", d: `${path}L${to.toFixed(1)} ${HEIGHT}L${from.toFixed(1)} ${HEIGHT}Z` }),
          s("path", { class: "line", d: run.length > 1 ? path : `${path}h2` }),
        );
      });
  }
}

const y = (share) => Number((TOP + share * (HEIGHT - TOP)).toFixed(1));
