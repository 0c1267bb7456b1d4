"""The specification of the advantages: rewards of groups in eager PyTorch.

Shapes: `S` completions, `P` groups, `R` reward functions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
    members, or all equal) are [P], groups in ascending id. scale: std of the `group` or the
    `batch`, the group's `mean` (0 where it is not positive), `nonzero` (times scored / nonzero), or
    `none`. baseline: `mean`, `leave_one_out` of the other members, `pass_at_k`: the best gets its
    distance to the second, all others 0.
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
        if degenerate[p]:
            continue
        best, second = r.topk(2).values
        advantages[member] = {
            "mean": r - mean[p],
            "leave_one_out": r - (r.sum() - r) / (len(r) - 1),
            "pass_at_k": torch.where(r == best, best - second, 0.0),
        }[baseline]
        if scale == "group":
            advantages[member] /= std[p] + eps
        if scale == "mean":
            advantages[member] = advantages[member] / mean[p] if mean[p] > 0 else 0.0
    if scale == "batch":
        advantages = over_batch_std(advantages, rewards, unbiased, eps)
    if scale == "nonzero":
        advantages = advantages * valid.sum() / (valid & (rewards != 0)).sum().clamp(min=1)
    return GroupAdvantage(advantages, mean, std, degenerate)


def over_batch_std(advantages: Tensor, values: Tensor, unbiased: bool, eps: float) -> Tensor:
    """`advantages / (values.std() + eps)`, NaN values left out; 0 stays 0 at any eps. All [S]."""
    r = values[~values.isnan()]
    spread = r.std(correction=int(unbiased)) if len(r) >= 2 else r.new_zeros(())
    return torch.where(advantages == 0, 0.0, advantages / (spread + eps))


def multi_reward_advantage(
    rewards: Tensor,
    group_ids: Tensor,
    weights: Tensor,
    *,
    multi_reward: str = "sum_then_normalize",
    unbiased: bool = True,
    eps: float = 1e-4,
    **options: str,
) -> GroupAdvantage:
    """`group_advantage(rewards @ weights)`: rewards [S, R], weights [R], NaN = does not apply.

    `normalize_then_sum` (GDPO, 2601.05242) is `group_advantage` of each reward, their weighted sum,
    and that over its own std; its mean is 0, as every group's is. `mean` and `std` are of the
    weighted rewards, and `degenerate` groups are so in each reward of a weight.
    """
    unscored = rewards.isnan().all(1)
    total = torch.where(unscored, math.nan, (rewards * weights).nansum(1))
    summed = group_advantage(total, group_ids, unbiased=unbiased, eps=eps, **options)
    if multi_reward == "sum_then_normalize":
        return summed
    each = [group_advantage(r, group_ids, unbiased=unbiased, eps=eps) for r in rewards.T]
    advantages = sum(weight * one.advantages for weight, one in zip(weights, each, strict=True))
    values = torch.where(unscored, math.nan, advantages)
    counted = [one.degenerate | (weight == 0) for weight, one in zip(weights, each, strict=True)]
    return summed._replace(
        advantages=over_batch_std(advantages, values, unbiased, eps),
        degenerate=torch.stack(counted).all(0),
    )
