"""Rewards to advantages, group by group.

Shapes: `S` completions, `P` groups.
"""

import math
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .advantage_config import Baseline, MultiReward, Scale, advantage_conflict
from .errors import InputError, nearest
from .implementation import launchers, resolve_impl


class AdvantageOutput(NamedTuple):
    advantages: Tensor
    """[S], 0 for completions without a score and in degenerate groups."""
    group_mean: Tensor
    """[P] mean reward (weighted sum of several), groups in ascending id; NaN where nothing was
    scored."""
    group_std: Tensor
    """[P] std of the group's rewards; NaN with fewer than two scored."""
    degenerate: Tensor
    """[P] bool: fewer than two scored completions, or all rewards equal: the group teaches nothing.
    With `normalize_then_sum` it is so in every reward whose weight is not 0."""


def group_advantages(
    rewards: Tensor | Sequence[float] | Sequence[Sequence[float]],
    *,
    group_size: int | None = None,
    group_ids: Tensor | Sequence[int] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    multi_reward: MultiReward = "sum_then_normalize",
    scale: Scale = "group",
    baseline: Baseline = "mean",
    unbiased: bool = True,
    eps: float = 1e-4,
    impl: str = "auto",
) -> AdvantageOutput:
    """`(r - r.mean()) / (r.std() + eps)` within each group of rewards [S], or of several rewards
    [S, R] with `weights` [R].

    Groups are `group_size` neighbours, or equal `group_ids` [S] in any order and of any size. NaN =
    could not be scored: left out of mean and std, advantage 0; one of several rewards that is NaN
    does not apply and is left out of the sum. Results float32. Raises InputError for inf, for a
    group of one, for sizes that do not fit, for choices that make no advantage together.

    baseline: the group's `mean`; `leave_one_out`, the mean of the others (RLOO, 2402.14740);
    `pass_at_k`: the best of a group gets its distance to the second, all others 0 (2503.19595).
    scale: divide by the `group` std + eps, the `batch` std of all scored rewards + eps, `none` (Dr.
    GRPO), the group's `mean`, with 0 where that is not positive (MaxRL, 2602.02710); `nonzero`:
    multiply by scored / nonzero rewards of the batch (GPG, 2504.02546). unbiased: std over n - 1.
    multi_reward: `sum_then_normalize` does this to the weighted sum; `normalize_then_sum` (GDPO,
    2601.05242) to each reward, and divides their weighted sum by its batch std + eps.
    """
    rewards, weights = _read_rewards(rewards, weights)
    _check_choice("multi_reward", multi_reward, MultiReward)
    _check_choice("scale", scale, Scale)
    _check_choice("baseline", baseline, Baseline)
    conflict = advantage_conflict(scale=scale, baseline=baseline, multi_reward=multi_reward)
    if conflict is not None:
        raise InputError(conflict)
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"eps = {eps}, expected a finite number >= 0")
    order, offsets = _groups(len(rewards), rewards.device, group_size, group_ids)
    impl = resolve_impl(impl, rewards)
    spread = {"unbiased": unbiased, "eps": eps}
    if impl == "reference":
        options = {"multi_reward": multi_reward, "scale": scale, "baseline": baseline, **spread}
        ids = _ids(order, offsets)
        return AdvantageOutput(*reference.multi_reward_advantage(rewards, ids, weights, **options))
    total = _weighted_sum(rewards, weights)
    group_advantage = launchers(impl).group_advantage
    if multi_reward == "normalize_then_sum":
        return _normalize_then_sum(
            rewards, weights, total, order, offsets, group_advantage, **spread
        )
    # What is one number for the batch is no business of a group.
    own = "none" if scale in ("batch", "nonzero") else scale
    result = group_advantage(total, offsets, order=order, scale=own, baseline=baseline, **spread)
    advantages, scored = result.advantages, ~total.isnan()
    if scale == "batch":
        advantages = _over_batch_std(advantages, total[scored], **spread)
    elif scale == "nonzero":
        nonzero = (scored & (total != 0)).sum()
        advantages = advantages * (scored.sum() / nonzero.clamp(min=1))
    return AdvantageOutput(advantages, result.mean, result.std, result.degenerate)


def _normalize_then_sum(
    rewards: Tensor,
    weights: Tensor,
    total: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    group_advantage: Any,
    *,
    unbiased: bool,
    eps: float,
) -> AdvantageOutput:
    """GDPO in one launch: the R rewards and their sum are (R + 1) P groups, one after the other."""
    rows = torch.cat([rewards.T, total[None]])
    starts = torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]
    ends = offsets.new_tensor([rows.numel()])
    result = group_advantage(
        rows.reshape(-1),
        torch.cat([(starts + offsets[:-1]).reshape(-1), ends]),
        order=None if order is None else (starts + order).reshape(-1),
        unbiased=unbiased,
        eps=eps,
    )
    each = result.advantages.view(rows.shape)[:-1]
    # The batch mean is 0, as that of every group is: taking off its rounding would teach something
    # where all rewards are equal.
    summed = (weights[:, None] * each).sum(0)
    mean, std, degenerate = (x.view(len(rows), -1) for x in result[1:])
    return AdvantageOutput(
        _over_batch_std(summed, summed[~total.isnan()], unbiased=unbiased, eps=eps),
        mean[-1],
        std[-1],
        (degenerate[:-1] | (weights == 0)[:, None]).all(0),
    )


def _over_batch_std(advantages: Tensor, values: Tensor, *, unbiased: bool, eps: float) -> Tensor:
    """`advantages / (values.std() + eps)`; 0 stays 0, also at a std and an eps of 0."""
    spread = values.std(correction=int(unbiased)) if len(values) >= 2 else values.new_zeros(())
    return torch.where(advantages == 0, 0.0, advantages / (spread + eps))


def _weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """What applies of rewards [S, R], weighted and summed; NaN where nothing does."""
    if rewards.shape[1] == 1:
        return rewards[:, 0] * weights
    # In float64, so that the order of summands makes no group differ.
    total = (rewards.double() * weights.double()).nansum(1).to(rewards.dtype)
    if total.isinf().any():
        raise InputError(
            f"the weighted sum of rewards[{int(total.isinf().nonzero()[0])}] overflows "
            f"{str(total.dtype).removeprefix('torch.')}: scale rewards or weights down"
        )
    return torch.where(rewards.isnan().all(1), torch.nan, total)


def _read_rewards(rewards: Any, weights: Any) -> tuple[Tensor, Tensor]:
    """(rewards [S, R] float32, or float64 where they are; weights [R])."""
    rewards = torch.as_tensor(rewards).detach()
    # A table without weights is more likely [P, G] by mistake than R rewards of weight 1.
    if rewards.dim() != (1 if weights is None else 2) or rewards.is_complex():
        raise InputError(
            f"rewards has shape {tuple(rewards.shape)}, expected "
            + ("[S], one number a completion" if weights is None else "[S, R] beside weights [R]")
        )
    if rewards.isinf().any():
        where = rewards.isinf().nonzero()[0].tolist()
        raise InputError(
            f"rewards{where} is {rewards[tuple(where)].item()}, expected a finite number, or NaN "
            "for 'not scored'"
        )
    rewards = rewards.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    if weights is None:
        return rewards[:, None], rewards.new_ones(1)
    weights = torch.as_tensor(weights, dtype=rewards.dtype).detach()
    if weights.shape != rewards.shape[1:] or not len(weights):
        raise InputError(
            f"weights has shape {tuple(weights.shape)} beside rewards {tuple(rewards.shape)}, "
            "expected [R], one a column"
        )
    if not (weights.isfinite().all() and weights.any()):
        raise InputError(
            f"weights = {weights.tolist()}, expected finite numbers, at least one not 0"
        )
    return rewards, weights.to(rewards.device)


def _check_choice(name: str, value: str, choices: Any) -> None:
    allowed = typing.get_args(choices)
    if value not in allowed:
        raise InputError(
            f"{name} = {value!r} is not available: {nearest(str(value), allowed)}choose one of "
            f"{', '.join(allowed)}"
        )


def _ids(order: Tensor | None, offsets: Tensor) -> Tensor:
    """[S] group of each completion, in the order of the offsets."""
    spans = torch.diff(offsets)
    ids = torch.arange(len(spans), device=offsets.device).repeat_interleave(spans)
    return ids if order is None else torch.empty_like(ids).index_copy_(0, order, ids)


def _groups(
    count: int,
    device: torch.device,
    group_size: int | None,
    group_ids: Tensor | Sequence[int] | None,
) -> tuple[Tensor | None, Tensor]:
    """(order [S] or None, offsets [P+1]): members of group p are order[offsets[p]:offsets[p+1]]."""
    if (group_size is None) == (group_ids is None):
        raise InputError(
            "give either group_size (neighbours form a group) or group_ids [S], not both and not "
            "neither"
        )
    if group_ids is None:
        if group_size < 2:
            raise InputError(
                f"group_size = {group_size}, expected at least 2: an advantage compares group "
                "members"
            )
        if count % group_size:
            raise InputError(
                f"{count} rewards do not divide into groups of group_size = {group_size}"
            )
        return None, torch.arange(0, count + 1, group_size, device=device)
    group_ids = torch.as_tensor(group_ids, device=device)
    if group_ids.shape != (count,) or group_ids.is_floating_point():
        raise InputError(
            f"group_ids has shape {tuple(group_ids.shape)} and dtype {group_ids.dtype}, expected "
            f"integers ({count},), one a completion"
        )
    order = torch.argsort(group_ids, stable=True)
    _, counts = torch.unique_consecutive(group_ids[order], return_counts=True)
    offsets = torch.zeros(len(counts) + 1, dtype=torch.long, device=device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return order, offsets
