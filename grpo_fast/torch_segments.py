"""The launchers of `torch_kernels` that see sequences and groups, and no vocabulary.

Shapes: `S` sequences or completions, `T` packed tokens, `P` groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class GroupAdvantage(NamedTuple):
    advantages: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor


def segment_reduce(x: Tensor, cu_seqlens: Tensor, *, reduce: str = "sum") -> Tensor:
    """`[reduce(x[a:b]) for a, b in pairwise(cu_seqlens)]`: x [T], cu_seqlens [S+1] -> [S]; an empty
    segment is 0."""
    return torch.segment_reduce(
        x if x.dtype == torch.float64 else x.float(), reduce, offsets=cu_seqlens.long(), initial=0.0
    )


def group_advantage(
    rewards: Tensor,
    offsets: Tensor,
    *,
    order: Tensor | None = None,
    scale: str = "group",
    baseline: str = "mean",
    unbiased: bool = True,
    eps: float = 1e-4,
) -> GroupAdvantage:
    """`(r - mean_group) / (std_group + eps)`: rewards [S] float32, NaN = not scored, left out and
    given 0.

    scale: `group` (std), `mean` (MaxRL), `none`; baseline: `mean`, `leave_one_out`, `pass_at_k`.
    Members of group p are `order[offsets[p]:offsets[p+1]]` (identity without `order`); statistics
    are [P].
    """
    r = rewards if order is None else rewards[order.long()]
    sizes = torch.diff(offsets).long()
    group = torch.arange(len(sizes), device=r.device).repeat_interleave(sizes, output_size=len(r))
    scored = ~r.isnan()

    def total(x: Tensor) -> Tensor:
        return segment_reduce(x, offsets)

    def extreme(kind: str, counted: Tensor, other: float) -> Tensor:
        values = torch.where(counted, r, other)
        return torch.segment_reduce(values, kind, offsets=offsets.long(), initial=other)

    count = total(scored)
    mean = total(torch.where(scored, r, 0.0)) / count
    centred = torch.where(scored, r - mean[group], 0.0)
    std = (total(centred.square()) / (count - int(unbiased)).clamp(min=0)).sqrt()
    std = torch.where(count >= 2, std, torch.nan)
    low, high = extreme("min", scored, torch.inf), extreme("max", scored, -torch.inf)
    degenerate = (count < 2) | (low == high)
    advantages = centred
    if baseline == "leave_one_out":
        # r minus the mean of the others is the centred reward times n / (n - 1)
        advantages = centred * (count / (count - 1))[group]
    elif baseline == "pass_at_k":
        best = r == high[group]
        second = extreme("max", scored & ~best, -torch.inf)
        # two members that share the top leave nothing between best and second
        lead = torch.where(total(best) > 1, 0.0, high - second)
        advantages = torch.where(best, lead[group], 0.0)
    teaches = ~degenerate
    if scale == "group":
        advantages = advantages / (std + eps)[group]
    elif scale == "mean":
        advantages = advantages / mean[group]
        teaches = teaches & (mean > 0)
    advantages = torch.where(scored & teaches[group], advantages, 0.0)
    if order is not None:
        advantages = torch.empty_like(advantages).index_copy_(0, order.long(), advantages)
    return GroupAdvantage(advantages, mean, std, degenerate)
