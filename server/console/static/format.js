// Numbers and times as people read them.

const LANGUAGE = "en";
const whole = new Intl.NumberFormat(LANGUAGE);

export const count = (value) => whole.format(value);

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (value >= 1000 && i < units.length - 1) {
    value /= 1000;
    i += 1;
  }
  return `${i && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[i]}`;
}

/** Three significant digits, without a tail of zeros. */
export function digits(value, most = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return String(Number(Number(value).toPrecision(most)));
}

export const percent = (share) => (share === null || share === undefined ? "–" : `${digits(100 * share)} %`);

export function seconds(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return value < 1 ? `${digits(1000 * value)} ms` : `${digits(value)} s`;
}

const relative = new Intl.RelativeTimeFormat(LANGUAGE, { numeric: "auto", style: "short" });
const STEPS = [
  ["second", 60],
  ["minute", 60],
  ["hour", 24],
  ["day", 30],
  ["month", 12],
  ["year", Infinity],
];

/** How long ago, from Unix seconds. */
export function ago(then) {
  if (!then) return "–";
  let gone = Math.max(0, Date.now() / 1000 - then);
  if (gone < 5) return "just now";
  for (const [unit, size] of STEPS) {
    if (gone < size) return relative.format(-Math.round(gone), unit);
    gone /= size;
  }
  return "–";
}

export const date = (then) =>
  new Date(1000 * then).toLocaleString(LANGUAGE, { dateStyle: "medium", timeStyle: "short" });

/** `+0.8`, `−0.2`, `1`: a weight with the sign that it needs. */
export const weight = (value) => digits(value).replace("-", "−");
