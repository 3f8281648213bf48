// The figures under an answer, measured in the page: the way through the network is in them.

export class Clock {
  #panel;

  constructor(panel) {
    this.#panel = panel;
  }

  clear() {
    for (const name of ["first", "speed", "tokens", "total"]) this.#tell(name, "–");
    this.#tell("state", "idle");
  }

  start() {
    this.clear();
    this.#tell("state", "waiting");
    this.begin = this.last = performance.now();
    this.tokens = this.early = 0;
  }

  /** Tokens have come. The first that come tell when; those after them, how fast. */
  count(tokens) {
    if (!tokens) return;
    const now = performance.now();
    if (!this.tokens) {
      this.first = now;
      this.early = tokens;
      this.#tell("first", time(now - this.begin));
      this.#tell("state", "writing");
    }
    this.tokens += tokens;
    this.last = now;
    const later = this.tokens - this.early;
    if (later) this.#tell("speed", ((1000 * later) / (now - this.first)).toPrecision(3));
    this.#tell("tokens", this.tokens);
  }

  /** `usage`: what the server counted, where it came to that. */
  stop(words, usage) {
    if (usage) this.#tell("tokens", `${usage.prompt_tokens} + ${usage.completion_tokens}`);
    this.#tell("total", time(performance.now() - this.begin));
    this.#tell("state", words);
  }

  #tell(name, words) {
    this.#panel.querySelector(`[data-figure=${name}]`).textContent = words;
  }
}

const time = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`);
