// Advantages of one group from its raw rewards, in float64: reference_advantage.py.

const ADVANTAGE_EPS = 1e-4;
const SCALES = {
  group: "by the group's standard deviation",
  none: "not scaled (Dr. GRPO)",
  mean: "by the group's mean (MaxRL)",
};

// rewards: null where unscored or dropped. All G, 0 where there is nothing to learn.
function advantagesOf(rewards, scale, baseline) {
  const scored = rewards.filter((r) => r != null);
  const n = scored.length;
  if (n < 2 || scored.every((r) => r === scored[0])) return rewards.map(() => 0);
  const sum = scored.reduce((a, b) => a + b, 0);
  const mean = sum / n;
  const std = Math.sqrt(scored.reduce((s, r) => s + (r - mean) ** 2, 0) / (n - 1));
  const [best, second] = [...scored].sort((a, b) => b - a);
  const above = {
    mean: (r) => r - mean,
    leave_one_out: (r) => r - (sum - r) / (n - 1),
    pass_at_k: (r) => (r === best ? best - second : 0),
  }[baseline];
  const by = { group: std + ADVANTAGE_EPS, none: 1, mean: mean > 0 ? mean : Infinity }[scale];
  return rewards.map((r) => (r == null ? 0 : above(r) / by));
}

// The rule that gave this group its stored advantages: {scale, baseline}, or {reason} in words.
function advantageRule(meta, group) {
  const { scale_rewards: scale, baseline = "mean" } = meta.advantage ?? {};
  if (scale == null) return { reason: "the log does not say how rewards became advantages" };
  if (!(scale in SCALES)) {
    return { reason: `advantages were scaled over the whole step (${scale}), which is not stored` };
  }
  if (!["mean", "leave_one_out", "pass_at_k"].includes(baseline)) {
    return { reason: `the baseline ${baseline} is not known to this page` };
  }
  const again = advantagesOf(group.rewards, scale, baseline);
  // As far apart as float32 and an almost constant group explain.
  const far = again.findIndex((a, i) => Math.abs(a - (group.advantages[i] ?? 0)) > 1e-3 * (1 + Math.abs(a)));
  if (far >= 0) {
    return {
      reason: `the stored advantages are not those of the stored rewards (completion ${far}: ` +
        `${short(group.advantages[far])}, from its reward ${short(again[far])})`,
    };
  }
  return { scale, baseline };
}
