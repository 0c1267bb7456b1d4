"""policy_loss: one go from logits [N, V] to the clipped loss of every row and its gradient.

Letters: `N` rows, `V` vocabulary; `i_` program ids, `o_` offsets, `m_` masks, `p_` pointers, `b_`
blocks, `BV` entries of a row at a time. Logits float32, bfloat16 or float16; arithmetic and [N]
vectors float32. One program a row: statistics, then the row's scalars, then its gradient, so that a
loss costs one sweep of the logits and no [N, V] tensor beside them. No atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    INTEGERS,
    check_logits,
    check_tensor,
    check_written_rows,
    grid_of,
    temperature_arguments,
    vocabulary_arguments,
)
from .online_softmax import (
    INF,
    LOG2E,
    NAN,
    inverse_temperature,
    row_logprob,
    row_statistics,
    zero_row,
)

# 8 entries a thread: one 16-byte load of half precision, and no spills. Wide programs keep few rows
# in flight, so that the second sweep still finds some of its row in L2.
CONFIGS = [
    {"BV": 4096, "num_warps": 16},
    {"BV": 1024, "num_warps": 4},
    {"BV": 256, "num_warps": 1},
]
KL_ESTIMATORS = ("k1", "k2", "k3")


@triton.jit
def _clamped(log_ratio, limit):
    """log_ratio within [-limit, limit]; an infinite one, of an impossible token, is NaN."""
    bounded = tl.where(log_ratio > limit, limit, log_ratio)
    bounded = tl.where(log_ratio < -limit, -limit, bounded)
    return tl.where((log_ratio == INF) | (log_ratio == -INF), NAN, bounded)


@triton.jit
def _clip_objective(ratio, advantage, ratio_low, ratio_high, delta):
    """-min(min(ratio, delta) A, clip(ratio) A) and its slope in log p: -ratio A, or exactly 0."""
    capped = tl.where(ratio > delta, delta, ratio) * advantage
    clipped = tl.where(ratio > ratio_high, ratio_high, ratio)
    clipped = tl.where(ratio < ratio_low, ratio_low, clipped) * advantage
    objective = -tl.where(capped < clipped, capped, clipped)
    # Written so that a NaN ratio or advantage blocks nothing and surfaces in the gradient.
    blocked = (advantage > 0.0) & ((ratio > ratio_high) | (ratio > delta))
    blocked = blocked | ((advantage < 0.0) & ((ratio < ratio_low) | (ratio > delta)))
    blocked = blocked | (advantage == 0.0)
    return objective, tl.where(blocked, 0.0, -ratio * advantage)


@triton.jit
def _kl_divergence(d, ESTIMATOR: tl.constexpr):
    """k1, k2 or k3 of d = logp - ref_logp, and its slope in logp."""
    if ESTIMATOR == "k1":
        return d, tl.full((), 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        return d * d * 0.5, d
    else:
        # exp(y) = 1 + y + y^2 series(y): near 0 both results keep their digits.
        y = -d
        series = 1.0 / 362880.0 + y * (1.0 / 3628800.0)
        series = 1.0 / 40320.0 + y * series
        series = 1.0 / 5040.0 + y * series
        series = 1.0 / 720.0 + y * series
        series = 1.0 / 120.0 + y * series
        series = 1.0 / 24.0 + y * series
        series = 1.0 / 6.0 + y * series
        series = 0.5 + y * series
        exp_y = tl.exp(y)
        small = (y < 0.5) & (y > -0.5)
        kl = tl.where(small, y * y * series, exp_y - 1.0 - y)
        return kl, tl.where(small, -y - y * y * series, 1.0 - exp_y)


@triton.jit
def _gradient_row(
    p_row,
    p_out,
    i_target,
    peak,
    factor,
    at_target,
    v_size,
    inv_temperature,
    BV: tl.constexpr,
):
    """`exp((x - peak) / temperature) factor`, and `at_target` in the target's column."""
    i_target = i_target.to(tl.int32)
    scale = inv_temperature * LOG2E
    last = (v_size - 1) // BV * BV
    # Backwards: what the first sweep read last is still in cache.
    for o in range(0, v_size, BV):
        o_v = last - o + tl.arange(0, BV)
        m_v = o_v < v_size
        b_x = tl.load(p_row + o_v, mask=m_v, other=-INF).to(tl.float32)
        b_gradient = tl.exp2((b_x - peak) * scale) * factor
        b_gradient = tl.where(o_v == i_target, at_target, b_gradient)
        tl.store(p_out + o_v, b_gradient.to(p_out.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["v_units"])
def _policy_loss_kernel(
    p_logits,
    p_targets,
    p_advantages,
    p_weights,
    p_old_logp,
    p_ref_logp,
    p_temperature,
    p_dlogits,
    p_loss,
    p_logp,
    p_entropy,
    p_ratio,
    p_kl,
    v_units,
    stride_logits,
    stride_dlogits,
    temperature,
    ratio_low,
    ratio_high,
    delta,
    beta,
    log_ratio_clamp,
    ESTIMATOR: tl.constexpr,
    UNIT: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    v_size = v_units * UNIT
    weight = tl.load(p_weights + i_row)
    loss = 0.0
    logp = 0.0
    entropy = 0.0
    ratio = 0.0
    kl = 0.0
    # What a masked row holds is never read: 0 x NaN would be NaN.
    if weight != 0.0:
        inv_temperature = inverse_temperature(p_temperature, temperature, i_row)
        advantage = tl.load(p_advantages + i_row)
        i_target = tl.load(p_targets + i_row)
        p_row = p_logits + i_row * stride_logits
        peak, target, others, weighted = row_statistics(
            p_row, i_target, v_size, inv_temperature, BV
        )
        logp, _, total, entropy = row_logprob(target, others, weighted, inv_temperature)
        old_logp = logp
        if p_old_logp is not None:
            old_logp = tl.load(p_old_logp + i_row)
        ratio = tl.exp(_clamped(logp - old_logp, log_ratio_clamp))
        loss, slope = _clip_objective(ratio, advantage, ratio_low, ratio_high, delta)
        if p_ref_logp is not None:
            d = _clamped(logp - tl.load(p_ref_logp + i_row), log_ratio_clamp)
            kl, kl_slope = _kl_divergence(d, ESTIMATOR)
            # A KL that is only measured must not reach the loss, also where it is NaN.
            if beta != 0.0:
                loss += beta * kl
                slope += beta * kl_slope
        loss *= weight
        slope *= weight
        if p_dlogits is not None:
            p_drow = p_dlogits + i_row * stride_dlogits
            if slope == 0.0:
                zero_row(p_drow, v_size, BV)
            else:
                factor = slope * inv_temperature / total
                _gradient_row(
                    p_row,
                    p_drow,
                    i_target,
                    peak,
                    -factor,
                    factor * others,
                    v_size,
                    inv_temperature,
                    BV,
                )
    else:
        if p_dlogits is not None:
            zero_row(p_dlogits + i_row * stride_dlogits, v_size, BV)
    tl.store(p_loss + i_row, loss)
    tl.store(p_logp + i_row, logp)
    tl.store(p_entropy + i_row, entropy)
    tl.store(p_ratio + i_row, ratio)
    if p_ref_logp is not None:
        tl.store(p_kl + i_row, kl)


class PolicyRows(NamedTuple):
    loss: Tensor
    """weight x (clip objective + beta x KL)."""
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    log_ratio_clamp: float = 20.0,
    dlogits: Tensor | None = None,
) -> PolicyRows:
    """`weights * (-min(min(r, delta) A, clip(r) A) + beta KL)`, r = exp(logp - old_logp).

    logits [N, V] of any row stride, targets [N] int32 or int64, the other tensors [N] float32,
    temperature a number or [N] float32 -> [N] float32 each; kl where ref_logp is given. `dlogits`
    [N, V], logits itself or other memory of any float dtype, receives d(sum(loss)) / d(logits).
    Weight 0 masks a row: outputs and gradient exactly 0, nothing of it read. Without old_logp the
    ratio is exactly 1. In a live row, a target outside [0, V), NaN, or an impossible token gives
    NaN. Raises ValueError for a wrong shape, dtype, device or stride.
    """
    n, v = check_logits(logits, _policy_loss_kernel)
    device = logits.device
    check_tensor("targets", targets, (n,), INTEGERS, device)
    vectors = {"advantages": advantages, "weights": weights}
    vectors |= {"old_logp": old_logp} if old_logp is not None else {}
    vectors |= {"ref_logp": ref_logp} if ref_logp is not None else {}
    for name, vector in vectors.items():
        check_tensor(name, vector, (n,), (torch.float32,), device)
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator is {kl_estimator!r}, expected one of {KL_ESTIMATORS}")
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp is None, expected [N] float32 for beta = {beta}")
    scale = temperature_arguments(temperature, n, device)
    if dlogits is not None:
        check_written_rows("dlogits", dlogits, logits)
    loss, logp, entropy, ratio = (
        torch.empty(n, dtype=torch.float32, device=device) for _ in range(4)
    )
    kl = None if ref_logp is None else torch.empty_like(loss)
    if n:
        with torch.cuda.device_of(logits):
            _policy_loss_kernel[grid_of(n)](
                logits,
                targets,
                advantages,
                weights,
                old_logp,
                ref_logp,
                p_dlogits=dlogits,
                p_loss=loss,
                p_logp=logp,
                p_entropy=entropy,
                p_ratio=ratio,
                p_kl=kl,
                stride_logits=logits.stride(0),
                stride_dlogits=0 if dlogits is None else dlogits.stride(0),
                ratio_low=1.0 - epsilon,
                ratio_high=1.0 + epsilon_high,
                delta=float("inf") if delta is None else float(delta),
                beta=float(beta),
                log_ratio_clamp=float(log_ratio_clamp),
                ESTIMATOR=kl_estimator,
                **scale,
                **vocabulary_arguments(CONFIGS, v),
            )
    return PolicyRows(loss, logp, entropy, ratio, kl)
