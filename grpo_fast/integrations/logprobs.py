"""The loss of a host that has log-probs already: any LossConfig, differentiable in them.

Shapes: `S` sequences, `L` padded length.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..inputs import loss_rows
from ..loss_config import LossConfig
from ..policy_terms import policy_terms
from ..products import exact_dtype
from ..torch_segments import segment_reduce
from .hosts import no_gradient


class HostLoss(NamedTuple):
    loss: Tensor
    """0-d, differentiable in the log-probs."""
    ratio: Tensor
    """[S, L], at the level of the config, 0 where masked."""


def loss_of_logprobs(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: LossConfig,
    *,
    old_logprobs: Tensor | None = None,
    correction: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> HostLoss:
    """`linear_grpo_loss` from log-probs on, all [S, L]; advantages [S] or [S, L].

    correction: the weight of each policy term, as the host computed it.
    """
    if config.beta or config.entropy_coef or config.top_entropy_quantile < 1:
        raise ConfigError("KL and entropy are the host's own terms: set beta = 0, entropy_coef = 0")
    if config.importance_sampling_correction != "none":
        raise ConfigError(
            "the host computes the sampler's weights: set importance_sampling_correction = 'none'"
        )
    if correction is not None:
        # VESPO multiplies the weights of a sequence: it asks what they are weights of.
        config = dataclasses.replace(
            config, importance_sampling_correction="token_truncate", importance_sampling_max=None
        )
    rows = loss_rows(
        torch.zeros_like(mask, dtype=torch.long),
        no_gradient(advantages),
        mask=mask,
        cu_seqlens=None,
        old_logprobs=no_gradient(old_logprobs),
        ref_logprobs=None,
        # Asked for, and never read: the weights are known.
        sampler_logprobs=no_gradient(correction),
        group_ids=None,
        group_lengths=None,
        temperature=None,
        denominator=denominator,
        entropy_denominator=None,
        config=config,
        vocabulary=1,
        dtype=exact_dtype(logprobs),
    )
    if correction is not None:
        rows = rows.replace(correction=rows.sampler_logp, sampler_logp=None)
    live = torch.where(mask, logprobs, 0.0).reshape(-1).to(rows.weights.dtype)
    entropy = torch.zeros_like(rows.weights)
    terms = policy_terms(live, entropy, rows, config, reduce=segment_reduce)
    # The slopes are known: the second term is 0 and has them for its gradient.
    loss = terms.loss.sum() + (terms.slope * (live - live.detach())).sum()
    return HostLoss(loss, terms.ratio.view(mask.shape))
