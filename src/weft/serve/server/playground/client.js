// The server, as the page sees it: which models there are, and an answer as it comes. Its routes are named from where the
// page is, which a proxy may have put below a path of its own.

/** Why there is no answer, in words. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const KEY = "weft-api-key";
const BROKEN = "The connection ended before the answer did.";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** The cards of the models that are ready. */
export async function listModels() {
  const answer = await ask("v1/models", {});
  return (await answer.json()).data;
}

/** The events of a streamed answer. Leaving early, or the signal, hangs up: the server cancels the request. */
export async function* stream(route, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await ask(route, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ;) {
      const { done, value } = await reader.read();
      if (done) throw new Refusal(BROKEN);
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Refusal(sentence(event.error.message));
        yield event;
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new Refusal(BROKEN) : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function ask(route, { headers = {}, ...options }) {
  if (key.get()) headers = { ...headers, Authorization: `Bearer ${key.get()}` };
  let answer;
  try {
    answer = await fetch(route, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Is it still running?");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  const table = await answer.json().catch(() => null);
  const words = table?.error?.message ?? `the server answered with status ${answer.status}`;
  const wait = answer.headers.get("retry-after");
  return new Refusal(sentence(words) + (wait ? ` Try again in ${wait} s.` : ""), answer.status);
}

const sentence = (words) => words[0].toUpperCase() + words.slice(1) + (/[.?!]$/.test(words) ? "" : ".");

/** What a completion's or a chat's event adds: its text, and its tokens as {text, logprob, top: [[text, logprob], …]}. */
export function read(event) {
  const choice = event.choices[0];
  if (!choice) return { text: "", tokens: [], usage: event.usage };
  const told = choice.logprobs;
  const tokens = told?.content
    ? told.content.map((one) => ({
        text: one.token, logprob: one.logprob, top: one.top_logprobs.map((other) => [other.token, other.logprob]),
      }))
    : (told?.tokens ?? []).map((text, at) => ({
        text, logprob: told.token_logprobs[at], top: Object.entries(told.top_logprobs[at]),
      }));
  return {
    text: choice.text ?? choice.delta?.content ?? "", tokens, finish: choice.finish_reason,
    stoppedBy: choice.stop_reason, usage: event.usage,
  };
}

/** The same request for a terminal. */
export function curl(route, body) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const auth = key.get() ? ' \\\n  -H "Authorization: Bearer $WEFT_API_KEY"' : "";
  return `curl ${new URL(route, document.baseURI)}${auth} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quote(JSON.stringify(body))}`;
}
