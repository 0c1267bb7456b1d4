// The precision lens: what sampler and trainer make of the same token before any step was taken.
// log(policy / sampler) = log(policy / old) + log(old / sampler): the policy moved by the first part,
// the second is rounding alone.

// log(old / sampler) of every token of the step, NaN where one is not measured; null without a sampler.
function gapsOf({ tokens }) {
  if (!tokens.sampler_logprobs) return null;
  const old = tokens.old_logprobs ?? tokens.logprobs;
  return tokens.sampler_logprobs.map((sampler, at) => old[at] - sampler);
}

// Whether the ratio to the old policy is within the bounds, and to the sampler's log-prob it is not:
// a trainer that takes the sampler's for the old policy's clips this token for rounding.
function isPhantom(view, at) {
  const known = view.step.meta.loss_known && levelOf(view.trained.config) === "token";
  const bounds = known ? boundsOf(view.trained.config) : null;
  if (!bounds) return false;
  const { tokens } = view.step;
  const old = tokens.old_logprobs ?? tokens.logprobs;
  const moved = Math.exp(tokens.logprobs[at] - old[at]);
  const seen = Math.exp(tokens.logprobs[at] - tokens.sampler_logprobs[at]);
  const within = (ratio) => ratio >= bounds.low && ratio <= bounds.high;
  return within(moved) && (seen < bounds.low || seen > bounds.high);
}

function phantomsIn(view) {
  let count = 0;
  for (const { start, stop } of view.group.completions) {
    for (let at = start; at < stop; at++) count += view.step.tokens.mask[at] === 1 && isPhantom(view, at);
  }
  return count;
}
