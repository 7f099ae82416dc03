// The package's card, from the `card` that the server puts beside a model's OpenAI fields at /v1/models/NAME.
//
// `read` is the one place that knows the server's form; what a server leaves out is left out here.

import { legend, outside, picture, table } from "./bits.js";
import { bytes, el, facts, whole } from "./dom.js";

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
    engine: told.engine ?? {},
    size: told.bytes ?? null,
    bits: told.bits_per_weight ?? null,
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

const LIBRARIES = { onnxruntime: "ONNX Runtime", openvino: "OpenVINO", onnxruntime_genai: "ONNX Runtime GenAI", openvino_genai: "OpenVINO GenAI" };
const library = (engine) => LIBRARIES[engine.library] ?? engine.library ?? engine.engine;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const spread = (figure, digits) => (Number.isFinite(figure.stderr) ? ` ± ${figure.stderr.toFixed(digits)}` : "");

/** Bits that occur, as "4 and 8". */
function widths({ layers }) {
  const found = new Set(Object.values(layers).map((layer) => layer.bits).filter((bits) => bits !== "float"));
  return [...found].sort().join(", ").replace(/, (?=\d+$)/, " and ");
}

/** A few facts on a package: what it is, how large, what runs it. */
export function summary(card) {
  const engine = library(card.engine);
  return [
    card.bits ? `${card.bits.toFixed(2)} bits per weight` : widths(card) && `${widths(card)} bits`,
    card.size && bytes(card.size),
    loss(card),
    engine && `${engine}${card.engine.threads ? ` on ${card.engine.threads} ${card.engine.threads === 1 ? "thread" : "threads"}` : ""}`,
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
  return [el("h1", {}, card.id), el("p", { class: "summary" }, told), picture(card.layers, { labels: false })].filter(Boolean);
}

/** The card's sections. */
export function body(card) {
  return [
    figures(card),
    Object.keys(card.layers).length > 0 && section("Bits per layer", picture(card.layers), legend(card.layers), outside(card.layers), table(card.layers)),
    section("What runs it", facts(running(card), { class: "rows" })),
    Object.keys(card.fusions).length > 0 && section("Fused in the graph", fused(card)),
    card.kept.length > 0 && section("Kept in float", facts(card.kept, { class: "rows" })),
    section("Made from", facts(made(card), { class: "rows" })),
  ].filter(Boolean);
}

const section = (title, ...content) => el("section", {}, el("h3", {}, title), content.filter(Boolean));

function figures(card) {
  const { quality } = card;
  const figure = (value, unit) => el("span", {}, value, unit && " ", unit && el("small", {}, unit));
  const rows = [
    ["Size on disk", card.size && figure(...bytes(card.size).split(" "))],
    card.bits ? ["Bits per weight", figure(card.bits.toFixed(2))] : ["Bits", widths(card)],
    ...(quality?.kl ? [
      ["KL to the float model", figure(quality.kl.mean.toFixed(4), `nats${spread(quality.kl, 4)}`)],
      ["Same first choice", figure(percent(quality.top1.mean), spread({ stderr: 100 * quality.top1.stderr }, 1).trim())],
    ] : []),
    ...(quality?.cosine ? [
      ["Cosine to the float model", figure(quality.cosine.mean.toFixed(4), spread(quality.cosine, 4).trim())],
      ["Order of neighbors kept", figure(percent(quality.rank_correlation))],
    ] : []),
  ];
  const missing = "No record of what was lost comes with this package; roundexport verify measures it against the float model.";
  return el("section", {}, facts(rows, { class: "figures" }), !quality && el("p", {}, missing),
    quality && el("p", {}, measured(quality)));
}

function measured(quality) {
  if (quality.perplexity) {
    const { perplexity, perplexity_float: before, tokens } = quality;
    return `Perplexity ${perplexity.toFixed(2)}, the float model's ${before.toFixed(2)}, over ${whole(tokens)} held-out tokens on this package's runtime.`;
  }
  return `Over ${whole(quality.texts)} held-out texts, on this package's runtime.`;
}

function running({ engine, target, family, context, pooling }) {
  const precision = typeof engine.precision === "object" && engine.precision ? Object.entries(engine.precision) : [["precision", engine.precision]];
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

const fused = ({ fusions }) => facts(Object.entries(fusions).sort((one, other) => other[1] - one[1]).map(([rule, count]) => [rule, `× ${whole(count)}`]), { class: "rows counts" });

function made({ source, calibration, versions }) {
  const { num_samples: samples, sample_len: length } = calibration;
  return [
    ["model", source],
    ["tuned on", calibration.source],
    ["of", samples && length && `${whole(samples)} × ${whole(length)} tokens`],
    ["with", Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ")],
  ];
}
