"""How tokens add up: every aggregation is one weight a token. Pure functions of [N] vectors.

Shapes: `N` rows (tokens), `S` sequences, `P` groups.
"""

import torch
from torch import Tensor

from .loss_config import LossConfig
from .rows import Segments


def token_weights(
    mask: Tensor,
    config: LossConfig,
    *,
    segments: Segments | None,
    group_ids: Tensor | None = None,
    group_lengths: Tensor | None = None,
    denominator: float | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The aggregation as one weight a token, loss = sum(weights x per-token loss): [N] bool -> [N].

    `sequence_mean` 1 / (S n_i), `token_mean` 1 / N_live, `constant` 1 / (S max_completion_length),
    `sequence_sum` 1 / S, `prompt_mean` 1 / (P n_p) with n_p the live tokens of the row's group
    (group_ids [S]), or group_lengths [S] where the call holds only some of them. `denominator`
    replaces S, N_live, S x max_completion_length, S and P, so that micro-batches add up to the
    step. A sequence without a live token counts all the same.
    """
    live = mask.to(dtype)
    kind = config.adds_up
    if kind == "token_mean":
        return live / (live.sum().clamp(min=1) if denominator is None else denominator)
    if kind == "prompt_mean":
        groups, members = torch.unique(group_ids, return_inverse=True)
        normaliser = max(len(groups), 1) if denominator is None else denominator
        if group_lengths is None:
            tokens = torch.zeros(len(groups), dtype=dtype, device=mask.device)
            tokens.index_add_(0, members, segments.lengths)
            group_lengths = tokens[members]
        return live / segments.spread(group_lengths.to(dtype).clamp(min=1)) / normaliser
    if denominator is None:
        denominator = max(segments.lengths.numel(), 1)
        if kind == "constant":
            denominator *= config.max_completion_length
    if kind == "sequence_mean":
        return live * segments.spread(1 / segments.lengths.clamp(min=1)) / denominator
    return live / denominator


def entropy_weights(
    mask: Tensor,
    config: LossConfig,
    *,
    keep: Tensor | None,
    denominator: float | Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`entropy_coef / count` on the tokens the bonus acts on, whatever loss_type is: [N].

    They are the live ones that `keep` (top entropy) leaves; `denominator` replaces their number.
    """
    acting = mask.to(dtype if keep is None else keep.dtype)
    acting = acting if keep is None else acting * keep
    count = acting.sum().clamp(min=1) if denominator is None else denominator
    return config.entropy_coef * acting / count


def top_entropy(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """`entropy >= quantile(entropy[mask], 1 - share)` as 0 and 1: [N] -> [N].

    Interpolated linearly, by a sort, which has no limit on N. Beyond the 80/20 rule (2506.01939).
    """
    if not len(entropy):
        return torch.zeros_like(entropy)
    # +inf sorts masked rows behind all others.
    ordered = torch.where(mask, entropy, torch.inf).sort().values
    place = (mask.sum() - 1).clamp(min=0).to(entropy.dtype) * (1 - share)
    low = ordered.gather(0, place.floor().long()[None])
    high = ordered.gather(0, place.ceil().long()[None])
    threshold = low + (high - low) * (place - place.floor())
    return ((entropy >= threshold) & mask).to(entropy.dtype)
