// The similarity box of an encoder package: a query, texts one a line, and the cosine of each with the query as a bar.

import { embed, ServerError } from "./api.js";
import { el, many, say, svg } from "./dom.js";
import { fault } from "./notes.js";

const FAILED = "The texts could not be compared.";
const QUERY = "How do I keep bread fresh?";
const TEXTS = [
  "Store the loaf cut side down, wrapped in cloth.",
  "A week has seven days.",
  "Freezing slices keeps them from going stale.",
  "The harbor froze over in January.",
];

/** Cosine of two vectors. */
export function cosine(one, other) {
  const dot = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);
  return dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other)) || 0;
}

/** The box. */
export class Similarity {
  /** @param target the section  @param page {card, needKey, lost} */
  constructor(target, page) {
    this.page = page;
    this.query = el("textarea", { id: "query", rows: 2 });
    this.texts = el("textarea", { id: "texts", rows: 7, "aria-describedby": "texts-hint" });
    this.query.value = QUERY;
    this.texts.value = TEXTS.join("\n");
    this.compare = el("button", { type: "submit", class: "main" }, "Compare");
    this.told = el("span");
    this.result = el("div", { "aria-live": "off" });
    target.append(el("form", { onsubmit: (event) => { event.preventDefault(); this.run(); } },
      el("div", {}, el("label", { for: "query" }, "Query"), this.query),
      el("div", {}, el("label", { for: "texts" }, "Texts, one a line"), this.texts),
      el("div", { class: "actions" }, this.compare, this.told)), this.result);
  }

  async run() {
    const texts = this.texts.value.split("\n").map((line) => line.trim()).filter(Boolean);
    const query = this.query.value.trim();
    if (!query || !texts.length) {
      this.told.textContent = "A query and at least one text are needed.";
      say(this.told.textContent);
      return;
    }
    this.compare.disabled = true;
    this.told.textContent = "Comparing …";
    const began = performance.now();
    try {
      const { id, prompts } = this.page.card, asked = named(prompts, ["query"]);
      const known = named(prompts, ["document", "passage"]);
      const [[first], others] = await Promise.all([embed(id, [query], asked), embed(id, texts, known)]);
      const time = `${(performance.now() - began).toFixed(0)} ms`;
      const ranked = texts.map((text, at) => ({ text, value: cosine(first, others[at]) }));
      ranked.sort((one, other) => other.value - one.value);
      this.told.textContent = `${many(texts.length + 1, "text")} in ${time}, ${many(first.length, "number")} each`;
      this.result.replaceChildren(ranking(ranked));
      this.result.scrollIntoView({ block: "nearest" });
      say(`Compared. Closest: ${ranked[0].text}, cosine ${ranked[0].value.toFixed(3)}.`);
    } catch (error) {
      this.fail(error);
    }
    this.compare.disabled = false;
  }

  fail(error) {
    this.told.textContent = "";
    const text = error instanceof ServerError ? error.message : String(error);
    const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    this.result.replaceChildren(fault({ title: FAILED, text: text + wait }, []));
    say(`${FAILED} ${text}`);
    if (error.status === 401) this.page.needKey(() => this.run());
    if (error.code === "unreachable") this.page.lost();
  }
}

/** The first of these names that the model has a prompt for. */
const named = (prompts, names) => names.find((name) => prompts[name] !== undefined);

/** Texts with bars, from 0 to 1; where one is negative, from −1 to 1. */
function ranking(ranked) {
  const least = ranked.some(({ value }) => value < 0) ? -1 : 0;
  const at = (value) => `${(100 * (value - least)) / (1 - least)}%`;
  const length = (value) => `${(100 * Math.min(1, Math.abs(value))) / (1 - least)}%`;
  const kind = (value) => (value < 0 ? "length below" : "length");
  const bar = (value) => svg("svg", { "aria-hidden": "true" },
    svg("rect", { class: "track", width: "100%", height: "100%" }),
    svg("rect", { class: kind(value), x: at(Math.min(0, value)), width: length(value), height: "100%" }),
    least < 0 && svg("rect", { class: "zero", x: at(0), width: 1, height: "100%" }));
  const word = () => el("span", { class: "hidden" }, "cosine ");
  const figure = (value) => el("span", { class: "value" }, word(), value.toFixed(3));
  const item = ({ text, value }) => el("li", {},
    el("div", { class: "line" }, el("span", { class: "text" }, text), figure(value)), bar(value));
  return el("ol", { class: "ranking", "aria-label": "Texts by cosine with the query" }, ranked.map(item));
}
