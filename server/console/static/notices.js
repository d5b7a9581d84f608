// What is shown in place of what cannot be shown.

import { askKey } from "./dialogs.js";
import { h } from "./dom.js";

/** An error in a view: which role is missing and how to get further, or the server's own words. */
export function refusal(error) {
  if (error.needsRole || error.status === 401) {
    return h(
      "div",
      { class: "notice", role: "note" },
      h("p", {}, error.needsRole ? `Not with this key: ${error.message}.` : "This needs an API key."),
      h("button", { type: "button", class: "small", onclick: () => askKey() }, "Use another key"),
    );
  }
  return h("p", { class: "notice bad", role: "alert" }, error.message);
}
