// The page: what is asked of which columns, and the link that brings all of it back.

import { key, listModels } from "./client.js";
import { FIELDS, Panel } from "./panel.js";

const $ = (id) => document.getElementById(id);
const panels = { a: new Panel("A", remember), b: new Panel("B", remember) };
$("panels").append(panels.a.element);

const shown = () => ($("compare").checked ? [panels.a, panels.b] : [panels.a]);
const mode = () => document.querySelector("[name=mode]:checked").value;
const task = () => ({ mode: mode(), prompt: $("prompt").value, system: $("system").value });

// -- running ----------------------------------------------------------------------------------------------------------

async function run() {
  if (shown().some((panel) => panel.running)) return;
  const asked = task();
  if (asked.mode === "chat" && !asked.prompt.trim()) return;
  if (asked.mode === "chat") $("prompt").value = "";
  remember();
  $("run").disabled = true;
  $("stop").disabled = false;
  const errors = await Promise.all(shown().map((panel) => panel.run(asked)));
  $("run").disabled = false;
  $("stop").disabled = true;
  if (asked.mode === "chat" && errors.every(Boolean) && !$("prompt").value) $("prompt").value = asked.prompt;
  if (errors.some((error) => error?.status === 401)) askForKey();
}

const stop = () => shown().forEach((panel) => panel.stop());

$("composer").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("key-dialog").open) run();
  if (event.key === "Escape") stop();
});

// -- the page's own switches -------------------------------------------------------------------------------------------

function arrange() {
  const chat = mode() === "chat";
  document.body.dataset.mode = mode();
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("panels").classList.toggle("two", $("compare").checked);
  if ($("compare").checked) $("panels").append(panels.b.element);
  else panels.b.element.remove();
}

$("mode").addEventListener("change", () => { stop(); newChat(); arrange(); remember(); });
$("compare").addEventListener("change", () => {
  if ($("compare").checked) panels.b.adopt(panels.a);
  else panels.b.stop();
  arrange();
  remember();
});
$("new-chat").addEventListener("click", newChat);
$("prompt").addEventListener("input", remember);
$("system").addEventListener("input", remember);

function newChat() {
  stop();
  Object.values(panels).forEach((panel) => panel.clear());
}

for (const panel of Object.values(panels)) {
  const button = panel.element.querySelector(".curl");
  button.addEventListener("click", async () => {
    try {
      await copy(panel.curl(task()));
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy as curl"; }, 1500);
    } catch (error) {
      panel.fail(error);
    }
  });
}

/** Browsers lend the clipboard to https and this machine only; elsewhere the old way is left. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}

// -- the link ------------------------------------------------------------------------------------------------------------

let timer = 0;

/** Browsers take a few changes of the address a second, and typing is faster. */
function remember() {
  clearTimeout(timer);
  timer = setTimeout(() => history.replaceState(null, "", `#${link()}`), 200);
}

function link() {
  const found = new URLSearchParams();
  const put = (name, value) => { if (value) found.set(name, value); };
  put("mode", mode() === "chat" ? "chat" : "");
  put("compare", $("compare").checked ? "1" : "");
  if (mode() === "chat") put("system", $("system").value);
  put("prompt", $("prompt").value);
  for (const [letter, panel] of Object.entries(panels)) {
    if (!shown().includes(panel)) continue;
    for (const name of FIELDS) put(`${letter}.${name}`, panel.settings[name]);
  }
  return found;
}

function restore() {
  const found = new URLSearchParams(location.hash.slice(1));
  document.querySelector(`[name=mode][value=${found.get("mode") === "chat" ? "chat" : "complete"}]`).checked = true;
  $("compare").checked = found.has("compare");
  $("system").value = found.get("system") ?? "";
  $("prompt").value = found.get("prompt") ?? "";
  for (const [letter, panel] of Object.entries(panels)) {
    panel.settings = Object.fromEntries(FIELDS.map((name) => [name, found.get(`${letter}.${name}`) ?? ""]));
  }
  arrange();
}

addEventListener("hashchange", restore);

// -- models, and the key that they may need -----------------------------------------------------------------------------

let told = null;

/** What a question brought is not written over. */
function tell(error) {
  if (panels.a.failure && panels.a.failure !== told) return;
  panels.a.fail(error);
  told = error;
}

async function findModels() {
  try {
    const cards = await listModels();
    $("change-key").hidden = !key.get();
    Object.values(panels).forEach((panel) => { panel.models = cards; });
    tell(cards.length ? null : new Error("No model is ready yet. Waiting for one."));
    if (!cards.length) setTimeout(findModels, 1000);
  } catch (error) {
    tell(error);
    if (error.status === 401) askForKey();
  }
}

function askForKey() {
  $("change-key").hidden = false;
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("change-key").addEventListener("click", askForKey);
$("key-dialog").addEventListener("close", () => {
  if (!$("key").value) return;
  key.set($("key").value);
  findModels();
});

restore();
findModels();
