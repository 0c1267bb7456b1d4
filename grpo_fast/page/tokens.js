// Tokens as coloured spans: one channel at a time, quantised to classes so that CSS has the colours.

// Upper edges of the classes d-3 ... d3 and s0 ... s5.
const RATIO_EDGES = [0.5, 0.8, 0.98, 1.02, 1.25, 2];
const GAP_EDGES = [-0.5, -0.1, -0.01, 0.01, 0.1, 0.5];
const STATES = [
  ["k0", "within the bounds"], ["k1", "held at the lower bound"], ["k2", "held at the upper bound"],
  ["k3", "capped (delta, dual clip)"], ["k4", "outside, gradient not clipped"],
];
const CHANNELS = {
  ratio: { label: "ratio", array: "ratio", edges: RATIO_EDGES, diverging: true },
  logprob: { label: "log-prob", array: "logprobs", edges: [0.05, 0.5, 1, 2, 4], sign: -1 },
  kl: { label: "KL", array: "kl", edges: [0.0001, 0.001, 0.01, 0.1, 1] },
  entropy: { label: "entropy", array: "entropy", edges: [0.05, 0.25, 0.5, 1, 2] },
  clip: { label: "clip state" },
  mass: { label: "gradient mass", array: "gradient_mass", edges: [0.01, 0.05, 0.1, 0.25, 0.5], relative: true },
  gap: { label: "sampler gap", array: "sampler_logprobs", values: gapsOf, edges: GAP_EDGES, diverging: true },
};

// The arrays of a step may lack some: {name: why it cannot be chosen}.
function channelReason(view, name) {
  const { array } = CHANNELS[name];
  const measured = (column) => view.step.tokens[column] && !view.step.meta.unmeasured.includes(column);
  if (array && !measured(array)) return "not measured in this step";
  if (name === "gap" && !measured("old_logprobs") && !measured("logprobs")) return "no log-probs but the sampler\u2019s";
  if (name === "clip" && view.whatif.result.reason) return "not computed under these options";
  return null;
}

// Edges in the channel's own unit; gradient mass is seen beside the largest of the step.
function edgesOf(view, name) {
  const { edges, relative } = CHANNELS[name];
  if (!relative) return edges;
  const most = largest(view);
  return edges.map((e) => e * most);
}

// [T] of the step; what is computed from several arrays, once.
function valuesOf(view, { array, values }) {
  if (!values) return array ? view.step.tokens[array] : null;
  view.step.computed ??= new Map();
  if (!view.step.computed.has(values)) view.step.computed.set(values, values(view.step));
  return view.step.computed.get(values);
}

function largest(view) {
  if (view.step.largest == null) {
    let most = 0;
    for (const x of view.step.tokens.gradient_mass) if (x > most) most = x;
    view.step.largest = most;
  }
  return view.step.largest;
}

function classFor(name, edges, value) {
  const { diverging, sign } = CHANNELS[name];
  const x = sign ? sign * value : value;
  if (Number.isNaN(x)) return "";
  let level = 0;
  while (level < edges.length && (diverging ? x > edges[level] : x >= edges[level])) level++;
  return diverging ? `d${level - 3}` : `s${level}`;
}

// Colour, clip cue, what is not in the loss and forks of the tokens from ... to of a completion.
function paintTokens(view, place, from, to) {
  const { start } = view.group.completions[place];
  const { spans } = view.columns[place];
  const { tokens } = view.step;
  const channel = CHANNELS[view.channel];
  const values = valuesOf(view, channel);
  const lens = view.channel === "gap";
  const edges = channel.array ? edgesOf(view, view.channel) : null;
  const states = view.whatif.result.reason ? null : view.whatif.result.terms[place]?.state;
  const forks = view.forkPlaces[place];
  for (let t = from; t < to; t++) {
    const span = spans[t], at = start + t;
    let name = "t off";
    if (tokens.mask[at] && notForwarded(view.step, at)) name = "t blank";
    else if (tokens.mask[at]) {
      const state = states ? states[t] : FREE;
      const colour = values ? classFor(view.channel, edges, values[at]) : STATES[state][0];
      const cue = state === LOW ? " low" : state === HIGH ? " high" : state === CAPPED ? " capped" : "";
      name = `t ${colour}${lens ? "" : cue}${lens && isPhantom(view, at) ? " phantom" : ""}`;
    }
    if (forks.has(t)) name += " fork";
    if (span.className !== name) span.className = name;
  }
}

const shownPieces = new Map();

function shownPiece(id) {
  if (!shownPieces.has(id)) shownPieces.set(id, visible(pieceOf(id)) || "\u2205");
  return shownPieces.get(id);
}

// Colours again, in place, of what is shown.
function paint(view) {
  view.columns.forEach(({ spans, waiting }, place) => {
    for (let from = 0; from < spans.length; from += CHUNK) {
      if (!waiting.has(from / CHUNK)) paintTokens(view, place, from, Math.min(from + CHUNK, spans.length));
    }
  });
  drawLegend(view);
  markActive(view);
}

function rangeText(edges, level, format) {
  if (level === 0) return `< ${format(edges[0])}`;
  if (level === edges.length) return `\u2265 ${format(edges[level - 1])}`;
  return `${format(edges[level - 1])} \u2026 ${format(edges[level])}`;
}

function drawLegend(view) {
  const channel = CHANNELS[view.channel];
  const entry = (name, text) => h("li", {}, h("span", { class: `t ${name}` }, "ab"), ` ${text}`);
  const entries = [];
  if (!channel.array) STATES.forEach(([name, text]) => entries.push(entry(name, text)));
  else {
    const edges = edgesOf(view, view.channel);
    const format = channel.diverging ? short : channel.sign ? (x) => brief(-x) : brief;
    for (let level = 0; level <= edges.length; level++) {
      const name = channel.diverging ? `d${level - 3}` : `s${level}`;
      let text = rangeText(edges, level, format);
      if (channel.sign) text = text.replace("<", ">").replace("\u2265", "\u2264");
      entries.push(entry(name, text));
    }
  }
  if (view.channel === "gap") entries.push(entry("phantom", `clipped by rounding, if the sampler were the old policy: ${phantomsIn(view)}`));
  else entries.push(entry("low", "clipped low"), entry("high", "clipped high"));
  entries.push(entry("off", "not in the loss"),
    entry("blank", "not forwarded: teaches nothing"), entry("fork", "fork"));
  const about = {
    ratio: "policy over old policy", logprob: "nats", kl: "nats, to the reference", entropy: "nats",
    clip: "under the options of \u201cwhat if\u201d",
    gap: "nats, old policy less sampler: with the same weights 0 but for rounding",
    mass: "norm of the token\u2019s row of d(loss) / d(logits)",
  }[view.channel];
  $("xray-legend").replaceChildren(h("li", { class: "about" }, `${channel.label}, ${about}:`), ...entries);
}

function drawChannels(view) {
  const buttons = Object.entries(CHANNELS).map(([name, { label }], place) => {
    const reason = channelReason(view, name);
    const button = h("button", {
      type: "button", "data-testid": `channel-${name}`, "aria-pressed": String(name === view.channel),
      disabled: reason != null, title: reason ?? `key ${place + 1}`,
    }, label);
    button.addEventListener("click", () => setChannel(view, name));
    return button;
  });
  $("xray-channels").replaceChildren(...buttons);
}

function setChannel(view, name) {
  if (channelReason(view, name)) return;
  view.channel = name;
  drawChannels(view);
  paint(view);
  remember(view);
}

// One token of the group can be reached by Tab; arrows move on from it.
function markActive(view) {
  view.marked?.removeAttribute("tabindex");
  view.marked?.removeAttribute("aria-current");
  const { place, token } = view.active;
  const span = view.columns[place]?.spans.length ? spanAt(view, place, token) : null;
  view.marked = span;
  span?.setAttribute("tabindex", "0");
  if (view.pinned) span?.setAttribute("aria-current", "true");
}

function moveTo(view, place, token, focus) {
  const spans = view.columns[place]?.spans;
  if (!spans?.length) return;
  unfoldAround(view, place);
  view.active = { place, token: clamp(token, 0, spans.length - 1) };
  view.pinned = true;
  markActive(view);
  drawWhy(view, place, view.active.token);
  if (focus) view.marked.focus({ preventScroll: false });
  remember(view);
}
