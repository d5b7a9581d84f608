// Light or dark: what the system says, unless the reader has chosen. A classic script: see index.html.
(() => {
  "use strict";
  const KEEP = "switchyard.theme";
  const system = matchMedia("(prefers-color-scheme: dark)");

  function chosen() {
    try {
      return localStorage.getItem(KEEP);
    } catch {
      return null; // storage is switched off: the system's colours then
    }
  }

  function apply(theme) {
    document.documentElement.dataset.theme = theme;
    dispatchEvent(new CustomEvent("themechange", { detail: theme }));
  }

  const current = () => chosen() ?? (system.matches ? "dark" : "light");

  globalThis.switchyardTheme = {
    current,
    toggle() {
      const next = current() === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(KEEP, next);
      } catch {
        // not kept then
      }
      apply(next);
      return next;
    },
  };
  system.addEventListener("change", () => apply(current()));
  apply(current());
})();
