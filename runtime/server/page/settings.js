// The settings drawer: the system prompt, how tokens are chosen, and the key. An empty field leaves the choice to the
// server, and only what the server's OpenAPI document knows is shown and sent. The temperature is the exception:
// OpenAI's default of 1 lets a small model in few bits talk nonsense; where a package has none the page asks for less.

import { el, tab } from "./dom.js";
import { key } from "./api.js";

const number = (min, max, step) => ({ type: "number", inputmode: "decimal", min, max, step });
const count = (min) => ({ ...number(min, undefined, 1), inputmode: "numeric" });
const field = (name, label, hint, input, extra = false) => ({ name, label, hint, input, extra });

// `extra`: not in OpenAI's interface, so shown only where the server's document has it.
const FIELDS = [
  field("temperature", "Temperature", "0 takes the likeliest token.", number(0, 2, 0.05)),
  field("top_p", "Top p", "The likeliest, up to this share.", number(0.01, 1, 0.01)),
  field("top_k", "Top k", "So many tokens; 0 keeps all.", count(0), true),
  field("min_p", "Min p", "Drops the unlikely, by share of the likeliest.", number(0, 1, 0.01), true),
  field("repetition_penalty", "Repetition penalty", "Above 1 avoids what was written.", number(0.01, 10, 0.01), true),
  field("presence_penalty", "Presence penalty", "Lowers tokens that the answer has.", number(-2, 2, 0.1)),
  field("frequency_penalty", "Frequency penalty", "Lowers them as often as it has them.", number(-2, 2, 0.1)),
  field("max_tokens", "Longest answer", "In tokens.", count(1)),
  field("seed", "Seed", "The same seed repeats an answer.", count(0)),
];

const TEMPERATURE = 0.7;

/** The drawer's form. */
export class Settings {
  /** @param form where the fields go  @param onKey called when the key changed */
  constructor(form, onKey) {
    this.form = form;
    this.onKey = onKey;
    this.known = null;
    this.own = { temperature: TEMPERATURE };
    this.saved = tab.json("settings", {});
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => this.keep());
    this.draw();
  }

  /** Show what this server knows: property name -> schema, or null where it does not tell. */
  learn(known) {
    this.known = known;
    this.draw();
  }

  /** Show what this package does where nothing is said: name -> number. */
  defaults(own) {
    this.own = { temperature: TEMPERATURE, ...own };
    this.draw();
  }

  fields() {
    return FIELDS.filter(({ name, extra }) => (this.known ? name in this.known : !extra));
  }

  draw() {
    const secret = el("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false" });
    secret.value = key.get() ?? "";
    secret.addEventListener("change", () => { key.set(secret.value.trim()); this.onKey(); });
    const back = { type: "button", class: "plain", onclick: () => this.reset() };
    const system = el("textarea", { id: "system", name: "system", rows: 4 });
    const stop = el("textarea", { id: "stop", name: "stop", rows: 2 });
    this.form.replaceChildren(
      setting(system, "System prompt", "Stands before the conversation."),
      el("div", { class: "pair" }, this.fields().map((field) => this.numeric(field))),
      setting(stop, "Stop strings", "One a line, at most four; the answer ends before them."),
      el("div", { class: "setting" }, el("button", back, "Back to the server's own")),
      setting(secret, "Key", "Only for a server that asks for one. Kept in this tab, until it is closed."),
    );
    for (const input of this.form.querySelectorAll("[name]")) input.value = this.saved[input.name] ?? "";
  }

  numeric({ name, label, hint, input }) {
    const own = this.own[name] ?? this.known?.[name]?.default;
    const placeholder = own === undefined || own === null ? "default" : String(own);
    return setting(el("input", { id: name, name, placeholder, ...input }), label, hint);
  }

  keep() {
    const filled = [...this.form.querySelectorAll("[name]")].filter((input) => input.value !== "");
    this.saved = Object.fromEntries(filled.map((input) => [input.name, input.value]));
    tab.set("settings", JSON.stringify(this.saved));
  }

  reset() {
    const { system } = this.saved;
    this.saved = system ? { system } : {};
    tab.set("settings", JSON.stringify(this.saved));
    this.draw();
    this.form.querySelector("button").focus();
  }

  /** The system prompt, or an empty string. */
  get system() { return (this.saved.system ?? "").trim(); }

  /** What to send beside the messages. A field that is out of range is not sent; the browser marks it. */
  request() {
    const sent = { temperature: this.own.temperature };
    for (const { name } of this.fields()) {
      const input = this.form.elements.namedItem(name);
      if (input?.value !== "" && input?.validity.valid) sent[name] = Number(input.value);
    }
    const stop = (this.saved.stop ?? "").split("\n").filter((line) => line !== "").slice(0, 4);
    if (stop.length && (!this.known || "stop" in this.known)) sent.stop = stop;
    return sent;
  }
}

function setting(input, label, hint) {
  input.setAttribute("aria-describedby", `${input.id}-hint`);
  const described = el("p", { id: `${input.id}-hint` }, hint);
  return el("div", { class: "setting" }, el("label", { for: input.id }, label), described, input);
}
