"""Rewards to advantages, group by group.

Shapes: `S` completions, `P` groups.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .errors import InputError
from .implementation import launchers, resolve_impl


class AdvantageOutput(NamedTuple):
    advantages: Tensor
    """[S], 0 for completions without a score and in degenerate groups."""
    group_mean: Tensor
    """[P] mean reward, groups in ascending id; NaN where nothing was scored."""
    group_std: Tensor
    """[P] std of the group's rewards; NaN with fewer than two scored."""
    degenerate: Tensor
    """[P] bool: fewer than two scored completions, or all rewards equal: the group teaches nothing.
    """


def group_advantages(
    rewards: Tensor | Sequence[float],
    *,
    group_size: int | None = None,
    group_ids: Tensor | Sequence[int] | None = None,
    scale: str = "group",
    baseline: str = "mean",
    unbiased: bool = True,
    eps: float = 1e-4,
    impl: str = "auto",
) -> AdvantageOutput:
    """`(r - r.mean()) / (r.std() + eps)` within each group of rewards [S].

    Groups are `group_size` neighbours, or equal `group_ids` [S] in any order and of any size. NaN =
    could not be scored: left out of mean and std, advantage 0. scale: `group` std, `batch` std of
    all scored rewards, or `none` (Dr. GRPO); baseline: the group's `mean`, or `leave_one_out`, the
    mean of the others (RLOO, 2402.14740); unbiased: std over n - 1. Results float32. Raises
    InputError for inf, for a group of one, for sizes that do not fit.
    """
    rewards = torch.as_tensor(rewards)
    if rewards.dim() != 1 or rewards.is_complex():
        raise InputError(
            f"rewards has shape {tuple(rewards.shape)}, expected [S], one number a completion"
        )
    rewards = rewards.detach().to(
        torch.float64 if rewards.dtype == torch.float64 else torch.float32
    )
    if rewards.isinf().any():
        row = int(rewards.isinf().nonzero()[0])
        raise InputError(
            f"rewards[{row}] is {rewards[row].item()}, expected a finite number, or NaN for 'not "
            "scored'"
        )
    _check_choice("scale", scale, ("group", "batch", "none"))
    _check_choice("baseline", baseline, ("mean", "leave_one_out"))
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"eps = {eps}, expected a finite number >= 0")
    order, offsets = _groups(rewards, group_size, group_ids)
    impl = resolve_impl(impl, rewards)
    if impl == "reference":
        ids = torch.empty(len(rewards), dtype=torch.long, device=rewards.device)
        spans = torch.diff(offsets)
        sorted_ids = torch.arange(len(spans), device=rewards.device).repeat_interleave(spans)
        ids[order if order is not None else slice(None)] = sorted_ids
        options = {"scale": scale, "baseline": baseline, "unbiased": unbiased, "eps": eps}
        return AdvantageOutput(*reference.group_advantage(rewards, ids, **options))
    result = launchers(impl).group_advantage(
        rewards,
        offsets,
        order=order,
        scale_by_std=scale == "group",
        leave_one_out=baseline == "leave_one_out",
        unbiased=unbiased,
        eps=eps,
    )
    advantages = result.advantages
    if scale == "batch":
        scored = rewards[~rewards.isnan()]
        spread = scored.std(correction=int(unbiased)) if len(scored) >= 2 else rewards.new_zeros(())
        # 0 stays 0 also where all rewards are equal and eps is 0
        advantages = torch.where(advantages == 0, 0.0, advantages / (spread + eps))
    return AdvantageOutput(advantages, result.mean, result.std, result.degenerate)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} = {value!r} is not available: choose one of {', '.join(choices)}")


def _groups(
    rewards: Tensor, group_size: int | None, group_ids: Tensor | Sequence[int] | None
) -> tuple[Tensor | None, Tensor]:
    """(order [S] or None, offsets [P+1]): members of group p are order[offsets[p]:offsets[p+1]]."""
    if (group_size is None) == (group_ids is None):
        raise InputError(
            "give either group_size (neighbours form a group) or group_ids [S], not both and not "
            "neither"
        )
    count = len(rewards)
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
        return None, torch.arange(0, count + 1, group_size, device=rewards.device)
    group_ids = torch.as_tensor(group_ids, device=rewards.device)
    if group_ids.shape != rewards.shape or group_ids.is_floating_point():
        raise InputError(
            f"group_ids has shape {tuple(group_ids.shape)} and dtype {group_ids.dtype}, expected "
            "integers "
            f"{tuple(rewards.shape)} like rewards"
        )
    order = torch.argsort(group_ids, stable=True)
    _, counts = torch.unique_consecutive(group_ids[order], return_counts=True)
    offsets = torch.zeros(len(counts) + 1, dtype=torch.long, device=rewards.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return order, offsets
