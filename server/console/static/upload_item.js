// One thing to publish: its form, its way to the server, and what became of it.

import { call, events, getJson } from "./api.js";
import { field, h, options, show } from "./dom.js";
import { load } from "./experts.js";
import { bytes, count, digits, percent } from "./format.js";
import { refusal } from "./notices.js";
import { jobFacts, measuredFacts } from "./report.js";
import { sendFile } from "./uploader.js";

const CODECS = ["t-switch", "flex-switch", "compeft", "bit-delta", "low-rank", "raw", "overwrite"];
const NAME = "[a-z0-9][a-z0-9._\\-]{0,63}";

export class UploadItem {
  constructor(kind, files, exemplars) {
    this.kind = kind;
    this.files = files;
    this.size = files.reduce((sum, file) => sum + file.size, 0);
    this.body = h("div");
    const what = kind === "expert" ? "Expert file" : "Fine-tune, to be compressed here";
    const names = files.length > 3 ? `${files.length} files` : files.map((file) => file.name).join(", ");
    this.element = h(
      "li",
      { class: "card" },
      h(
        "div",
        { class: "card-head" },
        h("h2", {}, names),
        h("span", { class: "quiet" }, `${what} · ${bytes(this.size)}`),
      ),
      this.body,
    );
    this.#form(exemplars);
  }

  #form(exemplars) {
    this.name = h("input", {
      type: "text",
      pattern: NAME,
      maxlength: 64,
      autocomplete: "off",
      spellcheck: "false",
      placeholder: this.kind === "expert" ? "as in the file" : "made up",
      title: "lower-case letters, digits, dots, dashes",
    });
    this.replace = h("input", { type: "checkbox" });
    this.exemplars = h("textarea", {
      rows: 3,
      value: exemplars.join("\n"),
      placeholder: this.kind === "expert" ? "those in the file" : "one prompt a line",
    });
    const raw =
      this.kind === "raw" &&
      h(
        "div",
        { class: "grid" },
        field(
          "Codec",
          (this.codec = h(
            "select",
            {},
            options(
              CODECS.map((name) => [name, name]),
              CODECS[0],
            ),
          )),
        ),
        field(
          "Density",
          (this.density = h("input", { type: "number", min: 0.001, max: 1, step: "any", placeholder: "default" })),
        ),
        field("Description", (this.description = h("input", { type: "text", maxlength: 2000 }))),
      );
    show(
      this.body,
      h(
        "form",
        {
          onsubmit: (event) => {
            event.preventDefault();
            this.#run();
          },
        },
        h(
          "div",
          { class: "grid" },
          field("Name", this.name),
          h("label", { class: "check" }, this.replace, "Replace what has this name"),
        ),
        raw,
        field(
          "Exemplars",
          this.exemplars,
          "Prompts the expert is for, one a line: they tell the router, and calibrate a fine-tune.",
        ),
        h(
          "div",
          { class: "row" },
          h("button", { type: "submit", class: "primary" }, "Publish"),
          h("button", { type: "button", onclick: () => this.element.remove() }, "Leave it"),
        ),
      ),
    );
  }

  async #run() {
    const said = this.#said();
    this.abort = new AbortController();
    this.#progress();
    try {
      const ids = [];
      let before = 0;
      for (const file of this.files) {
        ids.push(
          await sendFile(
            file,
            (sent) => this.#tell(`Sending ${file.name}`, before + sent, this.size),
            this.abort.signal,
          ),
        );
        before += file.size;
      }
      if (this.kind === "expert") await this.#publish(ids[0], said);
      else await this.#compress(ids, said);
      dispatchEvent(new Event("librarychange"));
    } catch (error) {
      this.#failed(error);
    }
  }

  /** What was typed, as both APIs call it. */
  #said() {
    const exemplars = this.exemplars.value
      .split("\n")
      .map((line) => line.trim())
      .filter(Boolean);
    const raw = this.kind === "raw" && {
      codec: this.codec.value,
      ...(this.density.value && { density: Number(this.density.value) }),
      ...(this.description.value && { description: this.description.value }),
    };
    return {
      name: this.name.value,
      replace: this.replace.checked,
      more: { ...(exemplars.length && { exemplars }), ...raw },
    };
  }

  async #publish(upload, { name, replace, more }) {
    this.#tell("Checking and publishing", null);
    const expert =
      name && replace
        ? await getJson(`/v1/experts/${encodeURIComponent(name)}`, { method: "PUT", json: { upload, ...more } })
        : await getJson("/v1/experts", { method: "POST", json: { upload, ...(name && { name }), ...more } });
    this.#done(expert.id, [
      ["Size", bytes(expert.bytes)],
      ["Bits per parameter", digits(expert.bits_per_param)],
      ["Codec", expert.codec],
      ["Density", digits(expert.density)],
      ["Exemplars", count(expert.exemplar_count)],
      ["Routing", expert.routing],
    ]);
  }

  async #compress(uploads, { name, replace, more }) {
    this.#tell("Waiting for its turn", null);
    let job = await getJson("/v1/jobs", { method: "POST", json: { uploads, ...(name && { name, replace }), ...more } });
    const path = `/v1/jobs/${encodeURIComponent(job.id)}`;
    dispatchEvent(new Event("jobsent"));
    this.abort.signal.addEventListener("abort", () => call(path, { method: "DELETE", quiet: true }).catch(() => {}));
    for await (job of events(await call(`${path}/events`))) {
      const { progress } = job;
      if (progress) this.#tell(`Compressing: ${progress.stage}`, progress.done, progress.total);
    }
    if (job.status !== "succeeded") throw new Error(job.error?.message || `the job is ${job.status}`);
    this.#done(job.expert.id, jobReport(job.report));
  }

  #progress() {
    this.stage = h("span", {}, "");
    this.share = h("span", { class: "number" }, "");
    this.bar = h("progress", { max: 1, "aria-label": "Progress" });
    show(
      this.body,
      h("div", { class: "beside" }, this.stage, this.share),
      this.bar,
      h("button", { type: "button", class: "small", onclick: () => this.abort.abort() }, "Cancel"),
    );
  }

  #tell(stage, done, total) {
    this.stage.textContent = stage;
    if (done === null) this.bar.removeAttribute("value");
    else this.bar.value = total ? done / total : 0;
    this.share.textContent = done === null || !total ? "" : percent(Math.floor((100 * done) / total) / 100);
  }

  #failed(error) {
    const stopped = error.name === "AbortError";
    const again = h(
      "button",
      { type: "button", class: "small", onclick: () => this.#form(this.exemplars.value.split("\n")) },
      "Try again",
    );
    show(this.body, stopped ? h("p", { class: "quiet" }, "Stopped; nothing was published.") : refusal(error), again);
  }

  #done(name, facts) {
    load({ quiet: true }).catch(() => {});
    show(
      this.body,
      h("p", { class: "notice good", role: "status" }, `${name} is live.`),
      h(
        "dl",
        { class: "facts" },
        facts.map(([what, value]) => h("div", {}, h("dt", {}, what), h("dd", {}, value))),
      ),
      h(
        "div",
        { class: "row" },
        h("a", { class: "button primary", href: `#chat/${encodeURIComponent(name)}` }, "Chat with it"),
        h("a", { class: "button", href: `#library/${encodeURIComponent(name)}` }, "Open it in the library"),
      ),
    );
  }
}

/** What compressing cost and kept, as a job tells it. */
function jobReport(report) {
  return [
    ["Size", bytes(report.bytes)],
    ["Bits per parameter", digits(report.bits_per_param)],
    ["Smaller than bf16", `${digits(report.times_smaller)} ×`],
    ["Density", digits(report.density)],
    ["Parameters changed", percent(report.changed)],
    ["Codec", report.codec],
    ["Knob", report.knob],
    ["Retention", report.retention !== undefined && percent(report.retention)],
    ...measuredFacts(report),
    ...jobFacts(report),
    ["Took", `${digits(report.seconds)} s`],
  ].filter(([, value]) => value);
}
