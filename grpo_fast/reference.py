"""The specification: every op in eager PyTorch, on any device, in any floating dtype.

Shapes: `N` rows, `V` vocabulary, `D` hidden, `S` sequences, `T` packed tokens, `P` groups. Nothing
here is fast and nothing is chunked; gradients are autograd's own. Kernels, `torch_kernels` and
`ops` are tested against this file in float64, and this file imports none of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import LossConfig


class LogProb(NamedTuple):
    logp: Tensor
    lse: Tensor
    entropy: Tensor


def token_logprob(logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> LogProb:
    """`log_softmax(logits / temperature).gather(targets)`, its log-sum-exp and its entropy in nats.

    logits [N, V], targets [N], temperature a number or [N] -> three [N].
    """
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    scaled = logits / scale
    lse = scaled.logsumexp(-1)
    logps = scaled - lse[:, None]
    logp = logps.gather(1, targets[:, None].long())[:, 0]
    # A vocabulary entry of probability 0 adds 0 to the entropy, not 0 * inf.
    finite = torch.where(logps == -math.inf, 0.0, logps)
    entropy = -(logps.exp() * finite).sum(-1)
    return LogProb(logp, lse, entropy)


def clamped(log_ratio: Tensor, limit: float) -> Tensor:
    """`log_ratio.clamp(-limit, limit)` whose slope stays 1, so that a far-off token is still pulled
    back."""
    return log_ratio + (log_ratio.clamp(-limit, limit) - log_ratio).detach()


def kl_divergence(logp: Tensor, ref_logp: Tensor, *, estimator: str, limit: float) -> Tensor:
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d with d = logp - ref_logp (Schulman, "Approximating
    KL divergence")."""
    d = clamped(logp - ref_logp, limit)
    return {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: torch.expm1(-d) + d}[
        estimator
    ]()


def clip_objective(
    ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float, delta: float | None
) -> Tensor:
    """`-min(min(ratio, delta) A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)` (PPO; delta:
    INTELLECT-2)."""
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(
        capped * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    )


class PolicyRows(NamedTuple):
    loss: Tensor
    """weight x (objective + beta x KL), summing to the loss."""
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    log_ratio_clamp: float = 20.0,
) -> PolicyRows:
    """Token-level GRPO of N rows, from logits [N, V]; everything else is [N]. `weights` is the
    aggregation, 0 = masked.

    A row of weight 0 adds exactly 0 to everything, whatever it holds.
    """
    keep = weights != 0
    targets = torch.where(keep, targets, 0)
    logits = torch.where(keep[:, None], logits, 0.0)
    logp, _, entropy = token_logprob(logits, targets, temperature=temperature)
    # without old log-probs the policy is its own: ratio 1, slope 1
    old = logp.detach() if old_logp is None else torch.where(keep, old_logp, 0.0)
    ratio = clamped(logp - old, log_ratio_clamp).exp()
    advantages = torch.where(keep, advantages, 0.0)
    loss = clip_objective(
        ratio, advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta
    )
    kl = None
    if ref_logp is not None:
        ref = torch.where(keep, ref_logp, 0.0)
        kl = kl_divergence(logp, ref, estimator=kl_estimator, limit=log_ratio_clamp)
        loss = loss + beta * kl if beta else loss
        kl = torch.where(keep, kl, 0.0)
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    return PolicyRows(
        torch.where(keep, weights * loss, zero),
        torch.where(keep, logp, zero),
        torch.where(keep, entropy, zero),
        torch.where(keep, ratio, zero),
        kl,
    )


def segment_reduce(x: Tensor, cu_seqlens: Tensor, *, reduce: str = "sum") -> Tensor:
    """`[reduce(x[a:b]) for a, b in pairwise(cu_seqlens)]`: x [T], cu_seqlens [S+1] -> [S]; an empty
    segment is 0."""
    parts = [x[a:b] for a, b in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True)]
    sums = torch.stack([part.sum() for part in parts]) if parts else x.new_zeros(0)
    return sums if reduce == "sum" else sums / torch.diff(cu_seqlens).clamp(min=1).to(x.dtype)


class GroupAdvantage(NamedTuple):
    advantages: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor


def group_advantage(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale: str = "group",
    baseline: str = "mean",
    unbiased: bool = True,
    eps: float = 1e-4,
) -> GroupAdvantage:
    """`(r - mean_group) / (std + eps)` for rewards [S]; NaN rewards are left out of every
    statistic, advantage 0.

    `mean`, `std` (of the group, NaN where undefined) and `degenerate` (fewer than two scored
    members, or all equal) are [P], groups in ascending id. `leave_one_out` subtracts the mean of
    the other members.
    """
    ids = torch.unique(group_ids)
    mean, std = rewards.new_full((len(ids),), math.nan), rewards.new_full((len(ids),), math.nan)
    degenerate = torch.ones(len(ids), dtype=torch.bool, device=rewards.device)
    advantages = torch.zeros_like(rewards)
    valid = ~rewards.isnan()
    for p, group in enumerate(ids):
        member = (group_ids == group) & valid
        r = rewards[member]
        if len(r) > 0:
            mean[p] = r.mean()
        if len(r) >= 2:
            std[p] = r.std(correction=int(unbiased))
            degenerate[p] = bool((r == r[0]).all())
        if not degenerate[p]:
            base = mean[p] if baseline == "mean" else (r.sum() - r) / (len(r) - 1)
            advantages[member] = r - base
            if scale == "group":
                advantages[member] /= std[p] + eps
    if scale == "batch":
        r = rewards[valid]
        spread = r.std(correction=int(unbiased)) if len(r) >= 2 else rewards.new_zeros(())
        advantages = torch.where(advantages == 0, 0.0, advantages / (spread + eps))
    return GroupAdvantage(advantages, mean, std, degenerate)


def token_weights(
    mask: Tensor, cu_seqlens: Tensor, config: LossConfig, denominator: float | Tensor | None
) -> Tensor:
    """The aggregation as one weight a token: loss = sum(weights x per-token loss). mask [T] bool ->
    [T]."""
    per_sequence = segment_reduce(mask.double(), cu_seqlens)
    lengths = per_sequence.repeat_interleave(torch.diff(cu_seqlens).long())
    sequences = len(cu_seqlens) - 1
    if config.loss_type == "grpo":
        normaliser = max(sequences, 1) if denominator is None else denominator
        return mask / lengths.clamp(min=1) / normaliser
    if config.loss_type == "dr_grpo":
        assert denominator is not None or config.max_completion_length is not None
        normaliser = (
            max(sequences, 1) * config.max_completion_length if denominator is None else denominator
        )
    else:
        normaliser = per_sequence.sum().clamp(min=1) if denominator is None else denominator
    return mask.double() / normaliser


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    cu_seqlens: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    config: LossConfig,
) -> PolicyRows:
    """`grpo_loss(hidden @ weight.T + bias)`: hidden [T, D], weight [V, D], the rest [T]; cu_seqlens
    [S+1]."""
    logits = torch.nn.functional.linear(torch.where(mask[:, None], hidden, 0.0), weight, bias)
    return grpo_loss(
        logits,
        targets,
        advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logp=old_logp,
        ref_logp=ref_logp,
        denominator=denominator,
        config=config,
    )


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    cu_seqlens: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    denominator: float | Tensor | None = None,
    config: LossConfig,
) -> PolicyRows:
    """GRPO of T rows of logits [T, V], token or sequence level, averaged by `config.loss_type`."""
    weights = token_weights(mask, cu_seqlens, config, denominator).to(logits.dtype)
    return policy_rows(
        logits,
        targets,
        advantages,
        weights,
        cu_seqlens=cu_seqlens,
        old_logp=old_logp,
        ref_logp=ref_logp,
        config=config,
    )


def policy_rows(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    cu_seqlens: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    config: LossConfig,
) -> PolicyRows:
    """`policy_loss` with the options of a LossConfig; at sequence level one ratio, exp(mean
    log-ratio), a sequence."""
    clip = {"epsilon": config.epsilon, "epsilon_high": config.clip_high, "delta": config.delta}
    if config.importance_sampling_level == "token":
        return policy_loss(
            logits,
            targets,
            advantages,
            weights,
            old_logp=old_logp,
            ref_logp=ref_logp,
            temperature=config.temperature,
            beta=config.beta,
            kl_estimator=config.kl_estimator,
            log_ratio_clamp=config.log_ratio_clamp,
            **clip,
        )
    mask = weights != 0
    logits = torch.where(mask[:, None], logits, 0.0)
    targets = torch.where(mask, targets, 0)
    logp, _, entropy = token_logprob(logits, targets, temperature=config.temperature)
    old = logp.detach() if old_logp is None else torch.where(mask, old_logp, 0.0)
    log_ratio = torch.where(mask, logp - old, 0.0)
    lengths = segment_reduce(mask.to(logp.dtype), cu_seqlens).clamp(min=1)
    means = segment_reduce(log_ratio, cu_seqlens) / lengths
    spread = means.repeat_interleave(torch.diff(cu_seqlens).long())
    ratio = clamped(spread, config.log_ratio_clamp).exp()
    loss = clip_objective(ratio, torch.where(mask, advantages, 0.0), **clip)
    kl = None
    if ref_logp is not None:
        ref = torch.where(mask, ref_logp, 0.0)
        kl = kl_divergence(logp, ref, estimator=config.kl_estimator, limit=config.log_ratio_clamp)
        loss = loss + config.beta * kl if config.beta else loss
        kl = torch.where(mask, kl, 0.0)
    return PolicyRows(
        torch.where(mask, weights * loss, 0.0),
        torch.where(mask, logp, 0.0),
        torch.where(mask, entropy, 0.0),
        torch.where(mask, ratio, 0.0),
        kl,
    )
