// The conversation: questions go out with all that was said before, answers come in pieces and are drawn as they come.
//
//   exchange = { question, answer, by, values, note, left }     by: the model, where there are several
//                                                               left: no longer sent, because the context was full
//
// Exchanges are kept in this tab, so that reloading loses nothing. A screen reader hears that an answer has begun and,
// when it is written, the answer; never its pieces.

import { chat as stream, ServerError } from "./api.js";
import { byId, copyButton, el, say, tab, whole } from "./dom.js";
import { Rendering } from "./markdown.js";
import { Meter, show } from "./meter.js";
import { cut, fault, waiting } from "./notes.js";

const DRAWN = 40; // milliseconds between drawings of a growing answer
const TOLD = 1500; // characters of an answer that a screen reader is given at once

/** The conversation and the field that it is led with. */
export class Chat {
  /** @param page {card, settings, needKey, isReady}: the chosen model and what else the page knows */
  constructor(page) {
    this.page = page;
    this.turns = byId("turns");
    this.message = byId("message");
    this.exchanges = tab.json("chat", []);
    this.running = null; // AbortController of the answer that is being written
    this.edited = null; // the text that stood in the field before editing began
    this.follows = true;
    this.exchanges.forEach((exchange) => this.add(exchange));
    this.listen();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.stop();
      else this.send();
    });
    this.message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.running) this.send();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running && !document.querySelector("dialog:modal")) this.stop();
      else if (event.key === "Escape" && this.edited !== null) this.leaveEdit();
    });
    byId("leave-edit").addEventListener("click", () => this.leaveEdit());
    const main = byId("main");
    main.addEventListener("scroll", () => {
      this.follows = main.scrollHeight - main.scrollTop - main.clientHeight < 48;
    }, { passive: true });
  }

  get empty() { return this.exchanges.length === 0; }

  /** Ask what stands in the field. */
  send() {
    const question = this.message.value.trim();
    if (!question || !this.page.card) return;
    if (this.edited !== null) {
      this.remove(this.exchanges.at(-1));
      this.leaveEdit(false);
    }
    this.message.value = "";
    this.ask(question);
  }

  /** Ask this. */
  ask(question) {
    const exchange = { question, answer: "", values: null, note: null, left: false };
    this.exchanges.push(exchange);
    this.add(exchange);
    this.keep();
    this.run(exchange, exchange.view);
  }

  /** End the answer that is being written; what came stays. */
  stop() { this.running?.abort(); }

  /** Begin anew. */
  clear() {
    this.stop();
    this.leaveEdit(false);
    this.exchanges = [];
    this.turns.replaceChildren();
    this.keep();
    this.page.changed();
    this.message.focus();
  }

  remove(exchange) {
    this.exchanges = this.exchanges.filter((other) => other !== exchange);
    exchange.view.root.remove();
    delete exchange.view;
  }

  edit(exchange) {
    this.edited = this.message.value;
    this.message.value = exchange.question;
    byId("editing").hidden = false;
    this.message.focus();
    say("Editing your last question.");
  }

  leaveEdit(restore = true) {
    if (this.edited === null) return;
    if (restore) this.message.value = this.edited;
    this.edited = null;
    byId("editing").hidden = true;
    this.message.focus();
  }

  /** Draw an exchange, and remember its view in it. */
  add(exchange) {
    const answer = el("div", { class: "answer" }), meter = el("div", { class: "meter" });
    const button = (name, text, onclick) => el("button", { type: "button", class: `link ${name}`, onclick }, text);
    const again = button("again", "Ask again", () => this.again(exchange));
    const edit = button("edit", "Edit", () => this.edit(exchange));
    const tools = el("div", { class: "answer-tools", hidden: true }, copyButton(() => exchange.answer), again);
    const note = el("div", { class: "note" });
    const asked = el("h2", { class: "question" }, el("span", { class: "hidden" }, "You: "), exchange.question);
    const root = el("article", { class: "exchange" },
      el("div", { class: "asked" }, asked, edit),
      el("div", { class: "answered" }, el("div", { class: "said" }, answer, note, tools), meter));
    const rendering = new Rendering(answer);
    exchange.view = { root, answer, meter, tools, note, rendering };
    this.turns.append(root);
    this.draw(exchange);
    this.page.changed();
  }

  /** Bring a view to what its exchange holds. */
  draw(exchange) {
    const { root, meter, tools, note, rendering } = exchange.view;
    rendering.update(exchange.answer);
    if (exchange.values) show(meter, { ...exchange.values, by: exchange.by });
    tools.hidden = !exchange.answer;
    root.classList.toggle("left", exchange.left);
    root.querySelector(".left-out")?.remove();
    const out = el("p", { class: "left-out" }, "No longer sent: the context was full.");
    if (exchange.left) root.querySelector(".asked").after(out);
    const remedies = exchange.note ? this.remedies(exchange) : [];
    tools.querySelector(".again").hidden = remedies.length > 0;
    note.replaceChildren(...(exchange.note ? [fault(exchange.note, remedies)] : []));
  }

  /** What can be done about an answer that failed. */
  remedies(exchange) {
    if (exchange !== this.exchanges.at(-1) || exchange.note.calm) return [];
    const before = this.exchanges.filter((other) => other !== exchange && !other.left);
    if (!exchange.note.tooLong) return [["Ask again", () => this.again(exchange)]];
    const leave = () => {
      before[0].left = true;
      this.draw(before[0]);
      this.again(exchange);
    };
    const always = [["Edit the question", () => this.edit(exchange)], ["New chat", () => this.clear()]];
    return before.length ? [["Leave out the oldest question and ask again", leave], ...always] : always;
  }

  again(exchange) {
    if (this.running || !this.page.card) return;
    Object.assign(exchange, { answer: "", values: null, note: null });
    exchange.view.rendering = new Rendering(exchange.view.answer);
    exchange.view.answer.replaceChildren();
    exchange.view.meter.replaceChildren();
    this.draw(exchange);
    this.run(exchange, exchange.view);
    this.message.focus();
  }

  messages(exchange) {
    const { system } = this.page.settings;
    const says = (role, content) => ({ role, content });
    const earlier = this.exchanges.slice(0, this.exchanges.indexOf(exchange));
    const sent = earlier.filter(({ answer, left }) => answer && !left);
    const said = sent.flatMap(({ question, answer }) => [says("user", question), says("assistant", answer)]);
    return [...(system ? [says("system", system)] : []), ...said, says("user", exchange.question)];
  }

  async run(exchange, view) {
    this.running = new AbortController();
    const { signal } = this.running;
    this.busy(view, true);
    say("The answer is being written.");
    try {
      while (!(await this.tried(exchange, view, signal))); // until it was not told to wait
    } catch (error) {
      exchange.note = noteOf(error, exchange.answer);
      if (error.status === 401) this.page.needKey(() => this.again(exchange));
      if (error.status === 0 && error.code === "unreachable") this.page.lost();
    }
    this.running = null;
    this.busy(view, false);
    this.draw(exchange);
    this.follow();
    this.keep();
    this.tell(exchange);
  }

  /** One request. False when the server is full or not ready, after waiting as it asked. */
  async tried(exchange, view, signal) {
    const meter = new Meter();
    exchange.by = this.page.cards.length > 1 ? this.page.card.id : null;
    const body = { model: this.page.card.id, messages: this.messages(exchange), ...this.page.settings.request() };
    let finish = null;
    const update = throttled(() => {
      view.rendering.update(exchange.answer);
      show(view.meter, { ...meter.values(), by: exchange.by });
      this.follow();
    });
    try {
      for await (const event of stream(body, signal)) {
        if (event.usage) meter.usage = event.usage;
        const choice = event.choices?.[0];
        finish = choice?.finish_reason ?? finish;
        if (choice?.delta?.content) {
          meter.piece();
          exchange.answer += choice.delta.content;
          update();
        }
      }
    } catch (error) {
      if ((error.status === 429 || error.status === 503) && !exchange.answer) {
        await waiting(view.note, error, signal);
        return false;
      }
      throw error;
    } finally {
      update.end();
      exchange.values = meter.pieces || meter.usage ? meter.values() : null;
      view.note.replaceChildren();
    }
    if (finish === "length") exchange.note = cut(exchange.values, this.page.card.context);
    else if (!exchange.answer) exchange.note = { calm: true, title: "The model ended its answer at once." };
    return true;
  }

  busy(view, on) {
    view.root.classList.toggle("busy", on);
    view.root.setAttribute("aria-busy", String(on));
    const send = byId("send");
    send.textContent = on ? "Stop" : "Send";
    this.page.changed();
    if (on) {
      this.follows = true;
      this.follow();
    }
  }

  follow() {
    if (this.follows) byId("main").scrollTop = byId("main").scrollHeight;
  }

  tell({ answer, note }) {
    const rest = answer.length > TOLD ? `${answer.slice(0, TOLD)} … The answer goes on in the conversation.` : answer;
    say([rest && `Answer: ${rest}`, note?.title, note?.text].filter(Boolean).join(" "));
  }

  /** Context that the conversation takes, after its last answer; null before one. */
  get used() {
    const values = this.exchanges.at(-1)?.values;
    return values?.counted ? values.prompt + values.written : null;
  }

  keep() {
    tab.set("chat", this.empty ? null : JSON.stringify(this.exchanges.map(({ view, ...plain }) => plain)));
    const { used } = this, all = this.page.card?.context;
    byId("context").textContent = used && all ? `${whole(used)} of ${whole(all)} tokens used` : "";
  }
}

/** An error as what the reader is told; null for an answer that was stopped with text in it. */
function noteOf(error, begun) {
  if (error.name === "AbortError") return begun ? null : { calm: true, title: "Stopped before anything was written." };
  if (!(error instanceof ServerError)) return { title: "This page made a mistake.", text: String(error) };
  if (error.tooLong) return { tooLong: true, title: "The conversation no longer fits.", text: error.message };
  if (error.code === "unreachable") return { title: "The server does not answer.", text: "The question is kept." };
  if (error.code === "broken") return { title: "The answer broke off.", text: error.message };
  if (error.status === 401) return { title: "The server asks for a key.", text: error.message };
  return { title: begun ? "The answer broke off." : "The server could not answer.", text: error.message };
}

/** Calls at most every DRAWN milliseconds, within a frame; `end` draws what is left. */
function throttled(draw) {
  let due = null;
  const now = () => { due = null; draw(); };
  const call = () => { due ??= setTimeout(() => requestAnimationFrame(() => due !== null && now()), DRAWN); };
  call.end = () => { if (due !== null) { clearTimeout(due); now(); } };
  return call;
}
