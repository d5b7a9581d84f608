// The frame: views by hash, the key, the theme, shortcuts, and a word on how the server is.

import { ApiError, onKeyNeeded } from "./api.js";
import { askKey, showShortcuts } from "./dialogs.js";
import { show, h, toast } from "./dom.js";
import { load, server } from "./experts.js";
import { chatView } from "./chat.js";
import { libraryView } from "./library.js";
import { liveView } from "./live.js";
import { mapView } from "./map.js";
import { uploadView } from "./upload.js";

// Each is `{ title, start(rest), stop() }`: started when it is shown, stopped when another one is.
const views = { chat: chatView, library: libraryView, upload: uploadView, map: mapView, live: liveView };
const built = {};
let shown = null;

function navigate() {
  // "Back" with a dialog open leaves what it was about.
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  const [name, ...rest] = location.hash.slice(1).split("/");
  const view = name in views ? name : "chat";
  if (shown && shown !== view) built[shown].stop?.();
  for (const other of Object.keys(views)) {
    document.getElementById(`view-${other}`).hidden = other !== view;
    const link = document.querySelector(`nav [data-view="${other}"]`);
    if (other === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  built[view] ??= views[view](document.getElementById(`view-${view}`));
  shown = view;
  document.title = `${built[view].title} · Switchyard`;
  built[view].start?.(rest.map(decode));
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

async function connect() {
  const line = document.getElementById("server");
  try {
    const experts = await load();
    const held = experts.length === 1 ? "1 expert" : `${experts.length} experts`;
    show(
      line,
      h("span", { class: "dot good" }),
      h("span", {}, server.base),
      h("small", {}, `${held} · version ${server.version}`),
    );
  } catch (error) {
    const text = error.status === 401 ? "No API key" : error.message;
    show(line, h("span", { class: "dot bad" }), text);
    if (!(error instanceof ApiError)) throw error;
  }
}

function isTyping(target) {
  return target.closest(
    "input:not([type=range]):not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]",
  );
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") built[shown].escape?.();
  if (isTyping(event.target)) return;
  const view = Object.keys(views)[Number(event.key) - 1];
  if (view) {
    location.hash = view;
    document.querySelector(`nav [data-view="${view}"]`).focus();
  } else if (event.key === "/" && built[shown].focus) {
    event.preventDefault();
    built[shown].focus();
  } else if (event.key === "?") {
    showShortcuts();
  } else if (event.key === "t") {
    toggleTheme();
  }
}

function toggleTheme() {
  const theme = globalThis.switchyardTheme.toggle();
  toast(theme === "dark" ? "Dark" : "Light");
}

onKeyNeeded(askKey);
document.getElementById("key").addEventListener("click", () => askKey());
document.getElementById("help").addEventListener("click", showShortcuts);
document.getElementById("theme").addEventListener("click", toggleTheme);
addEventListener("keydown", onKey);
addEventListener("hashchange", navigate);
addEventListener("keychange", async () => {
  await connect();
  built[shown].stop?.();
  navigate();
});
addEventListener("librarychange", connect);
navigate();
connect();
