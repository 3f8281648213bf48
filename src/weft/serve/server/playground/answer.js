// An answer on the page: its tokens, shaded by how likely each was, and what else could have stood there.
// All that a model says becomes text nodes, never markup.

const tip = document.getElementById("tip");

export function make(name, className, text = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
}

export class Answer {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #pending = [];

  constructor(parent) {
    this.element = parent.appendChild(make("span", "answer"));
    this.text = "";
  }

  /** `text`: what the server says is sure; it is what a chat goes on with. `tokens`: what is shown. */
  add(text, tokens) {
    this.text += text;
    for (const token of tokens) {
      this.#pending.push(token);
      this.#show(this.#decoder.decode(bytesOf(token.text), { stream: true }));
    }
  }

  /** Shows what is left of a broken character, and dims the tokens that ended the answer but are not of its text. */
  close() {
    this.#show(this.#decoder.decode());
    const shown = this.element.textContent;
    if (!shown.startsWith(this.text)) return;
    let end = 0;
    for (const span of this.element.children) {
      end += span.textContent.length;
      span.classList.toggle("ending", end > this.text.length);
    }
  }

  /** A character may take several tokens: they share its place. */
  #show(text) {
    if (!text) return;
    const span = make("span", "token", text);
    if (/^\s*\n\s*$/.test(text)) span.classList.add("break");
    span.tokens = this.#pending;
    const likely = Math.exp(Math.min(...span.tokens.map((token) => token.logprob)));
    span.style.setProperty("--unlikely", (1 - likely).toFixed(3));
    this.#pending = [];
    this.element.append(span);
  }
}

/** The server writes a part of a character as bytes:\xe2\x82. */
const PARTS = /^bytes:((?:\\x[0-9a-f]{2})+)$/;

function bytesOf(text) {
  const parts = PARTS.exec(text);
  if (!parts) return new TextEncoder().encode(text);
  return Uint8Array.from(parts[1].match(/[0-9a-f]{2}/g), (byte) => parseInt(byte, 16));
}

/** Tokens of `log` tell about themselves under the mouse, a finger, and the arrow keys. */
export function tellTokens(log) {
  let current = null;
  const tell = (span) => {
    current?.classList.remove("current");
    current = span;
    if (!span) {
      tip.hidden = true;
      return;
    }
    span.classList.add("current");
    tip.replaceChildren(...span.tokens.map(table));
    place(span.getClientRects()[0]);
  };
  const under = (event) => event.target.closest?.(".token");
  log.addEventListener("pointerover", (event) => tell(under(event)));
  log.addEventListener("click", (event) => tell(under(event)));
  log.addEventListener("pointerleave", () => tell(null));
  log.addEventListener("blur", () => tell(null));
  log.addEventListener("scroll", () => { tip.hidden = true; });
  log.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const spans = [...log.querySelectorAll(".token")];
    if (!step || !spans.length) return;
    event.preventDefault();
    const at = spans.indexOf(current);
    const next = spans[at < 0 ? (step > 0 ? 0 : spans.length - 1) : Math.min(spans.length - 1, Math.max(0, at + step))];
    next.scrollIntoView({ block: "nearest" });
    tell(next);
  });
}

/** The chosen token and the others that could have stood there, the likeliest first, and all the rest together. */
function table(token) {
  const rows = [...token.top];
  if (!rows.some(([text]) => text === token.text)) rows.push([token.text, token.logprob]);
  rows.sort((one, other) => other[1] - one[1]);
  const rest = Math.max(0, 1 - rows.reduce((sum, [, logprob]) => sum + Math.exp(logprob), 0));
  const list = make("ol", "likely");
  for (const [text, logprob] of rows) list.append(row(nameOf(text), Math.exp(logprob), text === token.text));
  list.append(row("all others", rest, false, "rest"));
  return list;
}

const nameOf = (text) => PARTS.exec(text)?.[1] ?? JSON.stringify(text);

function row(name, probability, chosen, className = "") {
  const item = make("li", className);
  if (chosen) item.setAttribute("aria-current", "true");
  const bar = make("span", "bar");
  bar.append(make("i", ""));
  bar.firstChild.style.width = `${(100 * probability).toFixed(1)}%`;
  item.append(make("code", "", name), bar, make("span", "percent", percent(probability)));
  return item;
}

const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);

/** Under the token, or above it where there is no room. */
function place(box) {
  tip.hidden = false;
  const below = box.bottom + 8, above = box.top - tip.offsetHeight - 8;
  tip.style.top = `${below + tip.offsetHeight > innerHeight && above > 0 ? above : below}px`;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
}
