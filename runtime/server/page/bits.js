// Bits per layer as a picture: a column per block, a row per kind of layer, more contrast for more bits; and in words.
//
// A layer's name holds its block's number: `model.layers.12.mlp.down_proj` is block 12, kind `mlp.down_proj`. Names
// without a number (embeddings, the head) stand outside the blocks. Further numbers (experts) share a row.

import { el, many, svg } from "./dom.js";

const NUMBERED = /^(.*?\.)?(\d+)\.(.+)$/;
const ROW = 18, BARE = 13, GAP = 2; // pixels

/** What a layer is stored as, in words. */
export function words({ bits, group_size: group, symmetric }) {
  if (bits === "float") return "float";
  const groups = group ? `groups of ${group}` : "whole rows";
  return `${bits} bits, ${groups}${symmetric === false ? ", with zero points" : ""}`;
}

/** Layers by place: {blocks: [number], kinds: [{name, short, cells: block -> layers}], outside: [[name, layer]]}. */
export function weave(layers) {
  const kinds = new Map(), numbers = new Set(), outside = [];
  for (const [name, layer] of Object.entries(layers)) {
    const found = NUMBERED.exec(name);
    if (!found) { outside.push([name, layer]); continue; }
    const block = Number(found[2]), kind = found[3].replace(/(^|\.)\d+(?=\.|$)/g, "$1*");
    numbers.add(block);
    if (!kinds.has(kind)) kinds.set(kind, new Map());
    const cells = kinds.get(kind);
    if (!cells.has(block)) cells.set(block, []);
    cells.get(block).push(layer);
  }
  const names = [...kinds.keys()].sort((one, other) => order(one) - order(other));
  const shorts = names.map(shorten);
  const unique = (at) => shorts.indexOf(shorts[at]) === shorts.lastIndexOf(shorts[at]);
  const rows = names.map((name, at) => ({ name, short: unique(at) ? shorts[at] : name, cells: kinds.get(name) }));
  return { blocks: [...numbers].sort((one, other) => one - other), kinds: rows, outside };
}

// As data flows through a block; unknown kinds come last, in the order of the manifest.
const FLOW = [
  /qkv|c_attn/, /\bq_|query/, /\bk_|key/, /\bv_|value/, /\bo_|attn\.|attention\./,
  /gate/, /\bup|intermediate|fc1|c_fc|Wi/, /down|output|fc2|mlp/,
];
const COMMON = /^(self_attn|self|attn|mlp|attention|dense)$/;

function order(name) {
  const at = FLOW.findIndex((pattern) => pattern.test(name));
  return at < 0 ? FLOW.length : at;
}

const shorten = (name) => name.split(".").filter((part) => !COMMON.test(part)).join(".").replace(/_proj$/, "") || name;

/** Bits of a cell, which may hold several layers. */
function tone(cell) {
  const bits = new Set(cell.map((layer) => String(layer.bits)));
  return bits.size === 1 ? [...bits][0] : String(Math.min(...[...bits].map((value) => Number(value) || 16)));
}

const told = (cell) => [...new Set(cell.map(words))].join("; ");

/** The picture. `labels`: with the kinds' names and the blocks' numbers, and a line that tells what is pointed at. */
export function picture(layers, { labels = true } = {}) {
  const { blocks, kinds } = weave(layers);
  if (!blocks.length) return null;
  const high = labels ? ROW : BARE, step = 100 / blocks.length, gap = blocks.length > 48 ? 1 : GAP;
  const drawing = svg("svg", { height: high * kinds.length, role: "img", "aria-label": summary(layers) });
  const ends = [el("span", {}, `block ${blocks[0]}`), el("span", {}, String(blocks.at(-1)))];
  const below = el("div", { class: "blocks", "aria-hidden": "true" }, ends);
  kinds.forEach(({ name, cells }, row) => blocks.forEach((block, column) => {
    const cell = cells.get(block);
    if (!cell) return;
    const rect = svg("rect", {
      x: `${(column * step).toFixed(3)}%`, y: row * high, width: `${(step * 0.9).toFixed(3)}%`, height: high - GAP,
      class: `bits-${tone(cell)}`,
    });
    rect.style.setProperty("width", `calc(${step.toFixed(3)}% - ${gap}px)`); // where CSS sizes shapes, an even gap
    rect.addEventListener("pointerenter", () => {
      drawing.querySelector(".over")?.classList.remove("over");
      rect.classList.add("over");
      below.replaceChildren(`block ${block}, ${name}: ${told(cell)}`);
    });
    drawing.append(rect);
  }));
  if (!labels) return el("div", { class: "weave bare" }, drawing);
  drawing.addEventListener("pointerleave", () => {
    drawing.querySelector(".over")?.classList.remove("over");
    below.replaceChildren(...ends);
  });
  const names = el("ul", { class: "kinds", "aria-hidden": "true" }, kinds.map(({ short }) => el("li", {}, short)));
  return el("div", { class: "weave" }, names, drawing, below);
}

/** The picture in one sentence. */
export function summary(layers) {
  const { blocks, kinds, outside } = weave(layers);
  const counts = new Map();
  for (const layer of Object.values(layers)) counts.set(words(layer), (counts.get(words(layer)) ?? 0) + 1);
  const often = [...counts].sort((one, other) => other[1] - one[1]);
  const forms = often.map(([form, count]) => `${many(count, "layer")} in ${form}`);
  const where = `${many(blocks.length, "block")} of ${many(kinds.length, "kind")} of layer`;
  const apart = outside.length ? `, ${many(outside.length, "layer")} outside them` : "";
  return `Bits per layer, ${where}${apart}: ${forms.join("; ")}.`;
}

/** What the colors mean, for the bits that occur. */
export function legend(layers) {
  const inside = weave(layers).kinds.flatMap(({ cells }) => [...cells.values()].map(tone));
  const found = new Set(inside);
  const shown = ["2", "3", "4", "8", "float"].filter((bits) => found.has(bits));
  return el("ul", { class: "legend", "aria-label": "Colors" }, shown.map((bits) => key(bits, width(bits))));
}

const key = (bits, text) => el("li", {}, el("i", { class: `bits-${bits}` }), text);
const width = (bits) => (bits === "float" ? "float" : `${bits} bits`);

/** The layers that stand in no block, each with its color; null where there are none. */
export function outside(layers) {
  const found = weave(layers).outside;
  if (!found.length) return null;
  const keys = found.map(([name, { bits }]) => key(bits, `${name}, ${width(bits)}`));
  return el("ul", { class: "legend apart", "aria-label": "Layers outside the blocks" }, keys);
}

/** Every kind with what it is stored as, blocks with the same form together. */
export function table(layers) {
  const { kinds, outside } = weave(layers);
  const rows = kinds.flatMap(({ name, cells }) => {
    const forms = new Map();
    for (const block of [...cells.keys()].sort((one, other) => one - other)) {
      const form = told(cells.get(block));
      forms.set(form, [...(forms.get(form) ?? []), block]);
    }
    return [...forms].map(([form, blocks]) => [name, ranges(blocks), form]);
  });
  const all = [...outside.map(([name, layer]) => [name, "–", words(layer)]), ...rows];
  const head = ["Layer", "Blocks", "Stored as"].map((text) => el("th", { scope: "col" }, text));
  const line = ([name, ...cells]) => {
    return el("tr", {}, el("th", { scope: "row" }, breakable(name)), cells.map((cell) => el("td", {}, cell)));
  };
  return el("details", { class: "words" }, el("summary", {}, "The same in words"),
    el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, all.map(line))));
}

/** A dotted name that may be broken after a dot or an underscore, and nowhere else. */
const breakable = (name) => name.split(/(?<=[._])/).flatMap((part, at) => (at ? [el("wbr"), part] : [part]));

/** [0, 1, 2, 5] as "0–2, 5". */
export function ranges(numbers) {
  const runs = [];
  for (const number of numbers) {
    if (runs.length && runs.at(-1)[1] === number - 1) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}
