// Dialogs: modal, closed by Escape, the focus back where it was.

import { key } from "./api.js";
import { field, h } from "./dom.js";

let opened = 0;

/** Open a dialog; `build(close)` gives its content. Resolves to what `close` is given, null if it is dismissed. */
export function open(title, build, { wide = false } = {}) {
  return new Promise((resolve) => {
    let answer = null;
    const before = document.activeElement;
    const id = `dialog-${++opened}`; // one may be opened over another
    const dialog = h("dialog", { class: wide ? "wide" : "", "aria-labelledby": id });
    const close = (value) => {
      answer = value;
      dialog.close();
    };
    const dismiss = h(
      "button",
      { type: "button", class: "plain", "aria-label": "Close", onclick: () => close(null) },
      "✕",
    );
    dialog.append(h("div", { class: "dialog-head" }, h("h2", { id }, title), dismiss), build(close));
    dialog.addEventListener("close", () => {
      dialog.remove();
      if (before?.isConnected) before.focus();
      resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
    dialog.querySelector("[autofocus]")?.focus();
  });
}

/** Ask before something that cannot be undone; resolves to true only where the button was pressed. */
export async function confirm(title, text, action) {
  const answer = await open(title, (close) =>
    h(
      "div",
      {},
      h("p", {}, text),
      h(
        "div",
        { class: "row end" },
        h("button", { type: "button", autofocus: true, onclick: () => close(false) }, "Cancel"),
        h("button", { type: "button", class: "danger", onclick: () => close(true) }, action),
      ),
    ),
  );
  return answer === true;
}

let asking = null;

/** Ask for an API key; several requests that need one share the dialog. Resolves to whether there is one now. */
export function askKey(message = "") {
  asking ??= openKey(message).finally(() => (asking = null));
  return asking;
}

async function openKey(message) {
  const input = h("input", {
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    autofocus: true,
    required: true,
    placeholder: "sy_…",
  });
  const given = await open("API key", (close) =>
    h(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          close(input.value.trim());
        },
      },
      message && h("p", { class: "notice bad", role: "alert" }, message),
      h(
        "p",
        {},
        "This server asks for a key. It stays in this tab, until the tab is closed, and is sent to this server only.",
      ),
      field("Key", input),
      h(
        "div",
        { class: "row end" },
        key.get() && h("button", { type: "button", onclick: () => close("") }, "Forget the key"),
        h("button", { type: "submit", class: "primary" }, "Use this key"),
      ),
    ),
  );
  if (given === null) return false;
  key.set(given);
  dispatchEvent(new Event("keychange"));
  return given !== "";
}

const SHORTCUTS = [
  ["1 … 5", "Chat, Library, Upload, Router map, Live"],
  ["/", "To the message, or to the search"],
  ["Enter", "Send; Shift+Enter begins a new line"],
  ["Esc", "Stop the answer, close a dialog"],
  ["t", "Light or dark"],
  ["?", "This list"],
];

export function showShortcuts() {
  return open("Keyboard shortcuts", () =>
    h(
      "dl",
      { class: "keys" },
      SHORTCUTS.map(([keys, what]) => [h("dt", {}, h("kbd", {}, keys)), h("dd", {}, what)]),
    ),
  );
}
