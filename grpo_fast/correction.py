"""Off-policy control: weights and masks for a sampler that is not quite the policy.

Shapes: `N` rows (tokens). Every vector is [N].
"""

import math

import torch
from torch import Tensor

from .loss_config import WHOLE_SEQUENCE, LossConfig
from .rows import LossRows
from .tokens import Tokens, tokens_of


def correction_weight(tokens: Tokens, config: LossConfig) -> Tensor | None:
    """`exp(old - sampler)` per token, or of its sum or mean over the sequence, bounded: [N], a
    constant.

    Truncated importance sampling, and masked (IcePop, 2510.18855). A token that the sampler could
    not score (NaN) counts as one on which both agree.
    """
    kind = config.importance_sampling_correction
    if kind == "none":
        return None
    gap = (tokens.old_logprobs - tokens.sampler_logprobs).detach()
    gap = torch.where(gap.isnan() & ~tokens.old_logprobs.isnan(), 0.0, gap)
    scope, _, action = kind.partition("_")
    if scope != "token":
        gap = tokens.sequence_sum(gap) if scope == "sequence" else tokens.sequence_mean(gap)
    weight = gap.clamp(max=80.0).exp()
    low, high = config.importance_sampling_min, config.importance_sampling_max
    low, high = 0.0 if low is None else low, math.inf if high is None else high
    if action == "truncate":
        return weight.clamp(low, high)
    # Written so that a NaN weight stays NaN.
    return torch.where((weight < low) | (weight > high), 0.0, weight)


def off_policy_keep(tokens: Tokens, threshold: float) -> Tensor:
    """`A >= 0 or mean over the sequence of (sampler - policy) <= threshold` (DeepSeek-V3.2,
    2512.02556): [N] bool."""
    behaviour = tokens.sampler_logprobs
    behaviour = tokens.old_logprobs if behaviour is None else behaviour
    drift = (behaviour - tokens.logprobs).detach().nan_to_num(nan=0.0)
    return (tokens.advantages >= 0) | (tokens.sequence_mean(drift) <= threshold)


def known_correction(rows: LossRows, config: LossConfig, *, reduce) -> Tensor | None:
    """The sampler's correction, where it does not wait for the policy's log-probs."""
    old = rows.old_logp
    if old is None:
        return None
    limit = config.log_ratio_clamp
    tokens = tokens_of(old, old, rows, level=config.level, limit=limit, reduce=reduce)
    return correction_weight(tokens, config)


def needs_sequences(config: LossConfig, *, on_policy: bool) -> bool:
    """Whether a token's slope waits for the log-probs of its whole sequence."""
    correction = config.importance_sampling_correction.partition("_")[0]
    return (
        config.level != "token"
        or config.loss_type in WHOLE_SEQUENCE
        or config.off_policy_mask_threshold is not None
        # Known beforehand, unless the old log-probs are the policy's own.
        or (on_policy and correction in ("sequence", "geometric"))
    )
