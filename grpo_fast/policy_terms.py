"""A loss and its derivatives with respect to log-probs and entropies: all a kernel needs to go on
to the logits.

Shapes: `N` rows (tokens). Every vector is [N].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .correction import correction_weight, needs_sequences, off_policy_keep
from .loss_config import LossConfig
from .objective import kl_divergence, policy_objective
from .rows import LossRows
from .tokens import Tokens, tokens_of


class PolicyTerms(NamedTuple):
    loss: Tensor
    """weights x (policy term + beta x KL) - entropy_weights x entropy."""
    slope: Tensor
    """d(sum(loss)) / d(logp): all a kernel needs to go on to the logits."""
    entropy_slope: Tensor | None
    """d(sum(loss)) / d(entropy), where there is one."""
    ratio: Tensor
    kl: Tensor | None


def gradient_mass(
    slope: Tensor, logp: Tensor, other_squares: Tensor, temperature: float | Tensor
) -> Tensor:
    """`|slope| / temperature x sqrt((1 - p)^2 + sum of the other p^2)`: the norm of a row of
    d(loss) / d(logits)."""
    return slope.abs() / temperature * (torch.expm1(logp).square() + other_squares).sqrt()


def policy_terms(
    logp: Tensor,
    entropy: Tensor,
    rows: LossRows,
    config: LossConfig,
    *,
    reduce: Callable[[Tensor, Tensor], Tensor],
) -> PolicyTerms:
    """Loss and its slopes for any config; masked rows give 0. All [N]."""

    if not needs_sequences(config, on_policy=rows.old_logp is None):
        # Rows come as the workspace cuts them: a sum over what is here would not be the sequence's.
        rows = rows.replace(segments=None)

    def objective(tokens: Tokens) -> Tensor:
        if tokens.correction is None:
            tokens.correction = correction_weight(tokens, config)
        loss = policy_objective(tokens, config)
        if config.off_policy_mask_threshold is not None:
            loss = torch.where(off_policy_keep(tokens, config.off_policy_mask_threshold), loss, 0.0)
        return loss

    return row_terms(
        logp,
        entropy,
        rows,
        objective,
        beta=config.beta,
        kl_estimator=config.kl_estimator,
        bias_corrected_kl=config.use_bias_correction_kl,
        log_ratio_clamp=config.log_ratio_clamp,
        level=config.level,
        corrects_itself=config.loss_type == "vespo" and config.objective is None,
        own=config.objective is not None,
        reduce=reduce,
    )


def row_terms(
    logp: Tensor,
    entropy: Tensor,
    rows: LossRows,
    objective: Callable[[Tokens], Tensor],
    *,
    beta: float,
    kl_estimator: str,
    bias_corrected_kl: bool,
    log_ratio_clamp: float,
    level: str = "token",
    corrects_itself: bool = False,
    own: bool = False,
    reduce: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> PolicyTerms:
    """`weights (correction keep objective + beta KL) - entropy_weights entropy` and its slopes."""
    mask = rows.mask
    with_entropy = own or rows.entropy_weights is not None
    with torch.enable_grad():
        logp = torch.where(mask, logp.detach(), 0.0).requires_grad_()
        entropy = torch.where(mask, entropy.detach(), 0.0).requires_grad_(with_entropy)
        tokens = tokens_of(logp, entropy, rows, level=level, limit=log_ratio_clamp, reduce=reduce)
        loss = objective(tokens)
        if tokens.correction is not None and not corrects_itself:
            loss = loss * tokens.correction
        loss = loss if rows.keep is None else loss * rows.keep
        kl = None
        if rows.ref_logp is not None:
            kl = kl_divergence(logp, rows.ref_logp, estimator=kl_estimator, limit=log_ratio_clamp)
            kl = kl * tokens.ratio if bias_corrected_kl else kl
            # A KL that is only measured must not reach the loss, also where it is NaN.
            loss = loss + beta * kl if beta else loss
        loss = torch.where(mask, rows.weights * loss, 0.0)
        if rows.entropy_weights is not None:
            loss = loss - rows.entropy_weights * entropy
        leaves = (logp, entropy) if with_entropy else (logp,)
        slopes = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    slopes = [torch.where(mask, torch.zeros_like(loss) if s is None else s, 0.0) for s in slopes]
    ratio = torch.where(mask, tokens.ratio.detach(), 0.0)
    kl = None if kl is None else torch.where(mask, kl.detach(), 0.0)
    return PolicyTerms(loss.detach(), slopes[0], slopes[1] if with_entropy else None, ratio, kl)
