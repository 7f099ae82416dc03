// The page's first file: finds out what is served, shows chat or similarity, and tells the state of the server.

import { key, knownSettings, models, ServerError } from "./api.js";
import { body, front, read } from "./card.js";
import { Chat } from "./chat.js";
import { byId, el, say } from "./dom.js";
import { pause } from "./notes.js";
import { Panel } from "./panels.js";
import { Settings } from "./settings.js";
import { Similarity } from "./similarity.js";

const TRIES = [
  "What is the capital of France?",
  "Write a Python function that says whether a number is prime.",
  "Explain in two sentences why the sky is blue.",
];
const AWAY = "Start it with roundexport serve PACKAGE; this page looks again every two seconds.";
const PLAIN = "This package has no chat template: it was not made for conversations, and the server refuses them.";
const EVERY = 2000; // milliseconds between looks at a server that does not answer or is not ready

const page = {
  card: null,
  cards: [],
  settings: null,
  chat: null,
  /** The conversation became empty, or no longer is. */
  changed: () => drawFront(),
  needKey: (then) => askForKey(then),
  /** The server no longer answers. */
  lost: () => { begin(); },
};

let looking = false;

/** Look for the server until it tells its models. */
async function begin(then) {
  if (looking) return;
  looking = true;
  try {
    for (let waited = 0; ; waited += EVERY / 1000) {
      try {
        show(await models());
        notice(null);
        page.settings.learn(await knownSettings());
        then?.();
        return;
      } catch (error) {
        if (!(error instanceof ServerError)) throw error;
        if (error.status === 401) { looking = false; askForKey(then); return; }
        const so = waited ? ` ${waited} s so far.` : "";
        if (error.status === 503) notice("The model is loading.", error.message + so);
        else if (error.status === 0) notice("No server answers.", AWAY, true);
        else { notice("The server refused this page.", error.message, true); return; }
        await pause(EVERY);
      }
    }
  } finally {
    looking = false;
  }
}

function show(found) {
  page.cards = found.map(read);
  const select = byId("model");
  const before = page.card?.id ?? new URLSearchParams(location.search).get("model");
  select.replaceChildren(...page.cards.map(({ id }) => el("option", { value: id }, id)));
  select.disabled = page.cards.length < 2;
  if (!page.cards.length) { notice("The server serves no model.", "Start it with roundexport serve PACKAGE."); return; }
  select.value = page.cards.some(({ id }) => id === before) ? before : page.cards[0].id;
  choose(select.value);
}

function choose(id) {
  page.card = page.cards.find((card) => card.id === id);
  document.title = `${page.card.id} – roundexport`;
  byId("card-title").textContent = page.card.id;
  byId("card-body").replaceChildren(...body(page.card));
  byId("open-card").disabled = false;
  page.settings.defaults(page.card.defaults);
  drawFront();
}

function drawFront() {
  const { card, chat } = page;
  if (!card || !chat) return;
  const encoder = card.task === "embed";
  byId("similarity").hidden = !encoder;
  byId("chat").hidden = byId("composer").hidden = byId("new-chat").hidden = byId("open-settings").hidden = encoder;
  const front_ = byId("front");
  front_.hidden = !encoder && !chat.empty;
  if (front_.hidden) return;
  const below = card.chat ? tries() : el("p", { class: "summary" }, PLAIN);
  front_.replaceChildren(...front(card), ...(encoder ? [] : [below]));
}

function tries() {
  const ask = (text) => { page.chat.ask(text); byId("message").focus(); };
  const one = (text) => el("li", {}, el("button", { type: "button", onclick: () => ask(text) }, text));
  return el("ul", { class: "tries", "aria-label": "Questions to try" }, TRIES.map(one));
}

/** Tell the server's state above everything else; null: all is well. */
function notice(title, text, bad = false) {
  const target = byId("notice");
  if (title && (target.hidden || target.firstChild?.textContent !== title)) say(`${title} ${text}`);
  target.hidden = !title;
  target.className = bad ? "notice fault" : "notice";
  target.replaceChildren(...(title ? [el("h2", {}, title), el("p", {}, text)] : []));
}

function askForKey(then) {
  const target = byId("notice");
  const hidden = { type: "password", autocomplete: "off", spellcheck: "false" };
  const input = el("input", { ...hidden, id: "asked-key", required: true });
  const wrong = key.get() ? "The key was not accepted." : "This server asks for a key.";
  const take = (event) => {
    event.preventDefault();
    key.set(input.value.trim());
    page.settings.draw();
    begin(then).then(() => byId("message").focus());
  };
  target.hidden = false;
  target.className = "notice";
  target.replaceChildren(el("h2", {}, wrong), el("form", { onsubmit: take },
    el("label", { for: "asked-key" }, "Key. It stays in this tab, until it is closed."), input,
    el("button", { type: "submit", class: "main" }, "Use it")));
  say(wrong);
  input.focus();
}

function themeSwitch() {
  const button = byId("theme"), root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => button.setAttribute("aria-pressed", String(dark()));
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try {
      localStorage.setItem("roundexport.theme", root.dataset.theme);
    } catch { /* it holds until the page is left */ }
    tell();
  });
  system.addEventListener("change", tell);
  tell();
}

themeSwitch();
page.settings = new Settings(byId("settings-body"), () => begin());
page.chat = new Chat(page);
new Similarity(byId("similarity"), page);
const card = new Panel("card"), settings = new Panel("settings", [card]);
card.others.push(settings);
byId("new-chat").addEventListener("click", () => page.chat.clear());
byId("model").addEventListener("change", (event) => { choose(event.target.value); say(`Model ${page.card.id}`); });
begin().then(() => page.chat.keep());
