// A map as SVG: centres of experts, general text, and prompts that can be reached by mouse and by keyboard.

import { s, show } from "./dom.js";
import { colour } from "./experts.js";

const WIDTH = 760;
const HEIGHT = 560;
const MARGIN = 44;
const LINE = 16;
const FRESH = 60; // seconds in which a prompt fades

/** Draw the map into an SVG element; `pick(prompt)` when a prompt is chosen. */
export function drawMap(svg, map, prompts, { chosen, pick, only }) {
  const scale = fit([
    ...map.experts.flatMap((expert) => expert.centres),
    ...map.background,
    ...prompts.map((one) => [one.x, one.y]),
  ]);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const faded = (name) => (only && only !== name ? " faded" : "");
  show(
    svg,
    s(
      "g",
      { class: "background" },
      map.background.map((point) => circle(scale(point), 2.5)),
    ),
    map.experts.map((expert) =>
      s(
        "g",
        { class: `centres${faded(expert.id)}`, css: { "--own": colour(expert.id) } },
        expert.centres.map((point) => circle(scale(point), 5)),
      ),
    ),
    labels(map.experts, scale, faded),
    s(
      "g",
      { class: "prompts" },
      prompts.map((prompt) => dot(prompt, scale, prompt.number === chosen, pick)),
    ),
  );
}

/** From places on the map to the picture, both axes alike. */
function fit(points) {
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [left, right] = [Math.min(...xs, 0), Math.max(...xs, 1e-6)];
  const [low, high] = [Math.min(...ys, 0), Math.max(...ys, 1e-6)];
  const size = Math.min((WIDTH - 2 * MARGIN) / (right - left), (HEIGHT - 2 * MARGIN) / (high - low));
  return ([x, y]) => [WIDTH / 2 + (x - (left + right) / 2) * size, HEIGHT / 2 - (y - (low + high) / 2) * size];
}

function circle([x, y], r) {
  return s("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r });
}

/** Names above the bulk of their centres, one a line where they would lie upon each other. */
function labels(experts, scale, faded) {
  const placed = [];
  return experts.map((expert) => {
    const points = bulk(expert.centres.map(scale));
    const x = median(points.map((point) => point[0]));
    let y = Math.max(LINE, Math.min(...points.map((point) => point[1])) - 11);
    const reach = 4.5 * expert.id.length;
    while (placed.some((other) => Math.abs(other.x - x) < other.reach + reach && Math.abs(other.y - y) < LINE))
      y -= LINE;
    placed.push({ x, y, reach });
    const anchor = x > WIDTH - 90 ? "end" : x < 90 ? "start" : "middle";
    return s(
      "text",
      { x: x.toFixed(1), y: y.toFixed(1), "text-anchor": anchor, class: `label${faded(expert.id)}` },
      expert.id,
    );
  });
}

/** Without the few that lie far off. */
function bulk(points) {
  const middle = [0, 1].map((axis) => median(points.map((point) => point[axis])));
  const far = points.map(([x, y]) => Math.hypot(x - middle[0], y - middle[1]));
  const most = 2.5 * median(far) + 4;
  return points.filter((_, i) => far[i] <= most);
}

function median(values) {
  return [...values].sort((one, other) => one - other)[Math.floor(values.length / 2)];
}

function dot(prompt, scale, isChosen, pick) {
  const [x, y] = scale([prompt.x, prompt.y]);
  const who = prompt.mix.map((part) => part.id).join(", ") || "the base";
  const age = Date.now() / 1000 - prompt.at;
  const press = (event) => {
    if (event.type === "keydown" && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    pick(prompt);
  };
  return s(
    "g",
    {
      class: `prompt${isChosen ? " chosen" : ""}${age < 5 ? " new" : ""}`,
      tabindex: 0,
      role: "button",
      "data-number": prompt.number,
      "aria-label": `A prompt that went to ${who}`,
      "aria-pressed": isChosen ? "true" : "false",
      transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
      onclick: press,
      onkeydown: press,
      css: {
        "--own": prompt.mix.length ? colour(prompt.mix[0].id) : "var(--grey)",
        opacity: isChosen ? "1" : String(Math.max(0.45, 1 - age / FRESH)),
      },
    },
    s("circle", { r: 13, class: "halo" }),
    s("path", { d: "M0-8 8 0 0 8-8 0Z" }),
  );
}
