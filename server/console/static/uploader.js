// A file on its way, in pieces: what has arrived stays, and a lost connection is taken up where it broke.

import { ApiError, call, getJson, headers } from "./api.js";

const PIECE = 8 << 20;
const TRIES = 5;
const WAIT = 1000;

/** Send a file; `progress(bytes)` as it goes. Resolves to the id of the complete upload. Throws ApiError. */
export async function sendFile(file, progress, signal) {
  const upload = await getJson("/v1/uploads", {
    method: "POST",
    json: { filename: file.name, bytes: file.size },
    signal,
  });
  const path = `/v1/uploads/${encodeURIComponent(upload.id)}`;
  let { offset } = upload;
  let failures = 0;
  while (offset < file.size) {
    try {
      await sendPiece(path, file.slice(offset, offset + PIECE), offset, (sent) => progress(offset + sent), signal);
      offset = Math.min(file.size, offset + PIECE);
      failures = 0;
    } catch (error) {
      if (!isPassing(error) || ++failures > TRIES) {
        call(path, { method: "DELETE", quiet: true }).catch(() => {});
        throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, WAIT * failures));
      try {
        ({ offset } = await getJson(path, { quiet: true, signal }));
      } catch (lost) {
        if (!isPassing(lost)) throw lost;
      }
    }
    progress(offset);
  }
  return upload.id;
}

/** A connection that broke, a server that is busy, or a piece that arrived in part. */
function isPassing(error) {
  return error instanceof ApiError && [0, 409, 429, 502, 503, 504].includes(error.status);
}

// Not fetch: it does not tell how much of a body has been sent.
function sendPiece(path, piece, offset, progress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const abort = () => request.abort();
    request.open("PATCH", path);
    const given = headers({
      "content-type": "application/offset+octet-stream",
      "tus-resumable": "1.0.0",
      "upload-offset": offset,
    });
    for (const [name, value] of Object.entries(given)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => progress(event.loaded);
    request.onload = () => (request.status === 204 ? resolve() : reject(new ApiError(request.status, detail(request))));
    request.onerror = () => reject(new ApiError(0, {}, "the connection broke"));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    request.onloadend = () => signal.removeEventListener("abort", abort);
    signal.addEventListener("abort", abort);
    request.send(piece);
  });
}

function detail(request) {
  try {
    return JSON.parse(request.responseText).error ?? {};
  } catch {
    return {};
  }
}
