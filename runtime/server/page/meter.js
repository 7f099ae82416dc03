// What an answer cost: time to the first piece of text, tokens per second after it, and the server's counts.
//
// Times are taken in the browser, network included. While text comes, a piece counts as a token; when it is written,
// the server's own count replaces that: (written − 1) / (last − first).

import { el, facts, whole } from "./dom.js";

/** Measures one answer. */
export class Meter {
  constructor() {
    this.began = performance.now();
    this.first = this.last = null;
    this.pieces = 0;
    this.usage = null;
  }

  /** A piece of text came. */
  piece() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
  }

  /** Plain values, kept with the answer. */
  values() {
    const written = this.usage?.completion_tokens ?? this.pieces;
    const seconds = (this.last - this.first) / 1000;
    return {
      first: this.first === null ? null : this.first - this.began,
      rate: written > 1 && seconds > 0 ? (written - 1) / seconds : null,
      prompt: this.usage?.prompt_tokens ?? null,
      cached: this.usage?.prompt_tokens_details?.cached_tokens ?? null,
      written,
      counted: this.usage !== null,
    };
  }
}

/** Show values in the margin of an answer. */
export function show(target, { first, rate, prompt, cached, written, counted, by }) {
  const time = first === null ? null : first < 995 ? `${first.toFixed(0)} ms` : `${(first / 1000).toFixed(2)} s`;
  target.replaceChildren(...(by ? [el("p", { class: "by" }, by)] : []), facts([
    ["first token", time],
    ["speed", rate && `${rate.toFixed(rate < 10 ? 2 : 1)} tok/s`],
    ["prompt", prompt === null ? null : whole(prompt)],
    ["of it cached", cached === null ? null : whole(cached)],
    ["written", written ? `${counted ? "" : "≈ "}${whole(written)}` : null],
  ]));
}
