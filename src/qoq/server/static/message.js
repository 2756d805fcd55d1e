// One message on the page. Everything a model says goes in as text, never as markup.

import { make } from "./chart.js";

// Text with fenced code set apart; a fence still open counts to the end.
export function render(target, text) {
  target.replaceChildren();
  const parts = text.split(/^```[^\n]*\n?/m);
  parts.forEach((part, i) => {
    if (i % 2) {
      const block = make("pre");
      block.append(make("code", "", part.replace(/\n$/, "")));
      target.append(block);
    } else if (part) {
      target.append(document.createTextNode(parts.length > 1 ? part.replace(/\n$/, "") : part));
    }
  });
}

export function userMessage(text) {
  const element = make("article", "message user");
  element.append(make("div", "text", text));
  return element;
}

export function aside(text) {
  return make("article", "message aside", text);
}

export function failure(title, reason, again) {
  const element = make("article", "message failed");
  element.setAttribute("role", "alert");
  element.append(make("strong", "", title), make("span", "", reason));
  if (again) {
    const line = make("div");
    line.append(button("Try again", again));
    element.append(line);
  }
  return element;
}

export function button(label, action) {
  const element = make("button", "plain", label);
  element.type = "button";
  element.addEventListener("click", () => action(element));
  return element;
}

// An answer as it grows, with its speed under it.
export class Answer {
  constructor() {
    this.element = make("article", "message answer busy");
    this.body = make("div", "text");
    this.foot = make("div", "foot");
    this.element.append(this.body, this.foot);
    this.text = "";
    this.pieces = 0;
    this.usage = null;
    this.finish = null;
    this.sent = performance.now();
    this.first = this.last = null;
    this.frame = null;
    this.clock = setInterval(() => this.wait(), 500);
  }

  // A prompt may take long to read; that something happens must be seen.
  wait() {
    const seconds = Math.floor((performance.now() - this.sent) / 1000);
    if (seconds) this.foot.textContent = `reading the prompt, ${seconds} s`;
  }

  add({ text, finish, usage }) {
    if (text) {
      this.last = performance.now();
      this.first ??= this.last;
      clearInterval(this.clock);
      this.pieces += 1;
      this.text += text;
    }
    this.finish = finish ?? this.finish;
    this.usage = usage ?? this.usage;
    // Many pieces may come between two pictures of the page; it is drawn once for all of them.
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  // The answer will not come.
  drop() {
    clearInterval(this.clock);
    this.element.remove();
  }

  // reason: why it ended ("stop", "length", "stopped"); actions: buttons under a finished answer.
  end(reason, actions) {
    this.element.classList.remove("busy");
    this.finish = reason;
    clearInterval(this.clock);
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.draw();
    if (!this.text) this.body.append(make("span", "nothing", "The model said nothing."));
    this.foot.append(...actions);
  }

  draw() {
    this.frame = null;
    if (!this.pieces && this.element.classList.contains("busy")) return;
    render(this.body, this.text);
    this.foot.replaceChildren(...this.facts().map((fact) => make("span", "", fact)));
  }

  facts() {
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const facts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
    // The first token is the prompt's time; speed is that of those after it.
    const seconds = (this.last - this.first) / 1000;
    if (tokens > 1 && seconds > 0) facts.push(`${figure((tokens - 1) / seconds)} tokens/s`);
    if (this.first !== null) facts.push(`first after ${duration(this.first - this.sent)}`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (this.usage?.prompt_tokens) {
      facts.push(`${this.usage.prompt_tokens} in the prompt${cached ? `, ${cached} cached` : ""}`);
    }
    if (this.finish === "length") facts.push("cut at max tokens");
    if (this.finish === "stopped") facts.push("stopped");
    return facts;
  }
}

export const figure = (value) =>
  value >= 100 ? Math.round(value).toLocaleString("en") : value >= 10 ? value.toFixed(1) : value.toFixed(2);

export const duration = (ms) => (ms >= 1000 ? `${figure(ms / 1000)} s` : ms >= 10 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`);
