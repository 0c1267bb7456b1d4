// The "why" card of one token: its numbers, the loss with them filled in, and the branch taken.

const WEIGHTS = {
  sequence_mean: (n) => `1 / (sequences \u00d7 ${plural(n, "token")} of this completion)`,
  token_mean: () => "1 / tokens of the step",
  constant: () => "1 / (sequences \u00d7 max_completion_length)",
  sequence_sum: () => "1 / sequences",
  prompt_mean: () => "1 / (groups \u00d7 tokens of this group)",
};

function ratioName(config) {
  return levelOf(config) === "token" ? "ratio" : "the sequence\u2019s ratio";
}

// [formula, numbers, what it means] of the policy term.
function policyLines(config, lp, r, A) {
  const bounds = boundsOf(config);
  const a = short(A, true);
  if (config.loss_type === "cispo") {
    const held = clamp(r, bounds.low, bounds.high);
    const side = r > bounds.high ? `> ${short(bounds.high)}` : r < bounds.low ? `< ${short(bounds.low)}` : null;
    return ["\u2212sg(clip(r, low, high)) A log p", `\u2212${short(held)} \u00d7 ${a} \u00d7 ${short(lp)}`,
      side ? `${ratioName(config)} ${short(r)} ${side}: the weight is held at ${short(held)}, the gradient stays`
        : `${ratioName(config)} ${short(r)} within the bounds: the weight is the ratio`];
  }
  if (bounds) return clipLines(bounds, r, A, ratioName(config));
  if (config.loss_type === "sapo") {
    const tau = A > 0 ? config.sapo_temperature_pos : config.sapo_temperature_neg;
    return ["\u2212(4 / tau) sigmoid(tau (r \u2212 1)) A",
      `\u2212(4 / ${short(tau)}) \u00d7 sigmoid(${short(tau)} \u00d7 (${short(r)} \u2212 1)) \u00d7 ${a}`,
      `tau ${short(tau)}, as A is ${A > 0 ? "above 0" : "not above 0"}: no clip, the gradient fades away from ratio 1`];
  }
  const others = {
    vespo: ["\u2212sg(phi(w)) A log p", "one weight phi a sequence, from the product of its ratios"],
    gmpo: ["\u2212exp(mean of the clipped log-ratios) A", "one geometric mean a sequence"],
    dppo_tv: ["\u2212sg(min(r, cap)) A log p", "0 once the probability has moved further than the bound"],
    dppo_kl: ["\u2212sg(min(r, cap)) A log p", "0 once the binary KL is beyond the bound"],
    dro: ["\u2212(A log p \u2212 dro_beta / 2 (log p \u2212 old)\u00b2)", "a squared pull towards the old policy"],
  };
  const [formula, meaning] = others[config.loss_type] ?? ["\u2212A log p", "the plain policy gradient"];
  return [formula, `A = ${a}, log p = ${short(lp)}, r = ${short(r)}`, meaning];
}

function clipLines({ low, high, cap, dual }, r, A, name) {
  const a = short(A, true), shown = short(r);
  const free = cap < Infinity ? `min(${shown}, ${short(cap)})` : shown;
  const formula = cap < Infinity ? "\u2212min(min(r, delta) A, clip(r, low, high) A)" : "\u2212min(r A, clip(r, low, high) A)";
  const numbers = `\u2212min(${free} \u00d7 ${a}, ${short(clamp(r, low, high))} \u00d7 ${a})`;
  const { state } = clipTerm(r, A, { low, high, cap, dual });
  const within = `[${short(low)}, ${short(high)}]`;
  const said = {
    [FREE]: `${name} ${shown} within ${within}: gradient kept`,
    [LOW]: `${name} ${shown} < ${short(low)} and A = ${a}: clipped, gradient 0`,
    [HIGH]: `${name} ${shown} > ${short(high)} and A = ${a}: clipped, gradient 0`,
    [CAPPED]: `${name} ${shown} > ${short(Math.min(cap, dual))} and A = ${a}: capped, gradient 0`,
    [BEYOND]: `${name} ${shown} outside ${within}, but A = ${a} pulls it back: gradient kept`,
  }[state];
  return [formula, numbers, A === 0 ? "A = 0: the policy term teaches nothing" : said];
}

function klLine(config, kl) {
  if (!config.beta) return null;
  const bias = config.use_bias_correction_kl ? " \u00d7 ratio" : "";
  return `+ beta \u00d7 KL${bias} (${config.kl_estimator}) = ${short(config.beta)} \u00d7 ${short(kl)}`;
}

function branch(view, which, place, token) {
  const { config, advantages, result } = view[which];
  const title = which === "trained" ? "As trained" : "What if";
  const terms = result.reason ? null : result.terms[place];
  if (!terms) {
    return h("p", {}, h("b", {}, `${title}: `), result.reason ?? "this completion is dropped");
  }
  const sequence = view.sequences[place];
  const [formula, numbers, meaning] = policyLines(config, sequence.lp[token], terms.ratio[token], advantages[place]);
  const loss = terms.weight * terms.term[token];
  const said = config.beta ? meaning.replace("gradient 0", "policy gradient 0, the KL stays") : meaning;
  const cell = (name, value) => h("output", { "data-testid": `why-${which}-${name}`, "data-value": String(value) }, short(value, true));
  return h("div", { class: "branch", "data-testid": `why-${which}` },
    h("b", {}, `${title}, ${config.loss_type}`),
    h("code", {}, formula), h("code", {}, `= ${numbers}`),
    terms.kl && config.beta ? h("code", {}, klLine(config, terms.kl[token])) : null,
    h("p", { "data-testid": `why-${which}-branch` }, said),
    h("p", {}, "loss ", cell("loss", loss), ` = ${short(terms.term[token], true)} \u00d7 ${short(terms.weight)}, which is `,
      WEIGHTS[addsUp(config)](sequence.length), "; d loss / d log p ", cell("slope", terms.slope[token])));
}

function storedMass(view) {
  if (view.step.mass == null) {
    view.step.mass = view.step.tokens.gradient_mass.reduce((sum, x) => (x > 0 ? sum + x : sum), 0);
  }
  return view.step.mass;
}

function numbersOf(view, at) {
  const { tokens } = view.step;
  const value = (name) => (tokens[name] ? tokens[name][at] : null);
  const lp = value("logprobs"), mass = value("gradient_mass");
  const old = tokens.old_logprobs ? short(value("old_logprobs")) : "the policy\u2019s own: on policy";
  return [
    ["log-prob", Number.isNaN(lp) ? short(lp) : `${short(lp)} (p = ${short(Math.exp(lp))})`], ["old", old],
    ["reference", short(value("ref_logprobs"))], ["sampler", short(value("sampler_logprobs"))],
    ["ratio", short(value("ratio"))], ["KL", short(value("kl"))], ["entropy", short(value("entropy"))],
    ["gradient mass", Number.isNaN(mass) ? short(mass)
      : `${short(mass)}, ${percent((mass || 0) / (storedMass(view) || 1))} of the stored tokens\u2019`],
  ];
}

function drawWhy(view, place, token) {
  const completion = view.group.completions[place];
  const at = completion.start + token;
  const { tokens } = view.step;
  const id = tokens.token_ids[at];
  const head = h("h4", {}, h("code", { class: "piece" }, shownPiece(id)),
    h("small", {}, ` token ${token} of ${completion.stop - completion.start}, id ${id}, completion ${completion.index}`));
  const parts = [head];
  const fork = view.forks.find((f) => f.depth === token && f.members.includes(place));
  if (fork) parts.push(h("p", {}, `\u25c6 ${forkText(fork)}`));
  if (!tokens.mask[at]) parts.push(h("p", {}, "Masked: not in the loss."));
  else if (notForwarded(view.step, at)) {
    parts.push(h("p", {}, "Not forwarded: its advantage is 0, so it teaches nothing, and its log-prob was not computed."));
  } else {
    const rows = numbersOf(view, at).flatMap(([name, text]) => [
      h("dt", {}, name), h("dd", { "data-testid": `why-${name}` }, text)]);
    if (tokens.keep && !tokens.keep[at]) {
      parts.push(h("p", {}, "Not among the tokens of highest entropy (top_entropy_quantile): no policy term."));
    }
    if (tokens.sampler_logprobs && isPhantom(view, at)) {
      parts.push(h("p", {}, "To the sampler\u2019s log-prob the ratio is beyond the bounds, to the old policy\u2019s it is not: rounding alone."));
    }
    parts.push(h("dl", {}, ...rows), branch(view, "trained", place, token));
    if (view.touched()) parts.push(branch(view, "whatif", place, token));
  }
  $("xray-why").replaceChildren(...parts);
}
