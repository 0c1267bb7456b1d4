"""What one token's loss is: pure functions of per-token vectors. Nothing here sees the vocabulary.

Each objective is a function (tokens, bounds) -> loss [N] of the policy term, its derivative taken
by autograd; a user's own is (tokens, config) -> loss [N]. Shapes: `N` rows (tokens).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .loss_config import CLIPPED, LossConfig
from .plugins import load_function
from .tokens import Tokens, clamped

# TRL's and the paper's bounds of VESPO's log-weights.
VESPO_LOG_LIMIT = 20.0
VESPO_LOG_LEAST = math.log(1e-8)
DPPO_EPS = 1e-8


class Bounds(NamedTuple):
    """The numbers of an objective; which of them it reads, and as what, its docstring says."""

    low: float = 0.0
    high: float = 0.0
    cap: float = math.inf
    dual_clip: float = math.inf


def either(condition: Tensor, yes: float, no: float, *, like: Tensor) -> Tensor:
    """`torch.where(condition, yes, no)`, which alone would round two numbers to float32."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def clip(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-min(min(r, cap) A, clip(r, low, high) A)`, and at most `-dual_clip A` where A < 0.

    PPO (1707.06347) with DAPO's asymmetric clip (2503.14476), INTELLECT-2's cap (`delta`,
    2505.07291) and the dual clip (1912.09729).
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    capped = ratio.clamp(max=bounds.cap) * advantages
    loss = -torch.minimum(capped, ratio.clamp(bounds.low, bounds.high) * advantages)
    if bounds.dual_clip == math.inf:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -bounds.dual_clip * advantages), loss)


def cispo(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-sg(clip(r, low, high)) A logp` (MiniMax-M1, 2506.13585)."""
    weight = tokens.ratio.detach().clamp(bounds.low, bounds.high)
    return -weight * tokens.advantages * tokens.logprobs


def sapo(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-(4 / tau) sigmoid(tau (r - 1)) A`, tau = high where A > 0, else low (2511.20347)."""
    tau = either(tokens.advantages > 0, bounds.high, bounds.low, like=tokens.logprobs)
    return -torch.sigmoid(tau * (tokens.ratio - 1)) * (4 / tau) * tokens.advantages


def gmpo(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-exp(mean_t m_t) A`, m the log-ratio clipped to [-low, high] on the side A gains from
    (2507.20673)."""
    sign = tokens.advantages.sign()
    held = tokens.log_ratio.clamp(-bounds.low, bounds.high)
    mean = tokens.sequence_mean(sign * torch.minimum(sign * tokens.log_ratio, sign * held))
    return -clamped(mean, tokens.log_ratio_clamp).exp() * tokens.advantages


def vespo(tokens: Tokens, config: LossConfig) -> Tensor:
    """`-sg(phi(w)) A logp`, phi = w^k exp(lambda (1 - w)), w the sequence's ratio times the
    sampler's correction (2602.10693)."""
    with torch.no_grad():
        limit = VESPO_LOG_LIMIT
        log_w = tokens.sequence_sum(tokens.log_ratio.clamp(-limit, limit))
        if tokens.correction is not None:
            log_weight = tokens.correction.log().clamp(VESPO_LOG_LEAST, limit)
            by_token = config.importance_sampling_correction.startswith("token")
            log_w = log_w + (tokens.sequence_sum(log_weight) if by_token else log_weight)
        log_w = log_w.clamp(VESPO_LOG_LEAST, limit)
        gains = tokens.advantages >= 0
        k = either(gains, config.vespo_k_pos, config.vespo_k_neg, like=log_w)
        decay = either(gains, config.vespo_lambda_pos, config.vespo_lambda_neg, like=log_w)
        phi = (decay + k * log_w - decay * log_w.exp()).exp()
    return -phi * tokens.advantages * tokens.logprobs


def _dppo(tokens: Tokens, bounds: Bounds, above: Tensor, below: Tensor) -> Tensor:
    # Written so that NaN blocks nothing and surfaces.
    blocked = torch.where(tokens.advantages > 0, above, below)
    ratio = tokens.ratio.detach().clamp(max=bounds.cap)
    return -torch.where(blocked, 0.0, ratio) * tokens.advantages * tokens.logprobs


def dppo_tv(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-sg(min(r, cap)) A logp` while p - p_old <= high (A > 0) or >= -low (A <= 0)
    (2602.04879)."""
    moved = (tokens.logprobs.exp() - tokens.old_logprobs.exp()).detach()
    return _dppo(tokens, bounds, moved > bounds.high, moved < -bounds.low)


def dppo_kl(tokens: Tokens, bounds: Bounds) -> Tensor:
    """The same while the token's binary KL is within high (A > 0) or low, or p moves back
    (2602.04879)."""
    with torch.no_grad():
        p, old = tokens.logprobs.exp(), tokens.old_logprobs.exp()
        # An old log-prob that rounding put above 0 is one of probability 1.
        rest = (-torch.expm1(tokens.logprobs)).clamp(min=0)
        rest_old = (-torch.expm1(tokens.old_logprobs)).clamp(min=0)
        kl = rest_old * ((rest_old + DPPO_EPS) / (rest + DPPO_EPS)).log() - old * tokens.log_ratio
        above, below = (kl > bounds.high) & (p > old), (kl > bounds.low) & (p < old)
    return _dppo(tokens, bounds, above, below)


def dro(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-(A logp - low / 2 (logp - old)^2)`, low = dro_beta (2405.19107)."""
    return bounds.low / 2 * tokens.log_ratio.square() - tokens.advantages * tokens.logprobs


def reinforce(tokens: Tokens, bounds: Bounds) -> Tensor:
    """`-A logp`, the plain policy gradient; GPG (2504.02546) is this with rescaled advantages."""
    return -tokens.advantages * tokens.logprobs


# Those a kernel knows too, under the same name.
TOKEN_OBJECTIVES = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "dro": dro,
    "reinforce": reinforce,
}


def objective_name(config: LossConfig) -> str:
    """The objective of a loss type."""
    if config.loss_type in CLIPPED:
        return "clip"
    return "reinforce" if config.loss_type == "gpg" else config.loss_type


def bounds_of(config: LossConfig) -> Bounds:
    """The numbers of the loss type's objective, in the meaning of its docstring."""
    name = objective_name(config)
    if name == "clip":
        dual = math.inf if config.dual_clip is None else config.dual_clip
        return Bounds(1 - config.epsilon, 1 + config.clip_high, config.cap, dual)
    if name == "cispo":
        if config.cispo_bounds == "upper":
            return Bounds(0.0, config.clip_high)
        return Bounds(1 - config.epsilon, 1 + config.clip_high)
    if name == "sapo":
        return Bounds(config.sapo_temperature_neg, config.sapo_temperature_pos)
    if name == "dro":
        return Bounds(config.dro_beta)
    return Bounds(config.epsilon, config.clip_high, config.cap)


def policy_objective(tokens: Tokens, config: LossConfig) -> Tensor:
    """The policy term of each token, before correction and aggregation: [N]."""
    if config.objective is not None:
        function = config.objective
        function = load_function(function) if isinstance(function, str) else function
        return function(tokens, config)
    if config.loss_type == "vespo":
        return vespo(tokens, config)
    function = gmpo if config.loss_type == "gmpo" else TOKEN_OBJECTIVES[objective_name(config)]
    return function(tokens, bounds_of(config))


def kl_divergence(logp: Tensor, ref_logp: Tensor, *, estimator: str, limit: float) -> Tensor:
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d|, with d = logp - ref_logp (Schulman,
    "Approximating KL divergence"); `+`: that value with the gradient of k2."""
    d = clamped(logp - ref_logp, limit)
    if estimator.endswith("+"):
        value = kl_divergence(logp, ref_logp, estimator=estimator[:-1], limit=limit)
        slope = d * d / 2
        return value.detach() + slope - slope.detach()
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    return d * d / 2 if estimator == "k2" else torch.expm1(-d) + d
