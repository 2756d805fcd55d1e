// The chat playground: a conversation with the model, streamed.

import { ApiError, stream } from "./api.js";
import { Answer, aside, button, failure, userMessage } from "./message.js";

const STARTERS = {
  chat: ["Explain in two sentences why the sky is blue.", "Write a haiku about small numbers.", "What can you help me with?"],
  text: ["It was a dark and", "Once upon a time", "The first rule of arithmetic is"],
};
const WORDS = {
  chat: { title: "What shall we talk about?", placeholder: "Write a message" },
  text: { title: "Begin a text, the model goes on", placeholder: "Write the beginning of a text" },
};

const TITLES = [[500, "The server failed"], [400, "The server refuses this"], [0, "No answer"]];

export class Chat {
  // model(): the name to ask for.
  constructor(settings, model) {
    this.settings = settings;
    this.model = model;
    this.said = []; // {role, content}
    this.running = null; // what stops the answer that is streaming
    for (const id of ["scroll", "empty", "messages", "composer", "input", "send", "stop", "chips", "new-chat"]) {
      this[id.replace("-chat", "")] = document.getElementById(id);
    }
    this.composer.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit(this.input.value);
    });
    this.input.addEventListener("input", () => this.fit());
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.submit(this.input.value);
      }
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.running?.abort());
    this.stop.addEventListener("click", () => this.running?.abort());
    this.new.addEventListener("click", () => this.clear());
    settings.onmode = (mode) => this.show(mode);
    this.show(settings.mode);
    this.fit();
  }

  show(mode) {
    const words = WORDS[mode] ?? WORDS.chat;
    this.empty.querySelector("h1").textContent = words.title;
    this.input.placeholder = words.placeholder;
    this.chips.replaceChildren(
      ...STARTERS[mode in WORDS ? mode : "chat"].map((text) => button(text, () => this.submit(text))),
    );
  }

  // The input as high as its text, the buttons as the moment wants them.
  fit() {
    this.input.style.height = "auto";
    this.input.style.height = `${this.input.scrollHeight}px`;
    this.send.disabled = !this.input.value.trim();
    this.send.hidden = this.running !== null;
    this.stop.hidden = this.running === null;
    this.new.disabled = !this.messages.childElementCount;
    this.empty.hidden = this.messages.childElementCount > 0;
  }

  clear() {
    this.running?.abort();
    this.said = [];
    this.messages.replaceChildren();
    this.fit();
    this.input.focus();
  }

  submit(text) {
    if (!text.trim() || this.running) return;
    this.said.push({ role: "user", content: text });
    this.messages.append(userMessage(text));
    this.input.value = "";
    this.answer();
  }

  async answer() {
    const stopper = new AbortController();
    this.running = stopper;
    const answer = new Answer();
    this.messages.append(answer.element);
    this.fit();
    this.follow(true);
    let problem = null;
    let fallback = false;
    try {
      const [path, body] = this.request();
      for await (const piece of stream(path, body, this.settings.get("api_key"), stopper.signal)) {
        const below = this.atEnd();
        answer.add(piece);
        if (below) requestAnimationFrame(() => this.follow(true));
      }
    } catch (error) {
      if (error.name !== "AbortError") problem = error instanceof ApiError ? error : new ApiError(String(error), 0);
      fallback = problem !== null && !answer.pieces && this.settings.mode === "chat" && lacksTemplate(problem);
    }
    if (this.running === stopper) this.running = null;
    if (!answer.element.isConnected) return answer.drop(); // the conversation was cleared meanwhile
    if (fallback) {
      answer.drop();
      this.settings.mode = "text";
      this.messages.append(aside("This model has no chat template, so it continues your text instead."));
      return this.answer();
    }
    return this.finish(answer, stopper.signal.aborted, problem);
  }

  finish(answer, stopped, problem) {
    const below = this.atEnd();
    if (answer.text) this.said.push({ role: "assistant", content: answer.text });
    if (problem && !answer.pieces) answer.drop();
    else answer.end(stopped ? "stopped" : answer.finish, this.actions(answer));
    if (problem) {
      const title = TITLES.find(([least]) => problem.status >= least)[1];
      const card = failure(title, problem.message, () => {
        card.remove();
        answer.element.remove();
        this.dropAnswer();
        this.answer();
      });
      this.messages.append(card);
    }
    this.fit();
    if (below || problem) this.follow(true);
  }

  actions(answer) {
    const copy = button("Copy", async (self) => {
      try {
        await navigator.clipboard.writeText(answer.text);
        self.textContent = "Copied";
      } catch {
        self.textContent = "Copying is not allowed";
      }
      setTimeout(() => (self.textContent = "Copy"), 1500);
    });
    const again = button("Again", () => {
      // Only the last answer can be asked for again: what follows hangs on the others.
      if (this.running || this.messages.lastElementChild !== answer.element) return;
      answer.element.remove();
      this.dropAnswer();
      this.answer();
    });
    this.messages.querySelectorAll("[data-again]").forEach((old) => old.remove());
    again.dataset.again = "";
    return [copy, again];
  }

  dropAnswer() {
    if (this.said.at(-1)?.role === "assistant") this.said.pop();
  }

  request() {
    const body = { model: this.model(), ...this.settings.body() };
    if (this.settings.mode === "text") {
      // One text in turns: an answer follows its prompt at once, new text begins a line.
      const turns = this.said.map(({ role, content }, i) => (role === "user" && i ? `\n${content}` : content));
      return ["v1/completions", { ...body, prompt: turns.join("") }];
    }
    const system = this.settings.get("system").trim();
    const first = system ? [{ role: "system", content: system }] : [];
    return ["v1/chat/completions", { ...body, messages: [...first, ...this.said] }];
  }

  atEnd() {
    return this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < 60;
  }

  follow(wanted) {
    if (wanted) this.scroll.scrollTop = this.scroll.scrollHeight;
  }
}

const lacksTemplate = (error) => [400, 404, 501].includes(error.status) && /chat.?template|chat\/completions/i.test(error.message);
