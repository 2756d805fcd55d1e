// The page put together: views, theme, the server's state once a second.

import { ApiError, getJson, getText } from "./api.js";
import { Chat } from "./chat.js";
import { Dashboard } from "./dashboard.js";
import { parse, total } from "./prometheus.js";
import { Settings } from "./settings.js";

const PERIOD = 1000; // ms between looks at the metrics
const RETRY = 10; // looks between tries to learn what runs, while that is not known
const byId = (id) => document.getElementById(id);
const key = () => settings.get("api_key");

const settings = new Settings(byId("params"));
const models = byId("model");
const chat = new Chat(settings, () => models.value);
const dashboard = new Dashboard();
let cards = [];
let version = null;
let looks = 0;

async function learn() {
  try {
    const list = await getJson("v1/models", key());
    cards = (list.data ?? []).filter((card) => card && typeof card.id === "string");
  } catch (error) {
    cards = [];
    byId("empty-note").textContent = error.status === 401 ? "The server wants an API key; it goes into the settings." : error.message;
    return;
  }
  version = await getJson("version", key()).then((body) => body.version, () => null);
  const chosen = models.value;
  models.replaceChildren(...cards.map((card) => new Option(card.id, card.id)));
  if (cards.some((card) => card.id === chosen)) models.value = chosen;
  models.disabled = cards.length < 2;
  describe();
}

function describe() {
  const card = cards.find((each) => each.id === models.value) ?? {};
  dashboard.facts(card, version);
  const facts = [card.id, card.scheme, card.max_model_len && `${card.max_model_len.toLocaleString("en")} tokens of context`];
  byId("empty-note").textContent = facts.filter(Boolean).join(" · ");
  models.title = [card.id, card.scheme].filter(Boolean).join(", ");
  document.title = card.id ? `${card.id} · qoq` : "qoq";
}

function status(state, text) {
  byId("status").dataset.state = state;
  byId("status").lastElementChild.textContent = text;
  byId("status").title = text;
}

async function look() {
  if (document.hidden) return;
  try {
    const samples = parse(await getText("metrics", key()));
    const running = total(samples, "num_requests_running") ?? 0;
    status(running ? "busy" : "good", running ? `${running} running` : "ready");
    dashboard.update(samples);
  } catch (error) {
    const away = !(error instanceof ApiError) || error.status === 0;
    status(away ? "bad" : "good", away ? "not reachable" : "ready");
    dashboard.update(null, away ? "The server cannot be reached; trying again every second." : `This server shows no metrics: ${error.message}`);
  }
  if (!cards.length && looks % RETRY === 0) await learn();
  looks += 1;
}

async function watch() {
  for (;;) {
    const begun = performance.now();
    await look();
    await new Promise((resolve) => setTimeout(resolve, Math.max(50, PERIOD - (performance.now() - begun))));
  }
}

const tabs = ["chat", "dashboard"];
function view(name) {
  for (const each of tabs) {
    byId(`view-${each}`).hidden = each !== name;
    byId(`tab-${each}`).setAttribute("aria-selected", String(each === name));
    byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  if (name === "dashboard") dashboard.show();
}
const shown = () => (tabs.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");
for (const each of tabs) {
  byId(`tab-${each}`).addEventListener("click", () => (location.hash = each));
  byId(`tab-${each}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs.find((name) => name !== each);
    location.hash = other;
    byId(`tab-${other}`).focus();
  });
}
addEventListener("hashchange", () => view(shown()));

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  dashboard.show(); // the charts take their colours from the page
}
byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme;
  const dark = now ? now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const next = dark ? "light" : "dark";
  try {
    localStorage.setItem("qoq.theme", next);
  } catch { /* then it is forgotten */ }
  theme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dashboard.show());

const panel = (open) => byId("panel").classList.toggle("open", open);
byId("open-panel").addEventListener("click", () => panel(true));
byId("close-panel").addEventListener("click", () => panel(false));
byId("backdrop").addEventListener("click", () => panel(false));
models.addEventListener("change", describe);
byId("params").elements.api_key.addEventListener("change", learn);

try {
  theme(localStorage.getItem("qoq.theme"));
} catch { /* then as the system likes it */ }
view(shown());
watch();
