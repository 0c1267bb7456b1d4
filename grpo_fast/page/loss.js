// The loss from stored log-probs on, in float64: reference_loss.py and its slopes by hand.
// A sequence is {lp, old, ref, sampler, mask}, one entry a token; `live` are the places that count.

const VESPO_FLOOR = Math.log(1e-8);
const VESPO_LIMIT = 20;
const DPPO_EPS = 1e-8;
const CLIPPED = ["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo"];
// Why a token's policy gradient is gone or bounded, as the clip channel shows it.
const FREE = 0, LOW = 1, HIGH = 2, CAPPED = 3, BEYOND = 4;

function clamp(x, low, high) {
  return x < low ? low : x > high ? high : x;
}

// x - x: an infinite log-ratio gives NaN, as in the kernel.
function clamped(x, limit) {
  return clamp(x, -limit, limit) + (x - x);
}

function clipHigh(config) {
  return config.epsilon_high ?? config.epsilon;
}

function levelOf(config) {
  const whole = config.loss_type === "gspo" || config.loss_type === "luspo";
  return config.importance_sampling_level ?? (whole ? "sequence" : "token");
}

function addsUp(config) {
  return config.aggregation ?? island.loss_types[config.loss_type].aggregation;
}

// {low, high, cap, dual} of the ratio, for the losses that hold one at bounds; else null.
function boundsOf(config) {
  const high = clipHigh(config);
  if (CLIPPED.includes(config.loss_type)) {
    return {
      low: 1 - config.epsilon, high: 1 + high,
      cap: config.delta ?? Infinity, dual: config.dual_clip ?? Infinity,
    };
  }
  if (config.loss_type !== "cispo") return null;
  if (config.cispo_bounds === "upper") return { low: 0, high };
  return { low: 1 - config.epsilon, high: 1 + high };
}

function sumOver(live, value) {
  let sum = 0;
  for (const t of live) sum += value(t);
  return sum;
}

function meanOver(live, value) {
  return sumOver(live, value) / Math.max(live.length, 1);
}

function ratiosOf(sequence, live, config) {
  const ratio = new Float64Array(sequence.lp.length);
  if (levelOf(config) === "token") {
    for (const t of live) ratio[t] = Math.exp(clamped(sequence.logRatio[t], config.log_ratio_clamp));
    return ratio;
  }
  const mean = meanOver(live, (t) => sequence.logRatio[t]);
  return ratio.fill(Math.exp(clamped(mean, config.log_ratio_clamp)));
}

// exp(old - sampler) of a token, or of the sum or mean over the sequence, held at its bounds.
function correctionOf(sequence, live, config) {
  const weight = new Float64Array(sequence.lp.length).fill(1);
  const [scope, rule] = config.importance_sampling_correction.split("_");
  if (scope === "none") return weight;
  const gap = (t) => (Number.isNaN(sequence.sampler[t]) ? 0 : sequence.old[t] - sequence.sampler[t]);
  const whole = { sequence: sumOver, geometric: meanOver }[scope]?.(live, gap);
  const low = config.importance_sampling_min ?? 0;
  const high = config.importance_sampling_max ?? Infinity;
  for (const t of live) {
    const w = Math.exp(whole ?? gap(t));
    if (rule === "truncate") weight[t] = clamp(w, low, high);
    else weight[t] = w < low || w > high ? 0 : w;
  }
  return weight;
}

function keepsSequence(sequence, live, config, advantage) {
  const threshold = config.off_policy_mask_threshold;
  if (threshold == null || advantage >= 0) return true;
  const behaviour = sequence.sampler ?? sequence.old;
  const drift = meanOver(live, (t) => {
    const d = behaviour[t] - sequence.lp[t];
    return Number.isNaN(d) ? 0 : d;
  });
  return drift <= threshold;
}

// Objectives return {value, byLogp, byRatio, state}: the term and its partial derivatives.

function clipTerm(r, A, { low, high, cap, dual }) {
  const free = Math.min(r, cap) * A;
  const held = clamp(r, low, high) * A;
  const useFree = free <= held;
  let value = -Math.min(free, held);
  let byRatio = 0;
  if (useFree ? r <= cap : r >= low && r <= high) byRatio = -A;
  if (A < 0 && value > -dual * A) {
    value = -dual * A;
    byRatio = 0;
  }
  let state = FREE;
  if (r < low) state = A < 0 ? LOW : BEYOND;
  if (r > high) state = A > 0 ? HIGH : byRatio === 0 && A < 0 ? CAPPED : BEYOND;
  return { value, byLogp: 0, byRatio, state };
}

function cispoTerm(lp, r, A, { low, high }) {
  const weight = clamp(r, low, high);
  const state = r < low ? LOW : r > high ? HIGH : FREE;
  return { value: -weight * A * lp, byLogp: -weight * A, byRatio: 0, state };
}

function sapoTerm(r, A, config) {
  const tau = A > 0 ? config.sapo_temperature_pos : config.sapo_temperature_neg;
  const gate = 1 / (1 + Math.exp(-tau * (r - 1)));
  return { value: (-4 / tau) * gate * A, byLogp: 0, byRatio: -4 * gate * (1 - gate) * A, state: FREE };
}

function dppoTerm(lp, old, r, A, config) {
  const p = Math.exp(lp), before = Math.exp(old), high = clipHigh(config);
  let above = p - before > high, below = p - before < -config.epsilon;
  if (config.loss_type === "dppo_kl") {
    // A log-prob that rounding put above 0 is one of probability 1.
    const others = (x) => Math.max(-Math.expm1(x), 0) + DPPO_EPS;
    const rest = Math.log(others(old) / others(lp));
    const kl = before * (old - lp) + (1 - before) * rest;
    above = kl > high && p > before;
    below = kl > config.epsilon && p < before;
  }
  const blocked = A > 0 ? above : below;
  const weight = blocked ? 0 : Math.min(r, config.delta ?? 20);
  const state = blocked ? (A > 0 ? HIGH : LOW) : FREE;
  return { value: -A * weight * lp, byLogp: -A * weight, byRatio: 0, state };
}

// phi of the whole sequence: VESPO's weight of every token.
function vespoWeight(sequence, live, config, advantage) {
  let log = sumOver(live, (t) => clamp(sequence.logRatio[t], -VESPO_LIMIT, VESPO_LIMIT));
  if (config.importance_sampling_correction !== "none") {
    const weight = correctionOf(sequence, live, config);
    const logOf = (t) => clamp(Math.log(weight[t]), VESPO_FLOOR, VESPO_LIMIT);
    const byToken = config.importance_sampling_correction.startsWith("token");
    log += byToken ? sumOver(live, logOf) : live.length ? logOf(live[0]) : 0;
  }
  log = clamp(log, VESPO_FLOOR, VESPO_LIMIT);
  const side = advantage >= 0 ? "pos" : "neg";
  const k = config[`vespo_k_${side}`], decay = config[`vespo_lambda_${side}`];
  return Math.exp(decay + k * log - decay * Math.exp(log));
}

// GMPO: the ratio is exp of the mean clipped log-ratio; `passes` is each token's part in its slope.
function gmpoRatio(sequence, live, config, advantage) {
  const passes = new Float64Array(sequence.lp.length);
  const sign = Math.sign(advantage), high = clipHigh(config);
  const mean = meanOver(live, (t) => {
    const x = sequence.logRatio[t];
    passes[t] = (sign > 0 && x <= high) || (sign < 0 && x >= -config.epsilon) ? 1 : 0;
    const held = clamp(x, -config.epsilon, high);
    return sign > 0 ? Math.min(x, held) : sign < 0 ? Math.max(x, held) : 0;
  });
  return { ratio: Math.exp(clamped(mean, config.log_ratio_clamp)), passes };
}

function objectiveOf(sequence, live, config, A, ratio) {
  const { lp, old, logRatio } = sequence;
  const bounds = boundsOf(config);
  switch (config.loss_type) {
    case "cispo":
      return (t) => cispoTerm(lp[t], ratio[t], A, bounds);
    case "sapo":
      return (t) => sapoTerm(ratio[t], A, config);
    case "dppo_tv":
    case "dppo_kl":
      return (t) => dppoTerm(lp[t], old[t], ratio[t], A, config);
    case "vespo": {
      const phi = vespoWeight(sequence, live, config, A);
      return (t) => ({ value: -phi * A * lp[t], byLogp: -phi * A, byRatio: 0, state: FREE });
    }
    case "dro": {
      const c = config.dro_beta, x = logRatio;
      const value = (t) => -(lp[t] * A - (c / 2) * x[t] * x[t]);
      return (t) => ({ value: value(t), byLogp: c * x[t] - A, byRatio: 0, state: FREE });
    }
    case "gpg":
    case "reinforce":
      return (t) => ({ value: -lp[t] * A, byLogp: -A, byRatio: 0, state: FREE });
    default:
      return (t) => clipTerm(ratio[t], A, bounds);
  }
}

// {value, byLogp} of the KL estimator at d = logp - ref.
function klTerm(difference, config) {
  const d = clamped(difference, config.log_ratio_clamp);
  const told = (value, slope) => ({ value, byLogp: config.kl_estimator.endsWith("+") ? d : slope });
  switch (config.kl_estimator.replace("+", "")) {
    case "k1": return told(d, 1);
    case "k2": return told((d * d) / 2, d);
    case "abs": return told(Math.abs(d), Math.sign(d));
    default: return told(Math.expm1(-d) + d, -Math.expm1(-d));
  }
}

// Per token of one completion: term (unweighted), slope d(loss)/d(logp), ratio, kl, state.
function sequenceTerms(sequence, config, advantage, weight) {
  const n = sequence.lp.length;
  const live = sequence.live;
  const ratio = ratiosOf(sequence, live, config);
  const out = {
    ratio, weight, advantage,
    term: new Float64Array(n), slope: new Float64Array(n), kl: null, state: new Uint8Array(n),
  };
  const own = levelOf(config) !== "sequence";
  const factor = correctionOf(sequence, live, config);
  if (config.loss_type === "vespo") factor.fill(1);
  if (config.top_entropy_quantile < 1) factor.forEach((w, t) => { factor[t] = w * sequence.keep[t]; });
  if (!keepsSequence(sequence, live, config, advantage)) factor.fill(0);
  const gmpo = config.loss_type === "gmpo" ? gmpoRatio(sequence, live, config, advantage) : null;
  const objective = gmpo ? null : objectiveOf(sequence, live, config, advantage, ratio);
  let shared = 0, sharedByGmpo = 0;
  if (sequence.ref) out.kl = new Float64Array(n);
  for (const t of live) {
    const policy = gmpo
      ? { value: -gmpo.ratio * advantage, byLogp: 0, byRatio: 0, state: FREE }
      : objective(t);
    let byRatio = factor[t] * policy.byRatio;
    out.term[t] = factor[t] * policy.value;
    out.slope[t] = factor[t] * policy.byLogp;
    out.state[t] = policy.state;
    if (gmpo) {
      sharedByGmpo -= (factor[t] * advantage * gmpo.ratio) / live.length;
      if (!gmpo.passes[t] && advantage) out.state[t] = advantage > 0 ? HIGH : LOW;
    }
    if (sequence.ref) {
      const kl = klTerm(sequence.lp[t] - sequence.ref[t], config);
      const times = config.use_bias_correction_kl ? ratio[t] : 1;
      out.kl[t] = kl.value * times;
      if (config.beta) {
        out.term[t] += config.beta * out.kl[t];
        out.slope[t] += config.beta * kl.byLogp * times;
        if (config.use_bias_correction_kl) byRatio += config.beta * kl.value;
      }
    }
    if (own) out.slope[t] += byRatio * ratio[t];
    else shared += (byRatio * ratio[t]) / live.length;
  }
  for (const t of live) {
    out.slope[t] = weight * (out.slope[t] + shared + (gmpo ? sharedByGmpo * gmpo.passes[t] : 0));
  }
  return out;
}

// What a completion's tokens weigh in the step's loss, without the dropped ones.
// lengths: live tokens of every stored completion of the group; dropped: a Set of their places.
function weightsOf(config, meta, lengths, dropped, asTrained) {
  const { totals } = meta;
  const gone = [...dropped];
  const goneTokens = gone.reduce((sum, i) => sum + lengths[i], 0);
  const kind = addsUp(config);
  const longest = config.max_completion_length ?? totals.max_completion_length;
  const unit = { token_mean: "tokens", prompt_mean: "groups" }[kind] ?? "sequences";
  const perSequence = kind === "constant" ? longest : 1;
  let normaliser = (asTrained ? meta.denominator : null) ?? totals[unit] * perSequence;
  if (unit === "tokens") normaliser -= goneTokens;
  if (unit === "sequences") normaliser -= gone.length * perSequence;
  if (kind === "token_mean") normaliser = Math.max(normaliser, 1);
  const groupTokens = lengths.reduce((sum, n) => sum + n, 0) - goneTokens;
  return lengths.map((n, i) => {
    if (dropped.has(i)) return 0;
    if (kind === "sequence_mean") return 1 / Math.max(n, 1) / normaliser;
    if (kind === "prompt_mean") return 1 / Math.max(groupTokens, 1) / normaliser;
    return 1 / normaliser;
  });
}

// The group's part of the step's loss, and what it does to its tokens.
function groupLoss(sequences, config, meta, advantages, dropped, asTrained) {
  const lengths = sequences.map((s) => s.length);
  const computed = weightsOf(config, meta, lengths, dropped, asTrained);
  // The step's own weights, where the log has them.
  const own = asTrained && !dropped.size;
  const weights = sequences.map((s, i) => (own ? s.weight : null) ?? computed[i]);
  const result = { loss: 0, mass: 0, gaining: 0, low: 0, high: 0, measured: 0, terms: [] };
  sequences.forEach((sequence, i) => {
    const terms = dropped.has(i) ? null : sequenceTerms(sequence, config, advantages[i], weights[i]);
    result.terms.push(terms);
    for (const t of terms ? sequence.live : []) {
      result.loss += terms.weight * terms.term[t];
      result.mass += Math.abs(terms.slope[t]);
      if (advantages[i] > 0) result.gaining += Math.abs(terms.slope[t]);
      result.low += terms.state[t] === LOW;
      result.high += terms.state[t] === HIGH;
      result.measured += 1;
    }
  });
  result.low /= Math.max(result.measured, 1);
  result.high /= Math.max(result.measured, 1);
  return result;
}
