// What stands below an answer that is not whole: why, and what can be done; and the wait that a full server asks for.

import { el, say, whole } from "./dom.js";

const LOADING = 2; // seconds until a server that is not ready is asked again, where it does not say

/** A note: {title, text, calm} with buttons [label, action]. */
export function fault(note, remedies) {
  const button = ([label, action]) => el("button", { type: "button", class: "plain", onclick: action }, label);
  return el("div", { class: note.calm ? "fault-note calm" : "fault-note" },
    el("strong", {}, note.title), note.text && el("p", {}, note.text),
    remedies.length > 0 && el("div", { class: "actions" }, remedies.map(button)));
}

/** The note of an answer that reached its limit. */
export function cut(values, context) {
  const full = context && values?.prompt + values?.written >= context;
  if (!full) return { calm: true, title: "Cut at the longest answer.", text: "Settings, Longest answer, allows more." };
  const text = `The model reads at most ${whole(context)} tokens. Begin a new chat, or edit the question.`;
  return { calm: true, title: "The context is full.", text };
}

/** Count down what a 429 or 503 asks for, in a note. Rejects like fetch when the answer is stopped. */
export async function waiting(target, error, signal) {
  let left = Math.max(1, Math.ceil(error.retryAfter ?? LOADING));
  const full = error.status === 429;
  const title = full ? "The server is full." : "The server is not ready yet.";
  const line = el("p");
  const told = el("p", {}, error.message);
  target.replaceChildren(el("div", { class: "fault-note calm" }, el("strong", {}, title), told, line));
  say(`${title} Asking again in ${left} ${left === 1 ? "second" : "seconds"}. Escape stops.`);
  for (; left > 0; left -= 1) {
    line.textContent = `Asking again in ${left} s. Stop gives up.`;
    await pause(1000, signal);
  }
}

/** Wait; rejects when the signal says so. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const leave = () => { clearTimeout(timer); reject(new DOMException("stopped", "AbortError")); };
    const timer = setTimeout(() => { signal?.removeEventListener("abort", leave); resolve(); }, milliseconds);
    if (signal?.aborted) leave();
    else signal?.addEventListener("abort", leave, { once: true });
  });
}
