// Fine-tunes that the server compresses, or has compressed: what became of them, also after this page was left.

import { call, getJson } from "./api.js";
import { h, show, toast } from "./dom.js";
import { ago, bytes, percent } from "./format.js";
import { refusal } from "./notices.js";

const EVERY = 2000;
const SHOWN = 8;

export class JobList {
  constructor() {
    this.list = h("ul", { class: "jobs" });
    this.element = h("section", { class: "jobs-part", hidden: true }, h("h2", {}, "Compressed here"), this.list);
  }

  start() {
    this.stop();
    this.timer = setInterval(() => document.hidden || this.#look(true), EVERY);
    this.#look(false);
  }

  stop() {
    clearInterval(this.timer);
  }

  async #look(quiet) {
    try {
      const { data } = await getJson("/v1/jobs", { quiet });
      this.element.hidden = !data.length;
      show(
        this.list,
        data.slice(0, SHOWN).map((job) => this.#line(job)),
      );
      // Ended jobs change no more; a new one is looked for when the view is opened, or while another one runs.
      if (!data.some((job) => ["queued", "running"].includes(job.status))) this.stop();
    } catch (error) {
      this.stop();
      this.element.hidden = false;
      show(this.list, h("li", {}, refusal(error)));
    }
  }

  #line(job) {
    const { progress } = job;
    const share = progress?.total ? ` ${percent(Math.floor((100 * progress.done) / progress.total) / 100)}` : "";
    const told = job.error?.message ?? (progress ? `${progress.stage}${share}` : "");
    const lives = ["queued", "running"].includes(job.status);
    return h(
      "li",
      {},
      h("span", { class: `badge job-${job.status}` }, job.status),
      h(
        "b",
        {},
        job.expert
          ? h("a", { href: `#library/${encodeURIComponent(job.expert.id)}` }, job.expert.id)
          : (job.name ?? "unnamed"),
      ),
      h("span", { class: "quiet" }, [bytes(job.bytes), ago(job.created_at), told].filter(Boolean).join(" · ")),
      lives && h("button", { type: "button", class: "small", onclick: () => this.#cancel(job) }, "Cancel"),
    );
  }

  async #cancel(job) {
    try {
      await call(`/v1/jobs/${encodeURIComponent(job.id)}`, { method: "DELETE" });
      this.start();
    } catch (error) {
      toast(error.message, "bad");
    }
  }
}
