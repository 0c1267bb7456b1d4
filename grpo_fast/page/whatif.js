// "What if": the shown group under other options, recomputed from its stored log-probs.

const OFFERED = [
  "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "vespo", "gmpo", "reinforce",
];
const NUMBERS = {
  epsilon: "epsilon, lower clip", epsilon_high: "epsilon high, upper clip", beta: "beta, weight of the KL",
};
const CISPO_USUAL = 5;
const FIGURES = [
  ["low", "clipped low", percent], ["high", "clipped high", percent],
  ["loss", "loss of this group", short],
  ["mass", "sum of |d loss / d log-prob|", short],
  ["gaining", "of it where A > 0", short],
];

// What the sliders hold when nothing was touched.
function trainedSettings(meta) {
  const loss = meta.loss;
  return {
    loss_type: loss.loss_type, epsilon: loss.epsilon, epsilon_high: clipHigh(loss), beta: loss.beta,
    scale: "trained", dropped: new Set(),
  };
}

function usesOption(config, name) {
  if (name === "beta") return true;
  if (config.loss_type === "cispo" && config.cispo_bounds === "upper" && name === "epsilon") return false;
  return island.loss_types[config.loss_type].options.includes(name);
}

// The LossConfig of these settings; another loss type brings its own aggregation and level along.
function configOf(meta, settings) {
  const config = { ...meta.loss };
  if (settings.loss_type !== config.loss_type) {
    config.loss_type = settings.loss_type;
    for (const name of ["objective", "aggregation", "importance_sampling_level"]) config[name] = null;
    for (const [name, value] of Object.entries(island.loss_defaults)) {
      if (!island.loss_types[settings.loss_type].options.includes(name)) config[name] = value;
    }
  }
  config.beta = settings.beta;
  for (const name of ["epsilon", "epsilon_high"]) {
    if (usesOption(config, name)) config[name] = settings[name];
  }
  return config;
}

// Why this page cannot compute the config from what is stored; null where it can.
function unknownBecause(view, config, advantages, dropped, asTrained) {
  const { meta, tokens } = view.step;
  const missing = (name) => `this step has no ${name} log-probs`;
  const kind = addsUp(config);
  if (meta.unmeasured.includes("logprobs")) return missing("policy");
  if (meta.unmeasured.includes("old_logprobs")) return missing("old");
  if (!meta.loss_known && config === meta.loss) return "the log does not say which loss was trained";
  if (config.objective) return "objective is a function of the run, which this page does not have";
  if (config.top_entropy_quantile < 1 && (!tokens.keep || dropped.size)) {
    return "top_entropy_quantile is a quantile over all tokens of the step, which are not stored";
  }
  if (config.beta > 0 && !tokens.ref_logprobs) return `beta: ${missing("reference")}`;
  if (config.importance_sampling_correction !== "none" && !tokens.sampler_logprobs) {
    return `importance_sampling_correction: ${missing("sampler")}`;
  }
  if (kind === "constant" && !(config.max_completion_length ?? meta.totals.max_completion_length)) {
    return `${config.loss_type} divides by max_completion_length, which the log does not say`;
  }
  const known = asTrained && !dropped.size && view.sequences.every((s) => s.weight != null || !s.length);
  if (kind === "prompt_mean" && view.group.completions.length !== view.group.size && !known) {
    return "aggregation prompt_mean needs every completion of the group, and not all are stored";
  }
  const unit = { token_mean: "tokens", prompt_mean: "groups" }[kind] ?? "sequences";
  if (meta.totals[unit] == null) return `the log does not say how many ${unit} the step had`;
  if (config.delta != null && CLIPPED.includes(config.loss_type) && config.delta <= 1 + clipHigh(config)) {
    return `delta = ${config.delta} has to be above 1 + epsilon_high = ${short(1 + clipHigh(config))}`;
  }
  const needsAll = config.beta > 0 || config.loss_type === "dro";
  const blank = view.sequences.findIndex(
    (s, i) => !dropped.has(i) && s.live.length < s.length && (needsAll || advantages[i] !== 0),
  );
  if (blank >= 0) {
    const name = view.group.completions[blank].index;
    return `completion ${name} taught nothing and was not forwarded: its log-probs are not known`;
  }
  return null;
}

function recomputed(view, config, advantages, dropped, asTrained) {
  const reason = unknownBecause(view, config, advantages, dropped, asTrained);
  if (reason) return { reason };
  return groupLoss(view.sequences, config, view.step.meta, advantages, dropped, asTrained);
}

// {config, advantages, result} of the view as trained, once, and under its settings.
function compare(view) {
  const { meta } = view.step;
  const { settings, group } = view;
  const stored = group.completions.map((c) => c.advantage ?? 0);
  view.trained ??= {
    config: meta.loss, advantages: stored,
    result: recomputed(view, meta.loss, stored, new Set(), true),
  };
  if (!view.touched()) {
    view.whatif = view.trained;
    return;
  }
  let advantages = stored;
  if (settings.scale !== "trained" || settings.dropped.size) {
    const scale = settings.scale === "trained" ? view.rule.scale : settings.scale;
    const gone = new Set([...settings.dropped].map((i) => group.completions[i].index));
    const left = group.rewards.map((r, index) => (gone.has(index) ? null : r));
    const all = advantagesOf(left, scale, view.rule.baseline);
    advantages = group.completions.map((c) => all[c.index]);
  }
  const config = configOf(meta, settings);
  const same = config.loss_type === meta.loss.loss_type;
  view.whatif = {
    config, advantages,
    result: recomputed(view, config, advantages, settings.dropped, same),
  };
}

// A slider from 0 to a few times the trained value, in steps a person can read.
function rangeOf(name, config, trained) {
  const usual = name === "beta" ? 0.1 : config.loss_type === "cispo" ? CISPO_USUAL : 0.2;
  const most = 4 * (trained > 0 ? trained : usual);
  const step = 10 ** Math.floor(Math.log10(most / 80));
  return { max: name === "epsilon" ? Math.min(most, 1 - step) : most, step };
}

function numberControl(view, name) {
  const { config } = view.whatif;
  const trained = trainedSettings(view.step.meta)[name];
  const used = usesOption(config, name);
  let reason = used ? null : `no effect with ${config.loss_type}`;
  if (name === "beta" && !view.step.tokens.ref_logprobs) reason = "no reference log-probs in this step";
  const { max, step } = rangeOf(name, config, trained);
  const attributes = { min: 0, max, step, disabled: reason != null, "aria-label": NUMBERS[name] };
  const range = h("input", { type: "range", "data-testid": `slider-${name}`, ...attributes });
  const exact = h("input", {
    type: "number", "data-testid": `number-${name}`, ...attributes, max: null, step: "any",
  });
  const show = () => {
    range.value = view.settings[name];
    exact.value = used ? view.settings[name] : "";
  };
  const set = (text, shown) => {
    const value = Number(text);
    const allowed = text !== "" && value >= 0 && (name !== "epsilon" || value < 1);
    exact.setCustomValidity(allowed ? "" : "a number from 0 up, the lower clip below 1");
    if (!allowed) return;
    view.settings[name] = value;
    shown.value = value;
    view.changed();
  };
  range.addEventListener("input", () => set(range.value, exact));
  exact.addEventListener("input", () => set(exact.value, range));
  show();
  return h("div", { class: "control" },
    h("span", {}, NUMBERS[name]), range, exact,
    reason ? h("small", { "data-testid": `reason-${name}` }, reason) : null);
}

function choice(testid, label, options, value, set, reason = null) {
  const select = h("select", { "data-testid": testid, "aria-label": label, disabled: reason != null },
    ...options.map(([key, text, off]) => h("option", { value: key, disabled: off != null },
      off ? `${text}: ${off}` : text)));
  select.value = value;
  select.addEventListener("change", () => set(select.value));
  return h("div", { class: "control" }, h("span", {}, label), select,
    reason ? h("small", { "data-testid": `reason-${testid}` }, reason) : null);
}

function lossChoice(view) {
  const trained = view.step.meta.loss.loss_type;
  const names = OFFERED.includes(trained) ? OFFERED : [trained, ...OFFERED];
  const options = names.map((name) => {
    const settings = { ...view.settings, loss_type: name, epsilon_high: 0, dropped: new Set() };
    const reason = unknownBecause(view, configOf(view.step.meta, settings), view.whatif.advantages,
      view.settings.dropped);
    return [name, name === trained && view.step.meta.loss_known ? `${name} (as trained)` : name, name === trained ? null : reason];
  });
  return choice("whatif-loss_type", "loss type", options, view.settings.loss_type, (name) => {
    const back = trainedSettings(view.step.meta);
    const isRatio = (kind) => kind === "cispo";
    if (name === trained) view.settings.epsilon_high = back.epsilon_high;
    else if (isRatio(name) !== isRatio(view.settings.loss_type)) {
      // cispo's epsilon_high is the largest ratio itself, the others' its distance from 1.
      view.settings.epsilon_high = isRatio(name) ? CISPO_USUAL
        : isRatio(trained) ? view.settings.epsilon : back.epsilon_high;
    }
    view.settings.loss_type = name;
    view.changed(true);
  });
}

function scaleChoice(view) {
  const options = [["trained", "as trained"], ...Object.entries(SCALES)];
  return choice("whatif-scale", "advantages", options, view.settings.scale, (scale) => {
    view.settings.scale = scale;
    view.changed();
  }, view.rule.reason ?? null);
}

function drawControls(view) {
  const reset = h("button", { type: "button", "data-testid": "whatif-reset" }, "Back to as trained");
  reset.addEventListener("click", () => {
    view.settings = trainedSettings(view.step.meta);
    view.changed(true);
  });
  $("xray-controls").replaceChildren(
    lossChoice(view), ...Object.keys(NUMBERS).map((name) => numberControl(view, name)),
    scaleChoice(view), h("div", { class: "control" }, h("span", {}, "completions"),
      h("small", {}, view.rule.reason
        ? "none can be dropped: the advantages of the others could not be recomputed"
        : "the box \u201cdrop\u201d of a completion takes it out of group and step"), reset),
  );
}

function figure(which, key, result, format) {
  if (result.reason) return h("td", { class: "n" }, "\u2013");
  const value = result[key];
  return h("td", { class: "n", "data-testid": `${which}-${key}`, "data-value": String(value) },
    format(value));
}

function change(before, after) {
  if (before == null || after == null || before === after) return "";
  return before ? `${short(100 * (after / before - 1), true)} %` : "";
}

function drawFigures(view) {
  const { trained, whatif } = view;
  const rows = FIGURES.map(([key, label, format]) => h("tr", {},
    h("th", { scope: "row" }, label),
    figure("trained", key, trained.result, format), figure("whatif", key, whatif.result, format),
    h("td", { class: "n" }, change(trained.result[key], whatif.result[key]))));
  $("xray-figures").replaceChildren(
    h("thead", {}, h("tr", {}, h("td", {}), ...["as trained", "what if", "change"].map(
      (text) => h("th", { scope: "col", class: "n" }, text)))),
    h("tbody", {}, ...rows));
  const notes = [];
  if (trained.result.reason) notes.push(`As trained is not recomputed: ${trained.result.reason}.`);
  if (whatif.result.reason) notes.push(`What if is not computed: ${whatif.result.reason}.`);
  if (view.step.meta.loss.entropy_coef > 0) notes.push("The entropy bonus is left out of these figures.");
  const stored = view.group.completions.length;
  if (stored < view.group.size) notes.push(`They count the ${stored} stored of ${view.group.size} completions.`);
  $("xray-notes").textContent = notes.join(" ");
}
