"""The specification: every op in eager PyTorch, on any device, in any floating dtype.

Shapes: `N` rows, `V` vocabulary, `D` hidden, `S` sequences, `T` packed tokens, `P` groups. Nothing
here is fast and nothing is chunked; gradients are autograd's own. Kernels, `torch_kernels` and
`ops` are tested against this file in float64, and this file imports none of them. What a token's
log-prob is worth, and how tokens add up, is in `reference_loss`; advantages are in
`reference_advantage`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .loss_config import LossConfig
from .reference_advantage import group_advantage as group_advantage
from .reference_advantage import multi_reward_advantage as multi_reward_advantage
from .reference_loss import (
    TOKEN_OBJECTIVES,
    Bounds,
    Tokens,
    kl_divergence,
    objective_of,
    of_top_entropy,
    policy_factor,
    token_weights,
)


class LogProb(NamedTuple):
    logp: Tensor
    lse: Tensor
    entropy: Tensor
    other_squares: Tensor
    """Sum of p^2 over the vocabulary without the target."""


def token_logprob(logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> LogProb:
    """`log_softmax(logits / temperature).gather(targets)`, its log-sum-exp, its entropy in nats and
    the sum of the squared probabilities of all but the target.

    logits [N, V], targets [N], temperature a number or [N] -> four [N].
    """
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    scaled = logits / scale
    lse = scaled.logsumexp(-1)
    logps = scaled - lse[:, None]
    index = targets[:, None].long()
    logp = logps.gather(1, index)[:, 0]
    # A vocabulary entry of probability 0 adds 0 to the entropy, not 0 * inf.
    finite = torch.where(logps == -math.inf, 0.0, logps)
    probs = logps.exp()
    others = probs.scatter(1, index, 0.0)
    return LogProb(logp, lse, -(probs * finite).sum(-1), others.square().sum(-1))


class PolicyRows(NamedTuple):
    """One entry a row, 0 where masked."""

    loss: Tensor
    """weight x (policy term + beta x KL) - entropy weight x entropy, summing to the loss."""
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None
    """As it enters the loss, so times the ratio under `bias_corrected_kl`."""
    mass: Tensor
    """L2 norm of the row of d(loss) / d(logits), the entropy bonus left out."""
    slope: Tensor
    """d(loss) / d(logp), the entropy bonus left out."""


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    policy_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    objective: str = "clip",
    low: float = 0.0,
    high: float = 0.0,
    cap: float = math.inf,
    dual_clip: float = math.inf,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    bias_corrected_kl: bool = False,
    log_ratio_clamp: float = 20.0,
) -> PolicyRows:
    """`weights (policy_weights objective + beta KL) - entropy_weights entropy` of N rows, every
    token by itself.

    logits [N, V], everything else [N]. `weights` is the aggregation: a row of weight 0 is masked
    and adds exactly 0 to everything, whatever it holds. What low, high, cap and dual_clip bound is
    the objective's choice, see `reference_loss`.
    """
    bounds = Bounds(low, high, cap, dual_clip)

    def term(tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        loss = TOKEN_OBJECTIVES[objective](tokens, bounds)
        loss = loss if policy_weights is None else policy_weights * loss
        return _with_kl(loss, tokens, beta, kl_estimator, bias_corrected_kl)

    return _policy_rows(
        logits,
        targets,
        advantages,
        weights,
        mask=weights != 0,
        old_logp=old_logp,
        ref_logp=ref_logp,
        temperature=temperature,
        log_ratio_clamp=log_ratio_clamp,
        term=term,
        bonus=lambda tokens: entropy_weights,
    )


def policy_rows(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    entropy_weights: Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    temperature: float | Tensor,
    config: LossConfig,
) -> PolicyRows:
    """`policy_loss` with every option of a LossConfig, formulas of a whole sequence included.

    mask [N] bool; weights [N], the aggregation; cu_seqlens [S+1], or None where nothing is per
    sequence. entropy_weights [N] are those of live tokens; without them the bonus is entropy_coef x
    the mean entropy, over `entropy_denominator` in place of the number of tokens. The top-entropy
    mask acts on either.
    """

    def term(tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        loss = policy_factor(tokens, config) * objective_of(config)(tokens)
        return _with_kl(
            loss, tokens, config.beta, config.kl_estimator, config.use_bias_correction_kl
        )

    def bonus(tokens: Tokens) -> Tensor | None:
        acting = of_top_entropy(tokens, config.top_entropy_quantile).to(tokens.entropy.dtype)
        if entropy_weights is not None:
            return entropy_weights * acting
        count = acting.sum() if entropy_denominator is None else entropy_denominator
        return config.entropy_coef * acting / count if config.entropy_coef else None

    return _policy_rows(
        logits,
        targets,
        advantages,
        weights,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logp=old_logp,
        ref_logp=ref_logp,
        sampler_logp=sampler_logp,
        temperature=temperature,
        level=config.level,
        log_ratio_clamp=config.log_ratio_clamp,
        term=term,
        bonus=bonus,
    )


def _with_kl(
    loss: Tensor, tokens: Tokens, beta: float, estimator: str, bias_corrected: bool
) -> tuple[Tensor, Tensor | None]:
    """`loss + beta KL`, and the KL where there is a reference."""
    if tokens.ref_logprobs is None:
        return loss, None
    kl = kl_divergence(
        tokens.logprobs, tokens.ref_logprobs, estimator=estimator, limit=tokens.log_ratio_clamp
    )
    kl = kl * tokens.ratio if bias_corrected else kl
    return (loss + beta * kl if beta else loss), kl


def _policy_rows(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None = None,
    temperature: float | Tensor,
    level: str = "token",
    log_ratio_clamp: float,
    term: Callable[[Tokens], tuple[Tensor, Tensor | None]],
    bonus: Callable[[Tokens], Tensor | None],
) -> PolicyRows:
    """Rows of `weights term(tokens) - bonus(tokens) entropy`."""

    def live(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(mask, x, torch.zeros_like(x))

    def tokens_of(logits: Tensor) -> Tokens:
        logits = torch.where(mask[:, None], logits, 0.0)
        rows = token_logprob(logits, live(targets), temperature=temperature)
        logp = live(rows.logp)
        return Tokens(
            logprobs=logp,
            old_logprobs=logp.detach() if old_logp is None else live(old_logp),
            ref_logprobs=live(ref_logp),
            sampler_logprobs=live(sampler_logp),
            advantages=live(advantages),
            mask=mask,
            entropy=live(rows.entropy),
            cu_seqlens=cu_seqlens,
            level=level,
            log_ratio_clamp=log_ratio_clamp,
        )

    tokens = tokens_of(logits)
    loss, kl = term(tokens)
    loss = live(weights * loss)
    entropy_weights = bonus(tokens)
    if entropy_weights is not None:
        loss = loss - live(entropy_weights * tokens.entropy)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        seen = tokens_of(leaf)
        # What a user's objective makes of the entropy is a bonus too.
        seen = replace(seen, entropy=seen.entropy.detach())
        summed = live(weights * term(seen)[0]).sum()
        gradient, slope = torch.autograd.grad(summed, (leaf, seen.logprobs))
    return PolicyRows(
        loss,
        tokens.logprobs,
        tokens.entropy,
        live(tokens.ratio),
        live(kl),
        gradient.norm(dim=-1),
        live(slope),
    )


def segment_reduce(x: Tensor, cu_seqlens: Tensor, *, reduce: str = "sum") -> Tensor:
    """`[reduce(x[a:b]) for a, b in pairwise(cu_seqlens)]`: x [T], cu_seqlens [S+1] -> [S]; an empty
    segment is 0."""
    parts = [x[a:b] for a, b in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True)]
    sums = torch.stack([part.sum() for part in parts]) if parts else x.new_zeros(0)
    return sums if reduce == "sum" else sums / torch.diff(cu_seqlens).clamp(min=1).to(x.dtype)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **rows,
) -> PolicyRows:
    """`grpo_loss(cap(logit_scale * (hidden @ weight.T + bias)))`, `cap(x) = softcap tanh(x /
    softcap)`: hidden [T, D], weight [V, D], bias [V], the rest as in `grpo_loss`."""
    hidden = torch.where(mask[:, None], hidden, 0.0)
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return grpo_loss(logits, targets, advantages, mask=mask, **rows)


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    group_ids: Tensor | None = None,
    temperature: float | Tensor | None = None,
    denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    config: LossConfig,
) -> PolicyRows:
    """The loss a LossConfig asks for, as rows that sum to it: logits [T, V], cu_seqlens [S+1],
    group_ids [S], everything else [T].

    `temperature` replaces the config's, `denominator` the normaliser of the aggregation and
    `entropy_denominator` the number of tokens that the entropy bonus is a mean over.
    """
    return policy_rows(
        logits,
        targets,
        advantages,
        token_weights(mask, cu_seqlens, config, denominator, group_ids).to(logits.dtype),
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logp=old_logp,
        ref_logp=ref_logp,
        sampler_logp=sampler_logp,
        entropy_denominator=entropy_denominator,
        temperature=config.temperature if temperature is None else temperature,
        config=config,
    )
