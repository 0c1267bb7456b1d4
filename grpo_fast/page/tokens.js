// Tokens as coloured spans: one channel at a time, quantised to classes so that CSS has the colours.

// Upper edges of the classes d-3 ... d3 and s0 ... s5.
const RATIO_EDGES = [0.5, 0.8, 0.98, 1.02, 1.25, 2];
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
};

// The arrays of a step may lack some: {name: why it cannot be chosen}.
function channelReason(view, name) {
  const { array } = CHANNELS[name];
  if (array && (!view.step.tokens[array] || view.step.meta.unmeasured.includes(array))) return "not measured in this step";
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

// The class of every token of one completion: colour, clip cue, what is not in the loss.
function classesOf(view, place) {
  const { start, stop } = view.group.completions[place];
  const { tokens } = view.step;
  const channel = CHANNELS[view.channel];
  const values = channel.array ? tokens[channel.array] : null;
  const edges = channel.array ? edgesOf(view, view.channel) : null;
  const states = view.whatif.result.reason ? null : view.whatif.result.terms[place]?.state;
  const classes = [];
  for (let at = start; at < stop; at++) {
    if (!tokens.mask[at]) classes.push("t off");
    else if (notForwarded(view.step, at)) classes.push("t blank");
    else {
      const state = states ? states[at - start] : FREE;
      const colour = values ? classFor(view.channel, edges, values[at]) : STATES[state][0];
      const cue = state === LOW ? " low" : state === HIGH ? " high" : state === CAPPED ? " capped" : "";
      classes.push(`t ${colour}${cue}`);
    }
  }
  return classes;
}

function spansOf(view, place) {
  const { start, stop } = view.group.completions[place];
  const ids = view.step.tokens.token_ids;
  const { meta } = view.step;
  const box = document.createDocumentFragment();
  const spans = [];
  for (let at = start; at < stop; at++) {
    const span = document.createElement("span");
    const text = shownPiece(ids[at]);
    span.textContent = isEos(meta, ids[at]) ? `\u25a0${text}` : text;
    span.token = at - start;
    spans.push(span);
    box.append(span);
  }
  return { box, spans };
}

const shownPieces = new Map();

function shownPiece(id) {
  if (!shownPieces.has(id)) shownPieces.set(id, visible(pieceOf(id)) || "\u2205");
  return shownPieces.get(id);
}

// Colours again, in place: 65,000 spans keep their nodes.
function paint(view) {
  view.columns.forEach(({ spans }, place) => {
    const classes = classesOf(view, place);
    const forks = view.forkPlaces[place];
    spans.forEach((span, t) => {
      const name = forks.has(t) ? `${classes[t]} fork` : classes[t];
      if (span.className !== name) span.className = name;
    });
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
  entries.push(entry("low", "clipped low"), entry("high", "clipped high"), entry("off", "not in the loss"),
    entry("blank", "not forwarded: teaches nothing"), entry("fork", "fork"));
  const about = {
    ratio: "policy over old policy", logprob: "nats", kl: "nats, to the reference", entropy: "nats",
    clip: "under the options of \u201cwhat if\u201d",
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
  const span = view.columns[view.active.place]?.spans[view.active.token];
  view.marked = span ?? null;
  span?.setAttribute("tabindex", "0");
  if (view.pinned) span?.setAttribute("aria-current", "true");
}

function moveTo(view, place, token, focus) {
  const spans = view.columns[place]?.spans;
  if (!spans?.length) return;
  view.active = { place, token: clamp(token, 0, spans.length - 1) };
  view.pinned = true;
  markActive(view);
  drawWhy(view, place, view.active.token);
  if (focus) view.marked.focus({ preventScroll: false });
  remember(view);
}
