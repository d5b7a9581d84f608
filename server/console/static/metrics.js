// Prometheus text into series, and series into what people want to know: rates, quantiles, shares.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** `Map(name → [{ labels, value }])`. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (!match) continue;
    const [, name, inside = "", value] = match;
    const labels = Object.fromEntries([...inside.matchAll(LABEL)].map(([, key, one]) => [key, unescaped(one)]));
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels, value: Number(value.replace("Inf", "Infinity")) });
  }
  return found;
}

const unescaped = (text) => text.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));

/** The sum of a series over all labels that match. */
export function sum(sample, name, match = {}) {
  const series = sample.get(name) ?? [];
  return series
    .filter(({ labels }) => Object.entries(match).every(([key, value]) => labels[key] === value))
    .reduce((total, { value }) => total + value, 0);
}

/** Growth per second of a counter between two samples; null where the server has started anew. */
export function rate(before, now, seconds, name, match) {
  const grown = sum(now, name, match) - sum(before, name, match);
  return grown < 0 || seconds <= 0 ? null : grown / seconds;
}

/** A quantile of what a histogram has seen between two samples, by linear interpolation; null if it saw nothing. */
export function quantile(before, now, name, q) {
  const buckets = (now.get(`${name}_bucket`) ?? [])
    .map(({ labels, value }) => {
      const edge = labels.le === "+Inf" ? Infinity : Number(labels.le);
      return { edge, seen: value - sum(before, `${name}_bucket`, { le: labels.le }) };
    })
    .sort((one, other) => one.edge - other.edge);
  const total = buckets.at(-1)?.seen ?? 0;
  if (total <= 0) return null;
  const wanted = q * total;
  let [below, edge] = [0, 0];
  for (const bucket of buckets) {
    if (bucket.seen >= wanted) {
      if (bucket.edge === Infinity) return edge;
      return edge + ((bucket.edge - edge) * (wanted - below)) / Math.max(bucket.seen - below, 1e-9);
    }
    [below, edge] = [bucket.seen, bucket.edge];
  }
  return edge;
}

/** Every value of a label. */
export function labels(sample, name, label) {
  return (sample.get(name) ?? []).map((one) => one.labels[label]);
}
