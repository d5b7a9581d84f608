// What kind of file somebody has dropped: read from its first bytes, here, before anything is sent.

const MOST_HEADER = 64 << 20;

const PARTS = /^(adapter_config\.json|model\.safetensors\.index\.json)$/;

/** `expert`, `weights`, `part` (says how weights belong together), `exemplars`, or `other`: not for the server. */
export async function kindOf(file) {
  if (/\.(jsonl|txt)$/i.test(file.name)) return "exemplars";
  if (!/\.safetensors$/i.test(file.name)) return PARTS.test(file.name) ? "part" : "other";
  const length = new DataView(await file.slice(0, 8).arrayBuffer());
  if (length.byteLength < 8) return "weights";
  const size = Number(length.getBigUint64(0, true));
  if (size > Math.min(MOST_HEADER, file.size - 8)) return "weights";
  try {
    const header = JSON.parse(await file.slice(8, 8 + size).text());
    return header.__metadata__?.switchyard ? "expert" : "weights";
  } catch {
    return "weights"; // damaged: the server will say how
  }
}

/** Prompts out of a file of JSON lines (`{"prompt": …}`) or of plain lines. */
export async function readExemplars(file) {
  const lines = (await file.text())
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
  if (!/\.jsonl$/i.test(file.name)) return lines;
  return lines.map((line, i) => {
    try {
      const { prompt } = JSON.parse(line);
      if (typeof prompt === "string") return prompt;
    } catch {
      // told below
    }
    throw new Error(`${file.name}, line ${i + 1}: not {"prompt": "…"}`);
  });
}
