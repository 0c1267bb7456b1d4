"""group_advantage: rewards [S] of P ragged groups to advantages [S], mean and std [P].

Letters: `P` prompts (groups), `S` completions; `i_` program ids, `o_` offsets, `m_` masks, `p_`
pointers, `b_` blocks, `BS` members at a time. Everything float32. One program a group, three short
sweeps: sum and extremes, spread around the mean, result.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTEGERS, check_kernel_runs, check_tensor, grid_of, length_of

# A group of up to 128 completions is one block; launches, not bytes, are what this costs.
CONFIGS = [{"BS": 128, "num_warps": 1}]
SCALES = ("group", "mean", "none")
BASELINES = ("mean", "leave_one_out", "pass_at_k")
INF = tl.constexpr(float("inf"))


@triton.jit
def _members(p_rewards, p_order, o, end, BS: tl.constexpr):
    """(positions, inside, rewards, scored) of BS members from `o` on."""
    o_s = o + tl.arange(0, BS)
    m_s = o_s < end
    if p_order is not None:
        o_s = tl.load(p_order + o_s, mask=m_s, other=0).to(tl.int64)
    b_reward = tl.load(p_rewards + o_s, mask=m_s, other=float("nan"))
    return o_s, m_s, b_reward, b_reward == b_reward


@triton.jit
def _totals(p_rewards, p_order, start, end, BS: tl.constexpr):
    """(number, sum, least, largest) of the scored members."""
    b_count = tl.zeros([BS], tl.float32)
    b_sum = tl.zeros([BS], tl.float32)
    b_low = tl.full([BS], INF, tl.float32)
    b_high = tl.full([BS], -INF, tl.float32)
    for o in range(start, end, BS):
        _, _, b_reward, m_scored = _members(p_rewards, p_order, o, end, BS)
        b_count += tl.where(m_scored, 1.0, 0.0)
        b_sum += tl.where(m_scored, b_reward, 0.0)
        b_low = tl.where(m_scored & (b_reward < b_low), b_reward, b_low)
        b_high = tl.where(m_scored & (b_reward > b_high), b_reward, b_high)
    return tl.sum(b_count, 0), tl.sum(b_sum, 0), tl.min(b_low, 0), tl.max(b_high, 0)


@triton.jit
def _scale(mean, spread, teaches, SCALE: tl.constexpr):
    """(what advantages are divided by, whether the group teaches): never a division by 0."""
    if SCALE == "group":
        return tl.where(teaches, spread, 1.0), teaches
    elif SCALE == "mean":
        teaches = teaches & (mean > 0.0)
        return tl.where(teaches, mean, 1.0), teaches
    else:
        return tl.full((), 1.0, tl.float32), teaches


@triton.jit
def _group_advantage_kernel(
    p_rewards,
    p_offsets,
    p_order,
    p_advantages,
    p_mean,
    p_std,
    p_degenerate,
    eps,
    SCALE: tl.constexpr,
    BASELINE: tl.constexpr,
    UNBIASED: tl.constexpr,
    BS: tl.constexpr,
):
    i_group = tl.program_id(0).to(tl.int64)
    start = tl.load(p_offsets + i_group).to(tl.int64)
    end = tl.load(p_offsets + i_group + 1).to(tl.int64)
    count, total, low, high = _totals(p_rewards, p_order, start, end, BS)
    divisor = tl.where(count > 0.0, count, 1.0)
    about = total / divisor
    b_rest = tl.zeros([BS], tl.float32)
    b_square = tl.zeros([BS], tl.float32)
    # For pass_at_k only: members at the top, best of those below it.
    b_best = tl.zeros([BS], tl.float32)
    b_second = tl.full([BS], -INF, tl.float32)
    for o in range(start, end, BS):
        _, _, b_reward, m_scored = _members(p_rewards, p_order, o, end, BS)
        b_centred = tl.where(m_scored, b_reward - about, 0.0)
        b_rest += b_centred
        b_square += b_centred * b_centred
        if BASELINE == "pass_at_k":
            b_best += tl.where(m_scored & (b_reward == high), 1.0, 0.0)
            m_second = m_scored & (b_reward < high) & (b_reward > b_second)
            b_second = tl.where(m_second, b_reward, b_second)
    # The rounded mean is off by what is left around it.
    rest = tl.sum(b_rest, 0)
    mean = about + rest / divisor
    freedom = count
    if UNBIASED:
        freedom = count - 1.0
    freedom = tl.where(freedom > 0.0, freedom, 1.0)
    variance = (tl.sum(b_square, 0) - rest * rest / divisor) / freedom
    std = tl.sqrt(tl.where(variance < 0.0, 0.0, variance))
    degenerate = (count < 2.0) | (low == high)
    teaches = degenerate == 0
    factor = tl.full((), 1.0, tl.float32)
    if BASELINE == "leave_one_out":
        # r minus the mean of the others is the centred reward times n / (n - 1).
        factor = count / tl.where(count > 1.0, count - 1.0, 1.0)
    lead = tl.full((), 0.0, tl.float32)
    if BASELINE == "pass_at_k":
        # Two members that share the top leave nothing between best and second.
        lead = tl.where(tl.sum(b_best, 0) > 1.0, 0.0, high - tl.max(b_second, 0))
    scale, teaches = _scale(mean, std + eps, teaches, SCALE)
    for o in range(start, end, BS):
        o_s, m_s, b_reward, m_scored = _members(p_rewards, p_order, o, end, BS)
        b_advantage = (b_reward - mean) * factor
        if BASELINE == "pass_at_k":
            b_advantage = tl.where(b_reward == high, lead, 0.0)
        b_advantage = tl.where(m_scored & teaches, b_advantage / scale, 0.0)
        tl.store(p_advantages + o_s, b_advantage, mask=m_s)
    tl.store(p_mean + i_group, tl.where(count > 0.0, mean, float("nan")))
    tl.store(p_std + i_group, tl.where(count > 1.0, std, float("nan")))
    tl.store(p_degenerate + i_group, degenerate.to(tl.uint8))


class GroupAdvantage(NamedTuple):
    advantages: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor


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
    """`(r - r.mean()) / (r.std() + eps)` of each group of rewards [S] float32.

    scale: `group` std + eps, the group's `mean` (MaxRL: 0 where it is not positive), `none`;
    baseline: `mean`, `leave_one_out` (of the others), `pass_at_k` (the best gets its distance to
    the second, all others 0). Members of group p are `order[offsets[p]:offsets[p+1]]` (identity
    without `order`), and every completion is in one group; offsets [P+1] and order [S] are int32 or
    int64. A NaN reward is left out of every statistic, advantage 0. mean, std and degenerate (fewer
    than two scored members, or all equal: advantages 0) are [P]; std is NaN below two scored
    members, mean where none is. Raises ValueError for a wrong shape, dtype, device or stride.
    """
    s = length_of("rewards", rewards, "[S]")
    p = length_of("offsets", offsets, "[P + 1]", least=1) - 1
    device = rewards.device
    for name, value, choices in (("scale", scale, SCALES), ("baseline", baseline, BASELINES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {choices}")
    check_tensor("rewards", rewards, (s,), (torch.float32,), device)
    check_kernel_runs("rewards", rewards, _group_advantage_kernel)
    check_tensor("offsets", offsets, (p + 1,), INTEGERS, device)
    if order is not None:
        check_tensor("order", order, (s,), INTEGERS, device)
    advantages = torch.empty_like(rewards)
    mean, std = (torch.empty(p, dtype=torch.float32, device=device) for _ in range(2))
    degenerate = torch.empty(p, dtype=torch.bool, device=device)
    if p:
        with torch.cuda.device_of(rewards):
            _group_advantage_kernel[grid_of(p)](
                rewards,
                offsets,
                order,
                advantages,
                mean,
                std,
                degenerate.view(torch.uint8),
                float(eps),
                SCALE=scale,
                BASELINE=baseline,
                UNBIASED=unbiased,
                **CONFIGS[0],
            )
    return GroupAdvantage(advantages, mean, std, degenerate)
