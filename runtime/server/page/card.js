// The package's card, from the `card` that the server puts beside a model's OpenAI fields at /v1/models/NAME.
//
// `read` is the one place that knows the server's form; what a server leaves out is left out here.

import { legend, outside, picture, table } from "./bits.js";
import { bytes, el, facts, many, whole } from "./dom.js";

/** A model of /v1/models as the page uses it. */
export function read(model) {
  const told = model.card ?? {};
  const kept = (told.kept_float ?? []).map(({ name, why }) => [name, why]);
  const layers = Object.fromEntries((told.layers ?? []).map(({ name, ...layer }) => [name, layer]));
  for (const [name] of kept) layers[name] ??= { bits: "float" };
  return {
    id: model.id,
    task: told.task ?? "generate",
    target: told.target,
    family: told.model_type,
    context: told.max_context ?? null,
    pooling: told.pooling ?? null,
    prompts: told.prompts ?? {},
    engine: told.engine ?? {},
    size: told.bytes ?? null,
    layers,
    kept,
    fusions: told.fusions ?? {},
    quality: told.quality ?? null,
    source: told.source ?? null,
    calibration: told.calibration ?? {},
    versions: told.versions ?? {},
    defaults: told.defaults ?? {},
    chat: told.chat ?? true,
  };
}

const LIBRARIES = {
  onnxruntime: "ONNX Runtime",
  onnxruntime_genai: "ONNX Runtime GenAI",
  openvino: "OpenVINO",
  openvino_genai: "OpenVINO GenAI",
};
const library = (engine) => LIBRARIES[engine.library] ?? engine.library ?? engine.engine;
const percent = (share) => `${(100 * share).toFixed(1)} %`;

function spread({ stderr }, digits, unit = 1) {
  return Number.isFinite(stderr) ? `± ${(unit * stderr).toFixed(digits)}` : "";
}

/** Bits that occur, as "4 and 8". */
function widths({ layers }) {
  const found = new Set(Object.values(layers).map((layer) => layer.bits).filter((bits) => bits !== "float"));
  return [...found].sort().join(", ").replace(/, (?=\d+$)/, " and ");
}

/** A few facts on a package: what it is, how large, what runs it. */
export function summary(card) {
  const engine = library(card.engine), { threads } = card.engine;
  return [
    widths(card) && `${widths(card)} bits`,
    card.size && bytes(card.size),
    loss(card),
    engine && `${engine}${threads ? ` on ${many(threads, "thread")}` : ""}`,
    card.context && `${whole(card.context)} tokens of context`,
  ].filter(Boolean);
}

function loss({ quality }) {
  if (quality?.kl) return `KL ${quality.kl.mean.toFixed(3)} to the float model`;
  return quality?.cosine ? `cosine ${quality.cosine.mean.toFixed(4)} to the float model` : null;
}

/** What the empty page shows of a package. */
export function front(card) {
  const told = summary(card).flatMap((fact, at, all) => [el("span", {}, fact, at < all.length - 1 && " ·"), " "]);
  const drawn = picture(card.layers, { labels: false });
  return [el("h2", {}, card.id), el("p", { class: "summary" }, told), ...(drawn ? [drawn] : [])];
}

/** The card's sections. */
export function body(card) {
  const { layers } = card;
  const bits = [picture, legend, outside, table];
  return [
    figures(card),
    Object.keys(layers).length > 0 && section("Bits per layer", ...bits.map((part) => part(layers))),
    section("What runs it", facts(running(card), { class: "rows" })),
    Object.keys(card.fusions).length > 0 && section("Fused in the graph", fused(card)),
    card.kept.length > 0 && section("Kept in float", facts(card.kept, { class: "rows" })),
    section("Made from", facts(made(card), { class: "rows" })),
  ].filter(Boolean);
}

const section = (title, ...content) => el("section", {}, el("h3", {}, title), content.filter(Boolean));

const UNMEASURED = "No record of what was lost lies beside this package; roundexport verify measures it.";

function figures(card) {
  const { quality } = card;
  const figure = (value, unit) => el("span", {}, value, unit && " ", unit && el("small", {}, unit));
  const rows = [
    ["Size on disk", card.size && figure(...bytes(card.size).split(" "))],
    ["Bits", widths(card)],
    ...(quality?.kl ? [
      ["KL to the float model", figure(quality.kl.mean.toFixed(4), `nats ${spread(quality.kl, 4)}`)],
      ["Same first choice", figure(percent(quality.top1.mean), spread(quality.top1, 1, 100))],
    ] : []),
    ...(quality?.cosine ? [
      ["Cosine to the float model", figure(quality.cosine.mean.toFixed(4), spread(quality.cosine, 4))],
      ["Order of neighbors kept", figure(percent(quality.rank_correlation))],
    ] : []),
  ];
  return el("section", {}, facts(rows, { class: "figures" }), el("p", {}, quality ? measured(quality) : UNMEASURED));
}

function measured(quality) {
  if (quality.perplexity) {
    const { perplexity, perplexity_float: before, tokens } = quality;
    const over = `over ${whole(tokens)} held-out tokens on this package's runtime`;
    return `Perplexity ${perplexity.toFixed(2)}, the float model's ${before.toFixed(2)}, ${over}.`;
  }
  return `Over ${whole(quality.texts)} held-out texts, on this package's runtime.`;
}

function running({ engine, target, family, context, pooling }) {
  const precision = Object.entries(engine.precision ?? {});
  return [
    ["made for", target],
    ["engine", [library(engine), engine.version?.split("-")[0]].filter(Boolean).join(" ")],
    ["device", engine.device],
    ["threads", engine.threads],
    ...precision.map(([name, value]) => [name.replaceAll("_", " "), String(value ?? "")]),
    ["attention", engine.attention],
    ["family", family],
    ["pooling", pooling && `${pooling.mode}${pooling.normalize ? ", normalized" : ""}`],
    ["longest context", context && `${whole(context)} tokens`],
  ];
}

function fused({ fusions }) {
  const often = Object.entries(fusions).sort((one, other) => other[1] - one[1]);
  return facts(often.map(([rule, count]) => [rule, `× ${whole(count)}`]), { class: "rows counts" });
}

function made({ source, calibration, versions }) {
  const { num_samples: samples, sample_len: length } = calibration;
  return [
    ["model", source],
    ["tuned on", calibration.source],
    ["of", samples && length && `${whole(samples)} × ${whole(length)} tokens`],
    ["with", Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ")],
  ];
}
