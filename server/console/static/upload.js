// Upload: drop expert files or a raw fine-tune, look at what they are, publish, read the report.

import { h, show, toast } from "./dom.js";
import { JobList } from "./jobs.js";
import { UploadItem } from "./upload_item.js";
import { kindOf, readExemplars } from "./safetensors.js";

export function uploadView(root) {
  const view = new Upload(root);
  return {
    title: "Upload",
    start: () => view.jobs.start(),
    stop: () => view.jobs.stop(),
    focus: () => view.choose.focus(),
  };
}

class Upload {
  constructor(root) {
    this.files = h("input", {
      type: "file",
      multiple: true,
      id: "files",
      class: "hidden",
      tabindex: "-1",
      "aria-label": "Files",
      onchange: () => this.#chosen(this.files),
    });
    this.folder = h("input", {
      type: "file",
      webkitdirectory: true,
      id: "folder",
      class: "hidden",
      tabindex: "-1",
      "aria-label": "Folder",
      onchange: () => this.#chosen(this.folder),
    });
    this.choose = h("button", { type: "button", class: "primary", onclick: () => this.files.click() }, "Choose files");
    this.zone = h(
      "div",
      { class: "dropzone", id: "dropzone" },
      h("p", { class: "big" }, "Drop files here"),
      h(
        "p",
        { class: "quiet" },
        "An expert file (.safetensors) is live when its upload ends. The files of a checkpoint or of a LoRA adapter ",
        "are compressed here first. Prompts in a .jsonl or .txt file become exemplars.",
      ),
      h(
        "div",
        { class: "row" },
        this.choose,
        h("button", { type: "button", onclick: () => this.folder.click() }, "Choose a folder"),
      ),
      this.files,
      this.folder,
    );
    this.items = h("ul", { class: "uploads", "aria-label": "Uploads" });
    this.jobs = new JobList();
    show(
      root,
      h("div", { class: "view-head" }, h("h1", { id: "title-upload" }, "Upload")),
      this.zone,
      this.items,
      this.jobs.element,
    );
    addEventListener("jobsent", () => this.jobs.start());
    this.#watch();
  }

  #watch() {
    const { zone } = this;
    for (const kind of ["dragenter", "dragover"]) {
      zone.addEventListener(kind, (event) => {
        event.preventDefault();
        zone.classList.add("over");
      });
    }
    zone.addEventListener("dragleave", (event) => zone.contains(event.relatedTarget) || zone.classList.remove("over"));
    zone.addEventListener("drop", async (event) => {
      event.preventDefault();
      zone.classList.remove("over");
      await this.#take(await dropped(event.dataTransfer));
    });
    // A file that misses the zone must not replace the page.
    for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
  }

  async #chosen(input) {
    const files = [...input.files];
    input.value = "";
    await this.#take(files);
  }

  /** Sort files into what they will become: each expert file by itself, all others one fine-tune. */
  async #take(files) {
    const kinds = { expert: [], weights: [], part: [], exemplars: [], other: [] };
    for (const file of files.filter((one) => one.size > 0)) kinds[await kindOf(file)].push(file);
    let exemplars;
    try {
      exemplars = (await Promise.all(kinds.exemplars.map(readExemplars))).flat();
    } catch (error) {
      toast(error.message, "bad");
      return;
    }
    for (const file of kinds.expert) this.#add("expert", [file], exemplars);
    if (kinds.weights.length) this.#add("raw", [...kinds.weights, ...kinds.part], exemplars);
    else if (!kinds.expert.length)
      toast("No weights are among them: an expert or a fine-tune is a .safetensors file.", "bad");
  }

  #add(kind, files, exemplars) {
    const item = new UploadItem(kind, files, exemplars);
    this.items.prepend(item.element);
    item.element.querySelector("input")?.focus();
  }
}

/** The files of a drop, those in its folders too. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  return (await Promise.all(entries.map(inside))).flat();
}

async function inside(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    // A browser gives a hundred at a time.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return (await Promise.all(found.map(inside))).flat();
    found.push(...some);
  }
}
