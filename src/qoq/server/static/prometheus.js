// Prometheus' text format, by stem: `qoq:generation_tokens_total{...} 3` is found as
// `generation_tokens`, and so are other engines' metrics of the same stem.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line.trim());
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\[n"\\]/g, (pair) => ESCAPES[pair]);
    }
    const stem = match[1].replace(/^[^:]*:/, "").replace(/_total$/, "");
    if (!samples.has(stem)) samples.set(stem, []);
    samples.get(stem).push({ labels, value: number(match[3]) });
  }
  return samples;
}

const number = (word) => (/^[+-]?Inf$/i.test(word) ? (word[0] === "-" ? -Infinity : Infinity) : Number(word));

// The sum over all labels; null where the metric is missing.
export function total(samples, stem) {
  const found = samples.get(stem);
  return found ? found.reduce((sum, sample) => sum + sample.value, 0) : null;
}

// A sum per value of one label.
export function byLabel(samples, stem, label) {
  const sums = new Map();
  for (const { labels, value } of samples.get(stem) ?? []) {
    const key = labels[label] ?? "";
    sums.set(key, (sums.get(key) ?? 0) + value);
  }
  return sums;
}

// Per second, from two snapshots `seconds` apart; null where it cannot be known (a restart, say).
export function rate(now, before, stem, seconds) {
  const [b, a] = [total(now, stem), before && total(before, stem)];
  return a === null || b === null || a === undefined || b < a || seconds <= 0 ? null : (b - a) / seconds;
}

// The value that a share `q` of the observations between two snapshots stays below; null if none.
export function quantile(now, before, stem, q) {
  const counts = byLabel(now, `${stem}_bucket`, "le");
  const earlier = before ? byLabel(before, `${stem}_bucket`, "le") : new Map();
  const buckets = [...counts]
    .map(([le, count]) => [number(le), count - (earlier.get(le) ?? 0)])
    .sort((a, b) => a[0] - b[0]);
  const all = buckets.at(-1)?.[1] ?? 0;
  if (!(all > 0)) return null;
  let [low, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= q * all) {
      // Inside a bucket values count as evenly spread; the last one has no end.
      return bound === Infinity ? low : low + (bound - low) * ((q * all - below) / (count - below || 1));
    }
    [low, below] = [bound, count];
  }
  return low;
}
