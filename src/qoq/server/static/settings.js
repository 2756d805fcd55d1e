// The settings beside the conversation, kept in this browser.

const KEY = "qoq.settings";
const FRACTIONS = ["temperature", "top_p", "min_p"];
const WHOLES = ["top_k", "max_tokens", "seed"];

export class Settings {
  constructor(form) {
    this.form = form;
    this.restore();
    form.addEventListener("input", () => this.changed());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => this.changed()));
    this.onmode = () => {};
  }

  get(name) {
    return this.form.elements[name].value;
  }

  get mode() {
    return this.get("mode");
  }

  set mode(value) {
    this.form.elements.mode.value = value;
    this.changed();
  }

  // Fields of a request's body; what is left empty is the server's choice.
  body() {
    const body = {};
    for (const name of [...FRACTIONS, ...WHOLES]) {
      const value = this.get(name).trim();
      if (value !== "" && Number.isFinite(Number(value))) {
        body[name] = WHOLES.includes(name) ? Math.round(Number(value)) : Number(value);
      }
    }
    if (this.get("stop")) body.stop = [this.get("stop")];
    return body;
  }

  changed() {
    const kept = Object.fromEntries(new FormData(this.form));
    delete kept.api_key;
    store(localStorage, KEY, JSON.stringify(kept));
    store(sessionStorage, `${KEY}.key`, this.get("api_key"));
    this.form.querySelector(".only-chat").hidden = this.mode === "text";
    this.onmode(this.mode);
  }

  restore() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
      kept.api_key = sessionStorage.getItem(`${KEY}.key`) ?? "";
    } catch { /* storage may be forbidden, or hold what others wrote */ }
    for (const [name, value] of Object.entries(kept ?? {})) {
      const field = this.form.elements.namedItem(name);
      if (field && "value" in field && typeof value === "string") field.value = value;
    }
    if (!this.mode) this.form.elements.mode.value = "chat";
    this.form.querySelector(".only-chat").hidden = this.mode === "text";
  }
}

function store(where, key, value) {
  try {
    where.setItem(key, value);
  } catch { /* then it is forgotten */ }
}
