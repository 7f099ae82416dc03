// The server's interface: requests with the key, its errors as one type, and answers as streams of events.
//
//   GET v1/models          what is served            POST v1/chat/completions   server-sent events
//   GET openapi.json       which settings it knows   POST v1/embeddings         vectors
//
// Addresses are relative, so that the page works behind a proxy's prefix.

import { tab } from "./dom.js";

/** What went wrong. `status` 0: nobody answered; `code` is the server's own, or `unreachable`, `broken`. */
export class ServerError extends Error {
  constructor(status, code, message, retryAfter = null) {
    super(sentence(message));
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** The prompt and the answer do not fit into the model's context. */
  get tooLong() { return this.code === "context_length_exceeded"; }
}

/** Text that begins with a capital and ends with a stop. */
function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(whole) ? whole : `${whole}.`;
}

/** The key of this tab, or null. */
export const key = { get: () => tab.get("key"), set: (value) => tab.set("key", value) };

async function ask(path, { body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const sent = body ? { method: "POST", body: JSON.stringify(body) } : {};
  let response;
  try {
    response = await fetch(path, { ...sent, headers, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "unreachable", "The server does not answer.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let told = {};
  try { told = (await response.json()).error ?? {}; } catch { /* not JSON: the status has to do */ }
  if (typeof told === "string") told = { message: told };
  const after = Number.parseFloat(response.headers.get("Retry-After"));
  const message = told.message || `the server refused this with status ${response.status}`;
  return new ServerError(response.status, told.code ?? told.type ?? "", message, Number.isFinite(after) ? after : null);
}

/** The models that are served, each with its card. */
export async function models() {
  const found = (await (await ask("v1/models")).json()).data ?? [];
  return Promise.all(found.map(async (model) => (await ask(`v1/models/${encodeURIComponent(model.id)}`)).json()));
}

/** Properties of the chat request in the server's OpenAPI document: name -> schema; null where it tells nothing. */
export async function knownSettings() {
  try {
    const document = await (await ask("openapi.json")).json();
    const named = (reference) => reference.split("/").slice(1).reduce((at, part) => at?.[part], document);
    const follow = (node) => (node?.$ref ? follow(named(node.$ref)) : node);
    const content = follow(document.paths["/v1/chat/completions"].post.requestBody).content;
    return follow(content["application/json"].schema).properties ?? null;
  } catch {
    return null;
  }
}

/** Vectors of texts, in their order. `prompt`: the name of what the model wants in front of them, or undefined. */
export async function embed(model, input, prompt) {
  const body = { model, input, encoding_format: "float", prompt_name: prompt };
  const response = await ask("v1/embeddings", { body });
  return (await response.json()).data.sort((one, other) => one.index - other.index).map((row) => row.embedding);
}

/** Stream a chat completion: yields every event's JSON; ends at [DONE]. */
export async function* chat(body, signal) {
  const options = { body: { ...body, stream: true, stream_options: { include_usage: true } }, signal };
  const response = await ask("v1/chat/completions", options);
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(500, event.error.code ?? event.error.type ?? "", event.error.message);
    yield event;
  }
  throw new ServerError(0, "broken", "The connection ended before the answer did.");
}

/** The data of each event of a stream; comments and other fields are left out (WHATWG HTML, 9.2.6). */
export async function* serverSentEvents(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let rest = "", data = [];
  try {
    for (;;) {
      const { done, value } = await next(reader);
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "broken", "The connection was lost in the middle of the answer.");
  }
}
