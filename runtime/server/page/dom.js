// Building the document: nodes from values, never from strings of HTML, so that no text of a model is ever markup.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

/** An HTML element: attributes by name, `onclick` and the like as listeners, strings as text. */
export const el = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);

/** An SVG element. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** A description list of [term, value] pairs; pairs without a value are left out. */
export function facts(pairs, properties = {}) {
  const shown = pairs.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return el("dl", properties, shown.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))));
}

/** Tell a screen reader something once. */
export function say(text) {
  const status = byId("status");
  status.textContent = "";
  setTimeout(() => { status.textContent = text; }, 50); // an empty region first, so that the same words are told again
}

/** A value of this tab, kept until it is closed; nothing where storage is refused. */
export const tab = {
  get(name) { try { return sessionStorage.getItem(`roundexport.${name}`); } catch { return null; } },
  json(name, otherwise) {
    try { return JSON.parse(this.get(name)) ?? otherwise; } catch { return otherwise; }
  },
  set(name, value) {
    try {
      if (value === null || value === "") sessionStorage.removeItem(`roundexport.${name}`);
      else sessionStorage.setItem(`roundexport.${name}`, value);
    } catch { /* storage is full or refused: the page works without */ }
  },
};

/** Put text on the clipboard; true when it is there. Without HTTPS browsers offer only the old way. */
export async function copy(text) {
  if (navigator.clipboard) {
    try { await navigator.clipboard.writeText(text); return true; } catch { /* not allowed: the old way */ }
  }
  const before = document.activeElement;
  const area = el("textarea", { class: "hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus?.();
  return done;
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", class: "link" }, label);
  button.addEventListener("click", async () => {
    const done = await copy(text());
    button.textContent = done ? "Copied" : "Could not copy";
    say(button.textContent);
    setTimeout(() => { button.textContent = label; }, 1500);
  });
  return button;
}

const SIZES = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]];

/** Bytes as a person reads them. */
export function bytes(count) {
  const [unit, name] = SIZES.find(([size]) => count >= size) ?? [1, "bytes"];
  return `${unit === 1 ? count : (count / unit).toFixed(count / unit < 100 ? 1 : 0)} ${name}`;
}

/** A whole number with separators. */
export const whole = (count) => Number(count).toLocaleString("en");

/** "1 word" or "3 words". */
export const many = (count, one, more = `${one}s`) => `${whole(count)} ${count === 1 ? one : more}`;
