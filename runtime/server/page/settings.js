// The settings drawer: the key, the system prompt and how tokens are chosen. An empty field leaves the choice to the server,
// and only what the server's OpenAPI document knows is shown and sent.

import { el, tab } from "./dom.js";
import { key } from "./api.js";

const number = (min, max, step) => ({ type: "number", inputmode: "decimal", min, max, step });
const FIELDS = [
  { name: "temperature", label: "Temperature", hint: "0 takes the likeliest token.", input: number(0, 2, 0.05) },
  { name: "top_p", label: "Top p", hint: "The likeliest, up to this share.", input: number(0.01, 1, 0.01) },
  { name: "top_k", label: "Top k", hint: "So many tokens; 0 keeps all.", input: number(0, undefined, 1), extra: true },
  { name: "min_p", label: "Min p", hint: "Drops the unlikely, by share of the likeliest.", input: number(0, 1, 0.01), extra: true },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "Above 1 avoids what was written.", input: number(0.01, undefined, 0.01), extra: true },
  { name: "presence_penalty", label: "Presence penalty", hint: "Lowers every token the answer has.", input: number(-2, 2, 0.1), extra: true },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "Lowers it as often as it has it.", input: number(-2, 2, 0.1), extra: true },
  { name: "max_tokens", label: "Longest answer", hint: "In tokens.", input: { ...number(1, undefined, 1), inputmode: "numeric" } },
  { name: "seed", label: "Seed", hint: "The same seed repeats an answer.", input: { ...number(0, undefined, 1), inputmode: "numeric" } },
];

/** The drawer's form. */
export class Settings {
  /** @param form where the fields go  @param onKey called when the key changed */
  constructor(form, onKey) {
    this.form = form;
    this.onKey = onKey;
    this.known = null;
    this.own = {};
    this.saved = JSON.parse(tab.get("settings") ?? "{}");
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
    this.own = own;
    this.draw();
  }

  fields() {
    return FIELDS.filter(({ name, extra }) => (this.known ? name in this.known : !extra));
  }

  draw() {
    const secret = el("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false" });
    secret.value = key.get() ?? "";
    secret.addEventListener("change", () => { key.set(secret.value.trim()); this.onKey(); });
    const reset = el("button", { type: "button", class: "plain", onclick: () => this.reset() }, "Back to the server's own");
    const system = el("textarea", { id: "system", name: "system", rows: 4 });
    const stop = el("textarea", { id: "stop", name: "stop", rows: 2 });
    this.form.replaceChildren(
      setting(system, "System prompt", "Stands before the conversation."),
      el("div", { class: "pair" }, this.fields().map((field) => this.numeric(field))),
      setting(stop, "Stop strings", "One a line, at most four; the answer ends before them."),
      el("div", { class: "setting" }, reset),
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
    this.saved = Object.fromEntries([...this.form.querySelectorAll("[name]")].filter((input) => input.value !== "").map((input) => [input.name, input.value]));
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
    const sent = {};
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
  return el("div", { class: "setting" }, el("label", { for: input.id }, label), el("p", { id: `${input.id}-hint` }, hint), input);
}
