// The dashboard: what the server's metrics say of the last two minutes.

import { Chart, make } from "./chart.js";
import { duration, figure } from "./message.js";
import { byLabel, quantile, rate, total } from "./prometheus.js";

const SMOOTH = 5; // seconds over which rates are taken
const WINDOW = 15; // seconds over which latencies are judged
const percent = (value) => `${figure(100 * value)} %`;
const ms = (value) => duration(1000 * value);
const whole = (value) => Math.round(value).toLocaleString("en");

const CHARTS = [
  {
    title: "Throughput", unit: "new tokens/s", format: figure,
    series: [{ name: "generated" }, { name: "prompts read" }],
    read: ({ now, near, seconds }) => [
      rate(now, near, "generation_tokens", seconds),
      rate(now, near, "prompt_tokens", seconds),
    ],
  },
  {
    title: "Time to first token", unit: "median", format: ms,
    series: [{ name: "median" }, { name: "p99" }],
    read: ({ now, far }) => both(now, far, "time_to_first_token_seconds"),
  },
  {
    title: "Time between tokens", unit: "median", format: ms,
    series: [{ name: "median" }, { name: "p99" }],
    read: ({ now, far }) => both(now, far, "inter_token_latency_seconds"),
  },
  {
    title: "Requests", unit: "running", format: whole, least: 2,
    series: [{ name: "running" }, { name: "waiting" }],
    read: ({ now }) => [total(now, "num_requests_running"), total(now, "num_requests_waiting")],
  },
  {
    title: "KV cache in use", unit: "of its pages", format: percent, max: 1,
    series: [{ name: "in use" }],
    read: ({ now }) => [total(now, "kv_cache_usage_perc") ?? total(now, "gpu_cache_usage_perc")],
  },
  {
    title: "Prefix cache hits", unit: "of prompt tokens", format: percent, max: 1,
    series: [{ name: "now" }, { name: "since the start" }],
    read: ({ now, far, seconds }) => [
      share(rate(now, far, "prefix_cache_hits", seconds), rate(now, far, "prefix_cache_queries", seconds)),
      share(total(now, "prefix_cache_hits"), total(now, "prefix_cache_queries")),
    ],
  },
];

export class Dashboard {
  constructor() {
    this.notice = document.getElementById("notice");
    this.charts = CHARTS.map((each) => new Chart(each));
    document.getElementById("charts").append(...this.charts.map((chart) => chart.element));
    this.history = []; // {at, samples}, the last WINDOW seconds
    this.facts({}, null);
  }

  // samples: parsed metrics, or null where there are none; problem: why not.
  update(samples, problem = "") {
    this.notice.hidden = samples !== null;
    this.notice.textContent = problem;
    if (samples === null) {
      this.charts.forEach((chart) => chart.push(chart.series.map(() => null)));
      this.history = [];
      return;
    }
    const at = performance.now() / 1000;
    this.history.push({ at, samples });
    while (at - this.history[0].at > WINDOW + 0.5) this.history.shift();
    const near = this.history.find((each) => at - each.at <= SMOOTH + 0.5);
    const far = this.history[0];
    const before = near === this.history.at(-1) ? null : near;
    this.charts.forEach((chart, i) => {
      const seconds = at - (before?.at ?? at);
      chart.push(CHARTS[i].read({ now: samples, near: before?.samples, far: far.samples, seconds }));
    });
    this.totals(samples);
  }

  show() {
    this.charts.forEach((chart) => chart.draw());
  }

  // What runs: the server's card of the model, and its version.
  facts(card, version) {
    list("runs", [
      ["Model", card.id],
      ["From", card.root && card.root !== card.id ? card.root : null],
      ["Scheme", card.scheme],
      ["Device", card.isa ? `${card.device}, ${card.isa}, ${card.threads} threads` : card.device],
      ...implementations(card.ops ?? {}),
      ["Context", card.max_model_len ? `${whole(card.max_model_len)} tokens` : null],
      ["Server", [card.owned_by, version].filter(Boolean).join(" ")],
    ]);
  }

  totals(samples) {
    const cache = samples.get("cache_config_info")?.[0]?.labels ?? {};
    const ended = [...byLabel(samples, "request_success", "finished_reason")].filter(([, count]) => count);
    const rejected = total(samples, "admission_rejections");
    list("totals", [
      ["Requests ended", ended.length ? ended.map(([why, count]) => `${whole(count)} ${why}`).join(", ") : "none"],
      ["Prompt tokens", count(total(samples, "prompt_tokens"))],
      ["New tokens", count(total(samples, "generation_tokens"))],
      ["Turned away", count(rejected)],
      ["Preemptions", count(total(samples, "num_preemptions"))],
      ["Guessed tokens accepted", accepted(samples)],
      ["KV cache holds", cache.kv_cache_size_tokens ? `${whole(cache.kv_cache_size_tokens)} tokens` : null],
      ["Full-length requests at once", cache.kv_cache_max_concurrency],
    ]);
  }
}

// [what runs them, the ops], so that an op that runs slowly stands apart.
function implementations(ops) {
  const found = new Map();
  for (const [op, what] of Object.entries(ops)) {
    const name = `Run by ${what.split(" ")[0]}`;
    found.set(name, [...(found.get(name) ?? []), op]);
  }
  return [...found].map(([name, run]) => [name, run.join(", ")]);
}

const both = (now, far, stem) => [0.5, 0.99].map((q) => quantile(now, far, stem, q));
const share = (part, all) => (all > 0 && part !== null ? part / all : null);
const accepted = (samples) => { // nothing to show where nothing is guessed
  const guessed = total(samples, "spec_decode_num_draft_tokens");
  const right = total(samples, "spec_decode_num_accepted_tokens");
  return guessed > 0 ? `${percent(right / guessed)} of ${whole(guessed)}` : null;
};
const count = (value) => (value === null ? null : whole(value));

function list(id, rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  const cells = shown.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", String(value))]);
  document.getElementById(id).replaceChildren(...(cells.length ? cells : [make("dd", "", "nothing known yet")]));
}
