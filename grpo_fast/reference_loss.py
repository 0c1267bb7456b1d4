"""The specification of the loss from log-probs on: objectives, KL, corrections, aggregation.

Shapes: `N` rows (tokens), `S` sequences, `P` groups. Every tensor is [N] unless said otherwise;
nothing here sees the vocabulary, is fast, or knows how a kernel does it. In formulas `r` is the
ratio, `A` the advantage, `lp` the log-prob and `sg` a `detach`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .loss_config import CLIPPED, LossConfig

# VESPO's own bounds (2602.10693), of a log-ratio and of the logarithm of a sequence's weight.
VESPO_FLOOR, VESPO_LIMIT = math.log(1e-8), 20.0
# DPPO's binary KL stays finite where a probability rounds to 1.
DPPO_EPS = 1e-8


def clamped(log_ratio: Tensor, limit: float) -> Tensor:
    """`log_ratio.clamp(-limit, limit)` in value and slope 1 everywhere, so that a far-off token is
    still pulled back; NaN and +-inf give NaN."""
    return log_ratio.detach().clamp(-limit, limit) + (log_ratio - log_ratio.detach())


def _either(condition: Tensor, yes: float, no: float, *, like: Tensor) -> Tensor:
    # torch.where of two numbers would round them to float32.
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What an objective may look at. Masked rows hold zeros."""

    logprobs: Tensor
    """The only ones with a gradient, beside `entropy` and the `ratio` made of them."""
    old_logprobs: Tensor
    """Those of the policy itself, detached, where none were given."""
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    """NaN where the sampler could not score a token."""
    advantages: Tensor
    mask: Tensor
    """True = counts."""
    entropy: Tensor
    cu_seqlens: Tensor | None
    """[S+1], None where nothing is per sequence."""
    level: str = "token"
    log_ratio_clamp: float = 20.0

    def sequence_sum(self, x: Tensor) -> Tensor:
        """Every token gets the sum of x over the live tokens of its sequence."""
        assert self.cu_seqlens is not None, "a formula per sequence needs cu_seqlens"
        live = torch.where(self.mask, x, 0.0)
        sums = [live[a:b].sum().expand(b - a) for a, b in pairwise(self.cu_seqlens.tolist())]
        return torch.cat([x[:0], *sums])

    def sequence_mean(self, x: Tensor) -> Tensor:
        """The same of the mean; 0 in a sequence without live tokens."""
        return self.sequence_sum(x) / self.sequence_sum(torch.ones_like(x)).clamp(min=1)

    @property
    def ratio(self) -> Tensor:
        """Policy over old policy: a token's own, or `exp(mean log-ratio)` of its sequence (GSPO,
        2507.18071), with `sequence_token` that value and the token's own slope."""
        log_ratio = self.logprobs - self.old_logprobs
        if self.level == "token":
            return clamped(log_ratio, self.log_ratio_clamp).exp()
        mean = clamped(self.sequence_mean(log_ratio), self.log_ratio_clamp)
        if self.level == "sequence_token":
            mean = mean.detach() + (self.logprobs - self.logprobs.detach())
        return mean.exp()


class Bounds(NamedTuple):
    """The numbers of a token-level objective; each one says which it reads."""

    low: float = 0.0
    high: float = 0.0
    cap: float = math.inf
    dual_clip: float = math.inf


def clip(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-min(min(r, cap) A, clip(r, low, high) A)`, and no more than `-dual_clip A` where A < 0.

    PPO (1707.06347), clip-higher (DAPO, 2503.14476), cap = delta (INTELLECT-2, 2505.07291), dual
    clip (1912.09729).
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    unclipped = ratio.clamp(max=bounds.cap) * advantages
    loss = -torch.minimum(unclipped, ratio.clamp(bounds.low, bounds.high) * advantages)
    if math.isinf(bounds.dual_clip):
        return loss
    most = -bounds.dual_clip * advantages
    return torch.where(advantages < 0, torch.minimum(loss, most), loss)


def cispo(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-sg(clip(r, low, high)) A lp`: every token keeps a gradient (MiniMax-M1, 2506.13585)."""
    weight = tokens.ratio.detach().clamp(bounds.low, bounds.high)
    return -weight * tokens.advantages * tokens.logprobs


def sapo(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-(4 / tau) sigmoid(tau (r - 1)) A` with tau = high where A > 0, low elsewhere
    (2511.20347)."""
    tau = _either(tokens.advantages > 0, bounds.high, bounds.low, like=tokens.logprobs)
    return -4 / tau * torch.sigmoid(tau * (tokens.ratio - 1)) * tokens.advantages


def dppo_tv(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-A sg(min(r, cap)) lp` while the token's probability has moved the advantage's way by no
    more than high (up) or low (down), else 0 (2602.04879)."""
    moved = tokens.logprobs.detach().exp() - tokens.old_logprobs.exp()
    valid = torch.where(tokens.advantages > 0, moved <= bounds.high, moved >= -bounds.low)
    return _dppo(tokens, bounds, valid)


def dppo_kl(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`dppo_tv` with the move measured by the KL of "this token or any other", old to new."""
    logp, old = tokens.logprobs.detach(), tokens.old_logprobs
    p, p_old = logp.exp(), old.exp()
    others = torch.log((1 - p_old + DPPO_EPS) / (1 - p + DPPO_EPS))
    divergence = p_old * (old - logp) + (1 - p_old) * others
    up = (divergence <= bounds.high) | (p <= p_old)
    down = (divergence <= bounds.low) | (p >= p_old)
    return _dppo(tokens, bounds, torch.where(tokens.advantages > 0, up, down))


def _dppo(tokens: Tokens, bounds: Bounds, valid: Tensor) -> Tensor:
    weight = tokens.ratio.detach().clamp(max=bounds.cap)
    return -tokens.advantages * weight * tokens.logprobs * valid


def dro(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-(lp A - low / 2 (lp - old)^2)` (2405.19107)."""
    log_ratio = tokens.logprobs - tokens.old_logprobs
    return -(tokens.logprobs * tokens.advantages - bounds.low / 2 * log_ratio * log_ratio)


def reinforce(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-lp A`."""
    return -tokens.logprobs * tokens.advantages


TOKEN_OBJECTIVES = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "dro": dro,
    "reinforce": reinforce,
}


def gmpo(tokens: Tokens, config: LossConfig) -> Tensor:
    """`-exp(mean over the sequence of m) A`: m the log-ratio clipped to [-epsilon, clip_high] on
    the side where the objective would gain (2507.20673)."""
    log_ratio, sign = tokens.logprobs - tokens.old_logprobs, tokens.advantages.sign()
    clipped = log_ratio.clamp(-config.epsilon, config.clip_high)
    kept = sign * torch.minimum(sign * log_ratio, sign * clipped)
    ratio = clamped(tokens.sequence_mean(kept), config.log_ratio_clamp).exp()
    return -ratio * tokens.advantages


def vespo(tokens: Tokens, config: LossConfig) -> Tensor:
    """`-sg(exp(lambda + k log w - lambda w)) A lp`, w the sequence's ratio times its correction for
    the sampler (2602.10693)."""
    log_ratio = (tokens.logprobs - tokens.old_logprobs).detach()
    log_w = tokens.sequence_sum(log_ratio.clamp(-VESPO_LIMIT, VESPO_LIMIT))
    correction = config.importance_sampling_correction
    if correction != "none":
        log_is = importance_weights(tokens, config).log().clamp(VESPO_FLOOR, VESPO_LIMIT)
        # A token's weight enters once a token, a sequence's once a sequence.
        by_token = correction.startswith("token")
        log_w = log_w + (tokens.sequence_sum(log_is) if by_token else log_is)
    log_w = log_w.clamp(VESPO_FLOOR, VESPO_LIMIT)
    up = tokens.advantages >= 0
    k = _either(up, config.vespo_k_pos, config.vespo_k_neg, like=log_w)
    decay = _either(up, config.vespo_lambda_pos, config.vespo_lambda_neg, like=log_w)
    phi = torch.exp(decay + k * log_w - decay * log_w.exp())
    return -phi * tokens.advantages * tokens.logprobs


def objective_of(config: LossConfig) -> Callable[[Tokens], Tensor]:
    """The objective of a LossConfig, a user's own first."""
    kind, high = config.loss_type, config.clip_high
    if config.objective is not None:
        return lambda tokens: config.objective(tokens, config)
    if kind in ("gmpo", "vespo"):
        return lambda tokens: {"gmpo": gmpo, "vespo": vespo}[kind](tokens, config)
    if kind in CLIPPED:
        most = math.inf if config.dual_clip is None else config.dual_clip
        bounds = Bounds(1 - config.epsilon, 1 + high, config.cap, most)
        return lambda tokens: clip(tokens, bounds)
    if kind == "cispo":
        one_sided = config.cispo_bounds == "upper"
        bounds = Bounds(0.0, high) if one_sided else Bounds(1 - config.epsilon, 1 + high)
    elif kind == "sapo":
        bounds = Bounds(config.sapo_temperature_neg, config.sapo_temperature_pos)
    elif kind in ("dppo_tv", "dppo_kl"):
        bounds = Bounds(config.epsilon, high, config.cap)
    elif kind == "dro":
        bounds = Bounds(config.dro_beta)
    else:
        kind, bounds = "reinforce", Bounds()
    return lambda tokens: TOKEN_OBJECTIVES[kind](tokens, bounds)


def kl_divergence(logp: Tensor, ref_logp: Tensor, *, estimator: str, limit: float) -> Tensor:
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d|, with d = logp - ref_logp (Schulman,
    "Approximating KL divergence"); with a `+` that value and the gradient of k2."""
    d = clamped(logp - ref_logp, limit)
    k2 = d * d / 2
    values = {"k1": d, "k2": k2, "k3": torch.expm1(-d) + d, "abs": d.abs()}
    value = values[estimator.removesuffix("+")]
    return value.detach() + (k2 - k2.detach()) if estimator.endswith("+") else value


def importance_weights(tokens: Tokens, config: LossConfig) -> Tensor:
    """`exp(old - sampler)` of a token, or of the sum or mean over its sequence: clamped to the
    bounds (truncate), or 0 outside of them (mask)."""
    sampler = tokens.sampler_logprobs
    assert sampler is not None, "importance_sampling_correction needs sampler log-probs"
    gap = torch.where(sampler.isnan(), 0.0, tokens.old_logprobs - sampler)
    scope, _, rule = config.importance_sampling_correction.partition("_")
    if scope == "sequence":
        gap = tokens.sequence_sum(gap)
    elif scope == "geometric":
        gap = tokens.sequence_mean(gap)
    weight = gap.exp()
    least, most = config.importance_sampling_min, config.importance_sampling_max
    least, most = 0.0 if least is None else least, math.inf if most is None else most
    if rule == "truncate":
        return weight.clamp(least, most)
    return torch.where((weight < least) | (weight > most), 0.0, weight)


def on_policy_enough(tokens: Tokens, threshold: float) -> Tensor:
    """False where A < 0 and the sequence's mean of `sampler - policy` log-probs (`old - policy`
    without a sampler) is above the threshold (DeepSeek-V3.2, 2512.02556)."""
    logp, sampler = tokens.logprobs.detach(), tokens.sampler_logprobs
    if sampler is None:
        gap = tokens.old_logprobs - logp
    else:
        gap = torch.where(sampler.isnan(), 0.0, sampler - logp)
    return (tokens.advantages >= 0) | (tokens.sequence_mean(gap) <= threshold)


def of_top_entropy(tokens: Tokens, share: float) -> Tensor:
    """True for the `share` of live tokens of highest entropy (2506.01939)."""
    if share == 1 or not tokens.mask.any():
        return tokens.mask
    entropy = tokens.entropy.detach()
    live = entropy[tokens.mask].double()
    return tokens.mask & (entropy >= torch.quantile(live, 1 - share))


def policy_factor(tokens: Tokens, config: LossConfig) -> Tensor:
    """Constant factor of the policy term: correction for the sampler x off-policy mask x
    top-entropy mask."""
    weights = of_top_entropy(tokens, config.top_entropy_quantile).to(tokens.logprobs.dtype)
    if config.off_policy_mask_threshold is not None:
        weights = weights * on_policy_enough(tokens, config.off_policy_mask_threshold)
    # VESPO's objective has the correction inside.
    inside = config.objective is None and config.loss_type == "vespo"
    if config.importance_sampling_correction != "none" and not inside:
        weights = weights * importance_weights(tokens, config)
    return weights


def token_weights(
    mask: Tensor,
    cu_seqlens: Tensor | None,
    config: LossConfig,
    denominator: float | Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """The aggregation as one weight a token: loss = sum(weights x per-token loss). mask [N] bool ->
    [N] float64.

    n tokens live: sequence_mean 1 / (S n of the sequence), token_mean 1 / n, constant
    1 / (S max_completion_length), sequence_sum 1 / S, prompt_mean 1 / (P n of the group) with
    group_ids [S]. `denominator` replaces S, n, S max_completion_length, S and P.
    """
    live, kind = mask.double(), config.adds_up
    if kind == "token_mean":
        return live / (live.sum().clamp(min=1) if denominator is None else denominator)
    if kind == "constant" and denominator is not None:
        return live / denominator
    assert cu_seqlens is not None, f"aggregation {kind} needs cu_seqlens"
    spans = torch.diff(cu_seqlens).long()
    per_sequence = live.new_tensor([float(part.sum()) for part in live.split(spans.tolist())])
    sequences = max(len(spans), 1)
    if kind == "constant":
        assert config.max_completion_length is not None
        return live / (sequences * config.max_completion_length)
    normaliser = sequences if denominator is None else denominator
    if kind == "sequence_sum":
        return live / normaliser
    if kind == "prompt_mean":
        assert group_ids is not None, "aggregation prompt_mean needs group_ids"
        same = group_ids[:, None] == group_ids[None, :]
        per_sequence = (same * per_sequence).sum(-1)
        normaliser = len(group_ids.unique()) if denominator is None else denominator
    return live / per_sequence.clamp(min=1).repeat_interleave(spans) / normaliser
