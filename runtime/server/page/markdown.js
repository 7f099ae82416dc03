// A small part of Markdown as nodes: headings, paragraphs, lists, quotes, tables, rules, code, bold and emphasis.
//
// Text becomes text nodes and nothing else: a model's HTML is shown as it was written, and its links are not links.
// While an answer streams, `Rendering.update` keeps the nodes of the blocks that did not change, so that a selection
// stays and long answers cost what their last block costs.

import { copyButton, el } from "./dom.js";

const FENCE = /^(\s*)(```+|~~~+)\s*([^`]*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const ROW = /^\s*\|.*\|\s*$/;
const DIVIDER = /^\s*\|(\s*:?-+:?\s*\|)+\s*$/;

/** Cut text into blocks: {kind, lines, …}. */
export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n"), found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at], fence = FENCE.exec(line);
    if (fence) {
      const closes = new RegExp(`^\\s*${fence[2][0]}{${fence[2].length},}\\s*$`), code = [];
      for (at += 1; at < lines.length && !closes.test(lines[at]); at += 1) code.push(lines[at]);
      found.push({ kind: "code", language: fence[3].trim(), lines: code, closed: at < lines.length });
      at += 1;
    } else if (!line.trim()) at += 1;
    else if (HEADING.test(line)) { found.push({ kind: "heading", lines: [line] }); at += 1; }
    else if (RULE.test(line)) { found.push({ kind: "rule", lines: [line] }); at += 1; }
    else {
      const kind = ITEM.test(line) ? "list" : /^\s*>/.test(line) ? "quote" : isTable(lines, at) ? "table" : "paragraph";
      const own = [line];
      for (at += 1; at < lines.length && belongs(kind, lines, at); at += 1) own.push(lines[at]);
      found.push({ kind, lines: own });
    }
  }
  return found;
}

const isTable = (lines, at) => ROW.test(lines[at]) && DIVIDER.test(lines[at + 1] ?? "");

function belongs(kind, lines, at) {
  const line = lines[at];
  if (kind === "table") return ROW.test(line);
  if (kind === "list" && !line.trim()) return ITEM.test(lines[at + 1] ?? "") || /^\s{2,}\S/.test(lines[at + 1] ?? "");
  if (!line.trim() || FENCE.test(line) || HEADING.test(line) || (kind !== "list" && RULE.test(line))) return false;
  if (kind === "quote") return /^\s*>/.test(line);
  return kind === "list" || !(ITEM.test(line) || /^\s*>/.test(line) || isTable(lines, at));
}

const INLINE = new RegExp([
  /(`+)(.+?)\1(?!`)/, // code
  /\*\*(?=\S)(.+?)(?<=\S)\*\*/, // bold
  /\*(?=\S)([^*]+?)(?<=\S)\*(?!\*)/, // emphasis
  /(?<!\w)_(?=\S)([^_]+?)(?<=\S)_(?!\w)/, // emphasis, never within a word
].map((part) => part.source).join("|"), "s");

/** Nodes of a line: bold, emphasis and code; everything else is text. */
export function inline(text) {
  const nodes = [];
  let rest = text, found;
  while ((found = INLINE.exec(rest))) {
    if (found.index) nodes.push(rest.slice(0, found.index));
    const [all, , code, strong, starred, underlined] = found;
    if (code !== undefined) nodes.push(el("code", {}, code.replace(/^ (.*) $/, "$1")));
    else if (strong !== undefined) nodes.push(el("strong", {}, inline(strong)));
    else nodes.push(el("em", {}, inline(starred ?? underlined)));
    rest = rest.slice(found.index + all.length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function node(block) {
  switch (block.kind) {
    case "code": return code(block);
    case "heading": {
      const [, marks, text] = HEADING.exec(block.lines[0]);
      return el(`h${Math.min(6, marks.length + 2)}`, {}, inline(text.replace(/\s+#+$/, "")));
    }
    case "rule": return el("hr");
    case "list": return list(block.lines);
    case "quote": return el("blockquote", {}, nodes(block.lines.map((line) => line.replace(/^\s*> ?/, ""))));
    case "table": return table(block.lines);
    default: return el("p", {}, broken(block.lines));
  }
}

const nodes = (lines) => blocks(lines.join("\n")).map(node);

/** Lines of a paragraph; a single line end is shown as one, as models mean it. */
const broken = (lines) => lines.flatMap((line, at) => [...(at ? [el("br")] : []), ...inline(line.trim())]);

function code({ language, lines }) {
  const text = lines.join("\n");
  const label = language ? `Code, ${language}` : "Code";
  return el("figure", { class: "code" },
    el("figcaption", {}, el("span", {}, language || "code"), copyButton(() => text)),
    el("pre", { tabindex: 0, role: "region", "aria-label": label }, el("code", {}, text)));
}

/** A list: lines indented deeper than the first item belong to the item before them, and may be lists themselves. */
function list(lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push({ first: item[3], deeper: [] });
    else items.at(-1).deeper.push(line);
  }
  const ordered = /\d/.test(mark);
  const start = ordered ? Number.parseInt(mark, 10) : 1;
  return el(ordered ? "ol" : "ul", { start: start === 1 ? undefined : start }, items.map(({ first, deeper }) => {
    const depth = Math.min(...deeper.filter((line) => line.trim()).map((line) => line.search(/\S/)), 99);
    return el("li", {}, inline(first), nodes(deeper.map((line) => line.slice(depth))));
  }));
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const [head, , ...body] = lines;
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Table" }, el("table", {},
    el("thead", {}, el("tr", {}, cells(head).map((cell) => el("th", { scope: "col" }, cell)))),
    el("tbody", {}, body.map((line) => el("tr", {}, cells(line).map((cell) => el("td", {}, cell)))))));
}

/** An answer in a node, updated as it grows. What stands in <think> first is folded away. */
export class Rendering {
  constructor(target) {
    this.target = target;
    this.sources = [];
    this.thinking = null;
  }

  /** Show this text. */
  update(text) {
    const { thought, rest } = split(text);
    if (thought !== null) this.showThought(thought);
    const shown = blocks(rest), sources = shown.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < sources.length && sources[same] === this.sources[same]) same += 1;
    const kept = same + (this.thinking ? 1 : 0);
    while (this.target.childNodes.length > kept) this.target.lastChild.remove();
    this.target.append(...shown.slice(same).map(node));
    this.sources = sources;
  }

  showThought(thought) {
    if (!this.thinking) {
      this.thinking = el("details", { class: "thought" }, el("summary", {}, "Thinking"), el("div"));
      this.target.prepend(this.thinking);
    }
    this.thinking.lastChild.textContent = thought.trim();
  }
}

function split(text) {
  const found = /^\s*<think>(.*?)(<\/think>|$)/s.exec(text);
  return found ? { thought: found[1], rest: text.slice(found[0].length) } : { thought: null, rest: text };
}
