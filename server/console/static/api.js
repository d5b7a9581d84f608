// How the console talks to the server. The API key lives in this tab's sessionStorage and goes to this server only.

const KEY = "switchyard.key";

/** An answer that is not a success, in the server's own words. */
export class ApiError extends Error {
  constructor(status, detail = {}, fallback = "") {
    super(detail.message || fallback || `the server answered ${status}`);
    this.status = status;
    this.code = detail.code ?? null;
    this.param = detail.param ?? null;
  }

  /** Whether a key with another role would do. */
  get needsRole() {
    return this.status === 403 && this.code === "insufficient_role";
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

let askForKey = async () => false;

/** Tell how to ask for a key: `ask(message)` resolves to whether there is another one now. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** The headers that every request needs. */
export function headers(extra = {}) {
  return key.get() ? { ...extra, authorization: `Bearer ${key.get()}` } : extra;
}

/**
 * Ask the server. A refused key is asked for once more, unless `quiet`: what a timer asks must not open a dialog.
 * Throws ApiError, or the DOMException of an abort.
 */
export async function call(path, { method = "GET", json, signal, quiet = false } = {}) {
  const given = json === undefined ? {} : { "content-type": "application/json" };
  const body = json === undefined ? undefined : JSON.stringify(json);
  for (;;) {
    const used = key.get();
    const response = await send(path, { method, headers: headers(given), body, signal });
    if (response.ok) return response;
    const error = await failure(response);
    if (error.status !== 401 || quiet) throw error;
    // Another request may have been given a key while this one was under way.
    if (key.get() === used && !(await askForKey(used ? error.message : ""))) throw error;
  }
}

async function send(path, init) {
  try {
    return await fetch(path, { ...init, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, {}, "the server cannot be reached");
  }
}

/** The error of an answer. */
export async function failure(response) {
  let detail = {};
  try {
    detail = (await response.json()).error ?? {};
  } catch {
    // Something between here and the server has answered; the status has to do.
  }
  return new ApiError(response.status, detail);
}

export async function getJson(path, how = {}) {
  return (await call(path, how)).json();
}

export async function getText(path, how = {}) {
  return (await call(path, how)).text();
}

/** The events of a stream of server-sent events, parsed; ends at `[DONE]`. Throws ApiError at an error event. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, {}, "the stream broke off");
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.startsWith("data: ") ? block.slice(6) : "";
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        // A job's `error` is a part of it; a chunk's is the end of the answer.
        if (event.error && event.object !== "job") throw new ApiError(response.status, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
