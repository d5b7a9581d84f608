// One expert in full: its report, its versions, its exemplars, and its end.

import { call, getJson } from "./api.js";
import { confirm, open } from "./dialogs.js";
import { h, show, toast } from "./dom.js";
import { colour, load, retention } from "./experts.js";
import { ago, bytes, count, date, digits, percent } from "./format.js";
import { exemplarsPart } from "./exemplars.js";
import { refusal } from "./notices.js";
import { measuredFacts } from "./report.js";

const BF16_BITS = 16;

/** Open an expert's page; resolves when it is closed. */
export async function openExpert(name) {
  const body = h("div", { class: "expert" }, h("p", { class: "quiet" }, "Loading …"));
  await open(
    name,
    (close) => {
      fillIn(body, name, close);
      return body;
    },
    { wide: true },
  );
}

async function fillIn(body, name, close) {
  const path = `/v1/experts/${encodeURIComponent(name)}`;
  try {
    const [expert, versions] = await Promise.all([getJson(path), getJson(`${path}/versions`)]);
    show(
      body,
      h("p", { class: "lead" }, expert.description || "No description."),
      h(
        "div",
        { class: "row" },
        h(
          "a",
          { class: "button primary", href: `#chat/${encodeURIComponent(name)}`, onclick: () => close() },
          "Chat with it",
        ),
        h("button", { type: "button", class: "danger", onclick: () => remove(expert, path, close) }, "Delete …"),
      ),
      report(expert),
      layersPart(expert.layers),
      versionsPart(versions.data, path, () => fillIn(body, name, close)),
      exemplarsPart(path),
    );
  } catch (error) {
    show(body, refusal(error));
  }
}

function report(expert) {
  const { tensors } = expert;
  const facts = [
    ["Size", bytes(expert.bytes)],
    ["Bits per parameter", digits(expert.bits_per_param)],
    ["Smaller than bf16", expert.bits_per_param ? `${digits(BF16_BITS / expert.bits_per_param)} ×` : "–"],
    ["Retention", percent(retention(expert))],
    ...measuredFacts(expert.report),
    ["Codec", expert.codec],
    ["Density", digits(expert.density)],
    ["Nonzeros", `${count(tensors.nonzeros)} of ${count(tensors.elements)}`],
    ["Tensors", `${count(tensors.ternary)} sparse, ${count(tensors.dense)} dense`],
    ["Tier", expert.tier],
    ["Last used", ago(expert.last_used)],
    ["Published", date(expert.created)],
    ["Visibility", expert.visibility + (expert.shared_with.length ? ` with ${expert.shared_with.join(", ")}` : "")],
    ["Owner", expert.owner],
    ["Aliases", expert.aliases.join(", ")],
    ["Author", expert.author],
    ["Licence", expert.license],
    ["Tags", expert.tags.join(", ")],
    ["Signed by", expert.signed_by && (expert.signed_by.name ?? `an unknown key, ${expert.signed_by.fingerprint}`)],
    ["Made with", expert.tool],
    ...Object.entries(expert.codec_params).map(([key, value]) => [
      `Codec: ${key}`,
      typeof value === "number" ? digits(value) : String(value),
    ]),
    ...Object.entries(expert.metadata).filter(([key]) => key !== "retention"),
  ];
  return h(
    "section",
    {},
    h("h3", {}, "Report"),
    h(
      "dl",
      { class: "facts" },
      facts.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    ),
    h(
      "p",
      { class: "quiet" },
      h("span", { class: "swatch", css: { "--own": colour(expert.id) } }),
      ` Routing: ${expert.routing_reason}.`,
    ),
    h("p", { class: "quiet digest" }, `sha256 ${expert.digest}`),
  );
}

function layersPart(layers) {
  if (!layers.length) return null;
  const row = ({ layer, density, bits_per_param, bit_width, bytes: size }) => {
    const cells = [digits(density), digits(bits_per_param), digits(bit_width), bytes(size)];
    return h("tr", {}, h("td", {}, layer), ...cells.map((text) => h("td", { class: "number" }, text)));
  };
  const head = ["Layer", "Density", "Bits/param", "Bit-width", "Size"].map((text) => h("th", { scope: "col" }, text));
  return h(
    "details",
    {},
    h("summary", {}, "Density and bits by layer"),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Layers" },
      h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, layers.map(row))),
    ),
  );
}

function versionsPart(versions, path, again) {
  if (versions.length < 2) return null;
  return h(
    "section",
    {},
    h("h3", {}, "Versions"),
    h(
      "ul",
      { class: "versions" },
      versions.map((version) =>
        h(
          "li",
          {},
          h("code", {}, version.digest.slice(0, 12)),
          ` ${date(version.created)}, ${bytes(version.bytes)} `,
          version.current
            ? h("span", { class: "badge" }, "current")
            : h(
                "button",
                { type: "button", class: "small", onclick: () => rollBack(version, path, again) },
                "Go back to it",
              ),
        ),
      ),
    ),
  );
}

async function rollBack(version, path, again) {
  try {
    await call(`${path}/rollback`, { method: "POST", json: { digest: version.digest } });
    toast(`${version.digest.slice(0, 12)} answers from now on`);
    await again();
  } catch (error) {
    toast(error.message, "bad");
  }
}

async function remove(expert, path, close) {
  const { aliases } = expert;
  const more = aliases.length ? ` Its aliases ${aliases.join(", ")} go with it.` : "";
  const text = `“${expert.id}” answers nobody any more from then on. Answers in progress finish.${more}`;
  if (!(await confirm(`Delete ${expert.id}?`, text, "Delete"))) return;
  try {
    await call(aliases.length ? `${path}?force=true` : path, { method: "DELETE" });
    toast(`${expert.id} is deleted`);
    close();
    dispatchEvent(new Event("librarychange"));
    await load();
  } catch (error) {
    toast(error.needsRole ? `Not with this key: ${error.message}.` : error.message, "bad");
  }
}
