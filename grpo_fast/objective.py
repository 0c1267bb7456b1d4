"""Choices of formula: what one token's loss is, and how tokens add up. Pure functions of per-token
vectors.

Shapes: `N` rows (tokens), `S` sequences. Every vector is [N] unless said otherwise; nothing here
sees the vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import LossConfig


class Segments(NamedTuple):
    """Where sequences begin and end in the rows: `lengths` counts live rows, `ids` names each row's
    sequence."""

    cu_seqlens: Tensor
    """[S+1], first 0, last N."""
    ids: Tensor
    """[N] sequence of each row."""
    lengths: Tensor
    """[S] live rows per sequence, in the dtype of the arithmetic."""

    def spread(self, per_sequence: Tensor) -> Tensor:
        """`per_sequence[ids]`: [S] -> [N]."""
        return per_sequence.index_select(0, self.ids)


def clamped(log_ratio: Tensor, limit: float) -> Tensor:
    """`log_ratio.clamp(-limit, limit)` with slope 1 everywhere; NaN stays NaN."""
    return log_ratio + (log_ratio.clamp(-limit, limit) - log_ratio).detach()


def clip_objective(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """`-min(min(ratio, delta) A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)`.

    PPO (1707.06347) with DAPO's asymmetric clip (2503.14476) and INTELLECT-2's delta (2505.07291).
    """
    capped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    clipped = ratio.clamp(1 - config.epsilon, 1 + config.clip_high)
    return -torch.minimum(capped * advantages, clipped * advantages)


def kl_divergence(logp: Tensor, ref_logp: Tensor, config: LossConfig) -> Tensor:
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, with d = logp - ref_logp (Schulman,
    "Approximating KL divergence")."""
    d = clamped(logp - ref_logp, config.log_ratio_clamp)
    if config.kl_estimator == "k1":
        return d
    return d * d / 2 if config.kl_estimator == "k2" else torch.expm1(-d) + d


class PolicyTerms(NamedTuple):
    loss: Tensor
    """weight x (objective + beta x KL)."""
    slope: Tensor
    """d(sum(loss)) / d(logp): all a kernel needs to go on to the logits."""
    ratio: Tensor
    kl: Tensor | None


def policy_terms(
    logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    config: LossConfig,
    segments: Segments | None = None,
    segment_reduce=None,
) -> PolicyTerms:
    """Loss and its slope in logp for live rows (masked ones have weight 0 and hold zeros).

    Token level: one ratio a row. Sequence level (GSPO, 2507.18071): ratio = exp(mean of log-ratios
    of the sequence), which needs `segments` and the `segment_reduce` of the chosen implementation.
    """
    sequence_level = config.importance_sampling_level == "sequence"
    # On policy the log-ratio is exactly 0 and the ratio exactly 1, but NaN stays NaN.
    log_ratio = logp - (logp if old_logp is None else old_logp)
    if sequence_level:
        live = torch.where(weights != 0, log_ratio, 0.0)
        means = segment_reduce(live, segments.cu_seqlens).to(logp.dtype) / segments.lengths.clamp(
            min=1
        )
        log_ratio = segments.spread(means)
    with torch.enable_grad():
        log_ratio = log_ratio.detach().requires_grad_()
        ratio = clamped(log_ratio, config.log_ratio_clamp).exp()
        loss = weights * clip_objective(ratio, advantages, config)
        (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    if sequence_level:
        per_sequence = segment_reduce(slope, segments.cu_seqlens).to(logp.dtype)
        slope = segments.spread(per_sequence / segments.lengths.clamp(min=1)) * (weights != 0)
    loss, ratio, kl = loss.detach(), ratio.detach(), None
    if ref_logp is not None:
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            kl = kl_divergence(leaf, ref_logp, config)
            (kl_slope,) = torch.autograd.grad(kl.sum(), leaf)
        kl = kl.detach()
        if config.beta:
            loss = loss + weights * config.beta * kl
            slope = slope + weights * config.beta * kl_slope
    return PolicyTerms(loss, slope, ratio, kl)


def token_weights(
    mask: Tensor,
    config: LossConfig,
    *,
    segments: Segments | None,
    denominator: float | Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The aggregation as one weight a token, loss = sum(weights x per-token loss): [N] bool -> [N].

    `grpo` 1 / (S n_i), `bnpo` and `dapo` 1 / N_live, `dr_grpo` 1 / (S x max_completion_length);
    `denominator` replaces S, N_live and S x max_completion_length, so that micro-batches add up to
    the step.
    """
    live = mask.to(dtype)
    if config.loss_type == "grpo":
        assert segments is not None
        sequences = segments.lengths.numel()
        per_sequence = 1 / segments.lengths.clamp(min=1)
        normaliser = max(sequences, 1) if denominator is None else denominator
        return live * segments.spread(per_sequence) / normaliser
    if denominator is not None:
        return live / denominator
    if config.loss_type == "dr_grpo":
        assert segments is not None
        assert config.max_completion_length is not None
        return live / (max(segments.lengths.numel(), 1) * config.max_completion_length)
    return live / live.sum().clamp(min=1)


@torch.no_grad()
def loss_metrics(
    *,
    mask: Tensor,
    entropy: Tensor,
    ratio: Tensor,
    kl: Tensor | None,
    advantages: Tensor,
    logp: Tensor,
    old_logp: Tensor | None,
    sampler_logp: Tensor | None,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Means over live tokens as 0-d tensors on the device, TRL's names; a quantity not measured has
    no entry."""
    live = mask.to(torch.float32)
    count = live.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(torch.float32), 0.0).sum() / count.clamp(min=1)

    low = (ratio < 1 - config.epsilon) & (advantages < 0)
    high = (ratio > 1 + config.clip_high) & (advantages > 0)
    metrics = {
        "n_tokens": count,
        "entropy": mean(entropy),
        "clip_ratio/low_mean": mean(low),
        "clip_ratio/high_mean": mean(high),
        "clip_ratio/region_mean": mean(low | high),
        "ratio/mean": mean(ratio),
    }
    if ratio.numel():
        # With no live token the extremes are those of an unchanged policy.
        alive = count > 0
        metrics["ratio/min"] = torch.where(alive, torch.where(mask, ratio, torch.inf).min(), 1.0)
        metrics["ratio/max"] = torch.where(alive, torch.where(mask, ratio, -torch.inf).max(), 1.0)
    if old_logp is not None:
        metrics["ratio/clamped_frac"] = mean((logp - old_logp).abs() > config.log_ratio_clamp)
    if kl is not None:
        metrics["kl"] = mean(kl)
    if sampler_logp is not None:
        gap = (logp if old_logp is None else old_logp) - sampler_logp
        metrics["sampling/sampling_logp_difference/mean"] = mean(gap.abs())
        if gap.numel():
            largest = torch.where(mask, gap.abs(), 0.0).max()
            metrics["sampling/sampling_logp_difference/max"] = largest
    return metrics
