// What survives a reload of this tab: the conversation and its settings. Nothing outlives the tab.

export function recall(name, otherwise) {
  try {
    const text = sessionStorage.getItem(`switchyard.${name}`);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

export function keep(name, value) {
  try {
    sessionStorage.setItem(`switchyard.${name}`, JSON.stringify(value));
  } catch {
    // Full or switched off: it lasts until the page is left.
  }
}
