// One column: a model, its settings, what it says, and how fast.

import { Answer, make, tellTokens } from "./answer.js";
import { curl, read, stream } from "./client.js";
import { Clock } from "./clock.js";

export const FIELDS = ["model", "temperature", "top_p", "top_k", "max_tokens", "seed", "stop"];
const ALTERNATIVES = 5;
const MAX_TOKENS = 128;
const ROUTES = { complete: "v1/completions", chat: "v1/chat/completions" };
const UNSAID = { temperature: 1, top_p: 1, top_k: "all" };
const ENDS = { stop: "ended by the model", length: "length limit", deadline: "out of time" };

export class Panel {
  #abort = null;
  #messages = [];
  #cards = [];
  failure = null;

  constructor(name, changed) {
    this.element = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.element.ariaLabel = `Column ${name}`;
    this.log = this.element.querySelector(".log");
    this.log.ariaLabel = `Answer ${name}; arrow keys go through its tokens`;
    this.error = this.element.querySelector(".error");
    this.select = this.field("model");
    this.clock = new Clock(this.element);
    this.element.querySelector("details").open = innerWidth > 760 && innerHeight > 560;
    this.element.addEventListener("input", () => { this.#sum(); changed(); });
    tellTokens(this.log);
    this.#sum();
  }

  field(name) {
    return this.element.querySelector(`[name=${name}]`);
  }

  // -- settings -------------------------------------------------------------------------------------------------------

  get settings() {
    return Object.fromEntries(FIELDS.map((name) => [name, this.field(name).value]));
  }

  set settings(values) {
    if (values.model) this.#offer(values.model);
    for (const name of FIELDS) if (values[name] || name !== "model") this.field(name).value = values[name];
    this.#sum();
  }

  /** A name that a link brought stays, though there is no such model: the server says so. */
  #offer(name, words = name) {
    const there = [...this.select.options].find((option) => option.value === name);
    if (there) there.textContent = words;
    else this.select.append(new Option(words, name));
  }

  set models(cards) {
    for (const { id, parent } of cards) this.#offer(id, parent ? `${id} (adapter of ${parent})` : id);
    this.#cards = cards;
    this.#sum();
  }

  /** The settings in words, for when they are folded away; and in empty fields what the model's makers advise. */
  #sum() {
    const advised = this.#cards.find(({ id }) => id === this.select.value)?.sampling ?? {};
    for (const name in UNSAID) this.field(name).placeholder = advised[name] ?? UNSAID[name];
    const told = FIELDS.slice(1).filter((name) => this.field(name).value);
    const words = told.map((name) => `${name} ${this.field(name).value.replaceAll("\n", " | ")}`);
    this.element.querySelector("summary span").textContent = words.length ? `: ${words.join(", ")}` : "";
  }

  /** The request's body, without what only this page wants. */
  body({ mode, prompt, system }) {
    const body = { model: this.select.value };
    if (mode === "chat") {
      const first = system ? [{ role: "system", content: system }] : [];
      body.messages = [...first, ...this.#messages, { role: "user", content: prompt }];
    } else {
      body.prompt = prompt;
    }
    for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
      const field = this.field(name);
      if (field.validity.badInput) throw new Error(`${field.labels[0].textContent.trim()} is not a number.`);
      if (field.value !== "") body[name] = Number(field.value);
    }
    body.max_tokens ??= MAX_TOKENS;
    const stops = this.field("stop").value.split("\n").filter(Boolean);
    if (stops.length) body.stop = stops.map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
    return body;
  }

  curl(task) {
    return curl(ROUTES[task.mode], this.body(task));
  }

  // -- asking ---------------------------------------------------------------------------------------------------------

  get running() {
    return this.#abort !== null;
  }

  stop() {
    this.#abort?.abort();
  }

  /** Ask, and show the answer as it comes. Returns the error, where there is one. */
  async run(task) {
    this.#abort = new AbortController();
    this.fail(null);
    this.clock.start();
    const { answer, turn } = this.#begin(task);
    let words = "stopped", counted = null, failed = null;
    try {
      const told = task.mode === "chat" ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
      const asked = { ...this.body(task), ...told, stream: true, stream_options: { include_usage: true } };
      for await (const event of stream(ROUTES[task.mode], asked, this.#abort.signal)) {
        const { text, tokens, finish, stoppedBy, usage } = read(event);
        const low = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
        answer.add(text, tokens);
        if (low) this.log.scrollTop = this.log.scrollHeight;
        this.clock.count(tokens.length);
        counted = usage ?? counted;
        if (finish) words = stoppedBy ? `stop text ${JSON.stringify(stoppedBy)}` : ENDS[finish] ?? finish;
      }
    } catch (error) {
      if (error.name !== "AbortError") failed = error;
    }
    answer.close();
    this.clock.stop(failed ? "failed" : words, counted);
    this.fail(failed);
    if (!answer.element.textContent && words === "stopped") turn.remove();
    else if (task.mode === "chat") {
      this.#messages.push({ role: "user", content: task.prompt }, { role: "assistant", content: answer.text });
    }
    this.#abort = null;
    return failed;
  }

  fail(error) {
    this.failure = error;
    this.error.hidden = !error;
    this.error.textContent = error?.message ?? "";
    if (error) this.error.scrollIntoView({ block: "nearest" });
  }

  /** Where the answer goes: behind the prompt, or under the chat so far. */
  #begin({ mode, prompt }) {
    const turn = make("div", "turn");
    if (mode === "chat") {
      turn.append(make("h3", "", "You"), make("p", "said", prompt), make("h3", "", this.select.value));
      const place = turn.appendChild(make("p", "said"));
      this.log.append(turn);
      this.log.scrollTop = this.log.scrollHeight;
      return { turn, answer: new Answer(place) };
    }
    turn.append(make("span", "prompt", prompt));
    this.log.replaceChildren(turn);
    return { turn, answer: new Answer(turn) };
  }

  clear() {
    this.#messages = [];
    this.log.replaceChildren();
    this.fail(null);
    this.clock.clear();
  }

  /** Take over another column's settings and chat. */
  adopt(other) {
    for (const option of other.select.options) this.#offer(option.value, option.textContent);
    this.#cards = other.#cards;
    this.settings = other.settings;
    this.#messages = [...other.#messages];
    this.log.replaceChildren(...other.log.cloneNode(true).childNodes);
    const spans = other.log.querySelectorAll(".token");
    this.log.querySelectorAll(".token").forEach((span, at) => { span.tokens = spans[at].tokens; });
  }
}
