"""Which rows a loss computes: masked ones and, in training, those that carry no gradient enter no
product.

Shapes: `N` rows, `M` of them computed, `S` sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .loss_config import WHOLE_SEQUENCE, LossConfig
from .rows import LossRows


class Live(NamedTuple):
    index: Tensor | None
    """[M] rows to compute, ascending; all where None."""
    skipped: Tensor | None
    """[N] bool: live rows that are left out, whose log-probs are so not measured."""


def live_rows(rows: LossRows, config: LossConfig, *, trained: bool) -> Live:
    """The rows that must be computed.

    On a GPU finding them is the one sync of a loss call, and is left out while a CUDA graph is
    captured: then masked rows are computed, as zeros.
    """
    if rows.mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return Live(None, None)
    computed = rows.mask
    skipped = None
    if trained and config.skip_zero_advantage and advantage_is_all(config):
        teaches = rows.advantages != 0
        if config.level != "token" or config.loss_type in WHOLE_SEQUENCE or _per_sequence(config):
            # A token is part of its sequence's ratio, whatever its own advantage is.
            any_in = torch.zeros_like(rows.segments.lengths)
            any_in.index_add_(0, rows.segments.ids, (teaches & rows.mask).to(any_in.dtype))
            teaches = rows.segments.spread(any_in) > 0
        computed = rows.mask & teaches
        skipped = rows.mask & ~teaches
    index = computed.nonzero()[:, 0]
    if len(index) == len(rows):
        return Live(None, None)
    return Live(index, skipped)


def advantage_is_all(config: LossConfig) -> bool:
    """Whether a row of advantage 0 adds nothing to loss and gradient."""
    return not (
        config.beta
        or config.entropy_coef
        # Adaptive control needs the entropy of every token, also in a step without a bonus.
        or config.use_adaptive_entropy
        or config.objective is not None
        or config.loss_type == "dro"
        # The quantile is one of all live tokens.
        or config.top_entropy_quantile < 1
    )


def _per_sequence(config: LossConfig) -> bool:
    correction = config.importance_sampling_correction
    return config.off_policy_mask_threshold is not None or correction.startswith(("seq", "geo"))
