// What the page carries: metadata as JSON, arrays deflated and in base64, unpacked when first shown.

const island = JSON.parse(document.getElementById("xray-data")?.textContent ?? "null");
const ARRAYS = { int32: Int32Array, float32: Float32Array, uint8: Uint8Array };
const unpacked = new Map();

function $(id) {
  return document.getElementById(id);
}

// h("td", {class: "n", "data-testid": "x"}, "text", node, ...): text goes in as text, never as HTML.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

async function inflate(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let k = 0; k < bytes.length; k++) bytes[k] = binary.charCodeAt(k);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// {meta, tokens: {name: typed array}} of the embedded step at this place.
async function stepAt(place) {
  if (!unpacked.has(place)) {
    const { meta, layout, data } = island.steps[place];
    const buffer = await inflate(data);
    const tokens = {};
    let at = 0;
    for (const [name, kind, count] of layout) {
      tokens[name] = new ARRAYS[kind](buffer, at, count);
      at += Math.ceil(tokens[name].byteLength / 4) * 4;
    }
    unpacked.set(place, { meta, tokens });
  }
  return unpacked.get(place);
}

// The numbers of one completion as loss.js reads them; without old log-probs the policy's own.
function sequenceOf({ tokens }, { start, stop, weight = null }) {
  const cut = (name) => (tokens[name] ? Float64Array.from(tokens[name].subarray(start, stop)) : null);
  const lp = cut("logprobs");
  const mask = tokens.mask.subarray(start, stop);
  const old = cut("old_logprobs") ?? lp;
  const live = [];
  let length = 0;
  for (let t = 0; t < lp.length; t++) {
    length += mask[t];
    if (mask[t] && !Number.isNaN(lp[t])) live.push(t);
  }
  return {
    lp, old, mask, live, length, weight,
    ref: cut("ref_logprobs"), sampler: cut("sampler_logprobs"), keep: cut("keep"),
    logRatio: lp.map((x, t) => x - old[t]),
  };
}

// Whether a token was left out because it teaches nothing; other trainers' logs may lack log-probs.
function notForwarded({ meta, tokens }, at) {
  return meta.loss_known && Number.isNaN(tokens.logprobs[at]);
}

// Four digits, a sign where asked; the whole number is in data-value of the cell that shows it.
function short(x, signed = false) {
  if (x == null || Number.isNaN(x)) return "not measured";
  if (x === 0) return "0";
  const size = Math.abs(x);
  let text = size >= 1e5 || size < 1e-4 ? x.toExponential(2) : String(Number(x.toPrecision(4)));
  if (size >= 1000 && size < 1e5) text = x.toFixed(0);
  return (signed && x > 0 ? "+" : "") + text.replace("-", "\u2212").replace("e\u2212", "e-");
}

// Two digits, for the legend.
function brief(x) {
  return short(Number(x.toPrecision(2)));
}

function percent(share) {
  return share === 0 ? "0 %" : `${short(100 * share)} %`;
}

function plural(count, noun) {
  return `${String(count).replace(/\B(?=(\d{3})+$)/g, ",")} ${noun}${count === 1 ? "" : "s"}`;
}

// Control, format and direction characters, and halves of surrogate pairs, which would hide or
// turn around what stands next to them.
const HIDDEN = /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb]|\p{Cs}/gu;

function escaped(character) {
  const code = character.codePointAt(0);
  return code < 256
    ? `\\x${code.toString(16).padStart(2, "0")}`
    : `\\u${code.toString(16).padStart(4, "0")}`;
}

// A piece of vocabulary as a person can read it: blanks and line ends visible, nothing hidden.
function visible(text, longest = 200) {
  const cut = text.length > longest ? `${text.slice(0, longest)}\u2026` : text;
  return cut.replace(HIDDEN, (c) => (c === "\n" ? "\u23ce\n" : c === "\t" ? "\u21e5" : escaped(c)))
    .replace(/ /g, "\u200b\u00b7");
}

function isEos(meta, id) {
  return id != null && (meta.eos_token_ids ?? [meta.eos_token_id]).includes(id);
}

function inWords(reasons) {
  return (reasons ?? []).map((why) => why.replaceAll("_", " ").replace("kl", "KL")).join(", ");
}

function pieceOf(id) {
  return island.vocabulary[id] ?? `[${id}]`;
}
