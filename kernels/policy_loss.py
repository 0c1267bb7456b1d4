"""policy_loss: one go from logits [N, V] to the loss of every row and its gradient.

Letters: `N` rows, `V` vocabulary; `i_` program ids, `o_` offsets, `m_` masks, `p_` pointers, `b_`
blocks, `BV` entries of a row at a time. Logits float32, bfloat16 or float16; arithmetic and [N]
vectors float32. One program a row: statistics, then the row's scalars, then its gradient, so that a
loss costs one sweep of the logits and no [N, V] tensor beside them. No atomics.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    INTEGERS,
    STATISTICS_CONFIGS,
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

CONFIGS = STATISTICS_CONFIGS
OBJECTIVES = ("clip", "cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "reinforce")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")


@triton.jit
def _clamped(log_ratio, limit):
    """log_ratio within [-limit, limit]; an infinite one, of an impossible token, is NaN."""
    bounded = tl.where(log_ratio > limit, limit, log_ratio)
    bounded = tl.where(log_ratio < -limit, -limit, bounded)
    return tl.where((log_ratio == INF) | (log_ratio == -INF), NAN, bounded)


@triton.jit
def _expm1(y):
    """exp(y) - 1 and exp(y) - 1 - y; near 0 both keep their digits."""
    # exp(y) = 1 + y + y^2 series(y)
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
    rest = tl.where(small, y * y * series, exp_y - 1.0 - y)
    return tl.where(small, y + y * y * series, exp_y - 1.0), rest


@triton.jit
def _clip_objective(ratio, advantage, low, high, cap, dual_clip):
    """-min(min(ratio, cap) A, clip(ratio) A), where A < 0 at most -dual_clip A; slope -ratio A, or
    exactly 0."""
    capped = tl.where(ratio > cap, cap, ratio) * advantage
    clipped = tl.where(ratio > high, high, ratio)
    clipped = tl.where(ratio < low, low, clipped) * advantage
    objective = -tl.where(capped < clipped, capped, clipped)
    most = tl.where(advantage < 0.0, -dual_clip * advantage, INF)
    objective = tl.where(objective > most, most, objective)
    # Written so that a NaN ratio or advantage blocks nothing and surfaces in the gradient.
    blocked = (advantage > 0.0) & ((ratio > high) | (ratio > cap))
    beyond = (ratio < low) | (ratio > cap) | (ratio > dual_clip)
    blocked = blocked | ((advantage < 0.0) & beyond)
    blocked = blocked | (advantage == 0.0)
    return objective, tl.where(blocked, 0.0, -ratio * advantage)


@triton.jit
def _sapo_objective(ratio, advantage, tau_negative, tau_positive):
    """-4 / tau sigmoid(tau (ratio - 1)) A; slope -4 sigmoid (1 - sigmoid) ratio A."""
    tau = tl.where(advantage > 0.0, tau_positive, tau_negative)
    x = tau * (ratio - 1.0)
    # exp(-|x|) does not overflow, and gives sigmoid and 1 - sigmoid with all digits.
    tail = tl.exp(tl.where(x > 0.0, -x, x))
    share = 1.0 / (1.0 + tail)
    gate = tl.where(x > 0.0, share, tail * share)
    return -4.0 / tau * gate * advantage, -4.0 * tail * share * share * ratio * advantage


@triton.jit
def _others(logp):
    """1 - p, of a likely token with all digits; 0 where rounding made p more than 1."""
    minus_others, _ = _expm1(logp)
    return tl.where(minus_others > 0.0, 0.0, -minus_others)


@triton.jit
def _dppo_objective(logp, old_logp, ratio, advantage, low, high, cap, KL: tl.constexpr):
    """-min(ratio, cap) A log p, or exactly 0 where p is too far beyond its old value, by total
    variation or by binary KL."""
    p = tl.exp(logp)
    p_old = tl.exp(old_logp)
    if KL:
        others = _others(logp)
        others_old = _others(old_logp)
        divergence = others_old * tl.log((others_old + 1e-8) / (others + 1e-8))
        divergence += p_old * (old_logp - logp)
        above = (divergence > high) & (p > p_old)
        below = (divergence > low) & (p < p_old)
    else:
        above = p - p_old > high
        below = p - p_old < -low
    blocked = ((advantage > 0.0) & above) | ((advantage < 0.0) & below)
    # The NaN ratio of an impossible token is not masked away.
    blocked = blocked & (ratio == ratio)
    slope = tl.where(blocked, 0.0, -tl.where(ratio > cap, cap, ratio) * advantage)
    return slope * logp, slope


@triton.jit
def _objective(logp, old_logp, ratio, advantage, bounds, OBJECTIVE: tl.constexpr):
    """The policy term of a row and its slope in log p."""
    low, high, cap, dual_clip = bounds
    if OBJECTIVE == "clip":
        return _clip_objective(ratio, advantage, low, high, cap, dual_clip)
    elif OBJECTIVE == "cispo":
        bounded = tl.where(ratio > high, high, ratio)
        slope = -tl.where(ratio < low, low, bounded) * advantage
        return slope * logp, slope
    elif OBJECTIVE == "sapo":
        return _sapo_objective(ratio, advantage, low, high)
    elif OBJECTIVE == "dro":
        d = logp - old_logp
        return 0.5 * low * d * d - logp * advantage, low * d - advantage
    elif OBJECTIVE == "reinforce":
        return -logp * advantage, -advantage
    else:
        KL: tl.constexpr = OBJECTIVE == "dppo_kl"
        return _dppo_objective(logp, old_logp, ratio, advantage, low, high, cap, KL)


@triton.jit
def _kl_divergence(d, ESTIMATOR: tl.constexpr, K2_SLOPE: tl.constexpr):
    """k1, k2, k3 or |d| of d = logp - ref_logp, and its slope in logp, or that of k2."""
    if ESTIMATOR == "k1":
        kl = d
        slope = tl.full((), 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        kl = d * d * 0.5
        slope = d
    elif ESTIMATOR == "abs":
        kl = tl.where(d < 0.0, -d, d)
        # At 0, and for NaN, d itself.
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    else:
        slope, kl = _expm1(-d)
        slope = -slope
    if K2_SLOPE:
        slope = d
    return kl, slope


@triton.jit
def _gradient_row(
    p_row,
    p_out,
    i_target,
    slope,
    entropy_weight,
    peak,
    target,
    others,
    weighted,
    v_size,
    inv_temperature,
    HAS_ENTROPY: tl.constexpr,
    BV: tl.constexpr,
):
    """`(slope (1[v = target] - p) + entropy_weight p (log p + entropy)) / T` to p_out, exact zeros
    where both factors are 0."""
    i_target = i_target.to(tl.int32)
    scale = inv_temperature * LOG2E
    e_target = tl.exp2(target * scale)
    total = others + e_target
    factor = slope * inv_temperature / total
    at_target = factor * others
    # T (log p + entropy) is x - peak less its mean under p: no logarithm, no cancellation.
    mean = weighted / total
    curve = entropy_weight * inv_temperature * inv_temperature / total
    if HAS_ENTROPY:
        at_target += tl.where(e_target == 0.0, 0.0, curve * (target - mean)) * e_target
    if (slope == 0.0) & (entropy_weight == 0.0):
        zero_row(p_out, v_size, BV)
    else:
        last = (v_size - 1) // BV * BV
        # Backwards: what the first sweep read last is still in cache.
        for o in range(0, v_size, BV):
            o_v = last - o + tl.arange(0, BV)
            m_v = o_v < v_size
            b_x = tl.load(p_row + o_v, mask=m_v, other=-INF).to(tl.float32)
            b_d = b_x - peak
            b_e = tl.exp2(b_d * scale)
            if HAS_ENTROPY:
                # 0 x -inf would be NaN.
                b_slope = tl.where(b_e == 0.0, 0.0, curve * (b_d - mean))
                b_gradient = b_e * (b_slope - factor)
            else:
                b_gradient = b_e * -factor
            b_gradient = tl.where(o_v == i_target, at_target, b_gradient)
            tl.store(p_out + o_v, b_gradient.to(p_out.dtype.element_ty), mask=m_v)


@triton.jit
def _row_terms(
    i_row,
    weight,
    logp,
    p_advantages,
    p_old_logp,
    p_ref_logp,
    p_policy_weights,
    bounds,
    beta,
    log_ratio_clamp,
    OBJECTIVE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    K2_SLOPE: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
):
    """(loss without its entropy term, d loss / d logp, ratio, kl) of a live row."""
    advantage = tl.load(p_advantages + i_row)
    old_logp = logp
    if p_old_logp is not None:
        old_logp = tl.load(p_old_logp + i_row)
    ratio = tl.exp(_clamped(logp - old_logp, log_ratio_clamp))
    loss, slope = _objective(logp, old_logp, ratio, advantage, bounds, OBJECTIVE)
    if p_policy_weights is not None:
        policy_weight = tl.load(p_policy_weights + i_row)
        loss *= policy_weight
        slope *= policy_weight
    kl = 0.0
    if p_ref_logp is not None:
        d = _clamped(logp - tl.load(p_ref_logp + i_row), log_ratio_clamp)
        kl, kl_slope = _kl_divergence(d, ESTIMATOR, K2_SLOPE)
        if BIAS_CORRECTED:
            # The ratio's slope in log p is the ratio.
            kl_slope = (kl_slope + kl) * ratio
            kl *= ratio
        # A KL that is only measured must not reach the loss, also where it is NaN.
        if beta != 0.0:
            loss += beta * kl
            slope += beta * kl_slope
    return weight * loss, weight * slope, ratio, kl


@triton.jit(do_not_specialize=["v_units"])
def _policy_loss_kernel(
    p_logits,
    p_targets,
    p_advantages,
    p_weights,
    p_old_logp,
    p_ref_logp,
    p_policy_weights,
    p_entropy_weights,
    p_temperature,
    p_dlogits,
    p_loss,
    p_logp,
    p_entropy,
    p_ratio,
    p_kl,
    p_mass,
    p_slope,
    v_units,
    stride_logits,
    stride_dlogits,
    temperature,
    low,
    high,
    cap,
    dual_clip,
    beta,
    log_ratio_clamp,
    OBJECTIVE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    K2_SLOPE: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
    UNIT: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    v_size = v_units * UNIT
    weight = tl.load(p_weights + i_row)
    loss, logp, entropy, ratio, kl, mass, slope = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    # What a masked row holds is never read: 0 x NaN would be NaN.
    if weight != 0.0:
        inv_temperature = inverse_temperature(p_temperature, temperature, i_row)
        i_target = tl.load(p_targets + i_row)
        p_row = p_logits + i_row * stride_logits
        peak, target, others, weighted, squares = row_statistics(
            p_row, i_target, v_size, inv_temperature, True, BV
        )
        logp, _, total, entropy = row_logprob(target, others, weighted, inv_temperature)
        loss, slope, ratio, kl = _row_terms(
            i_row,
            weight,
            logp,
            p_advantages,
            p_old_logp,
            p_ref_logp,
            p_policy_weights,
            (low, high, cap, dual_clip),
            beta,
            log_ratio_clamp,
            OBJECTIVE,
            ESTIMATOR,
            K2_SLOPE,
            BIAS_CORRECTED,
        )
        mass = tl.abs(slope) * inv_temperature * tl.sqrt(others * others + squares) / total
        entropy_weight = 0.0
        if p_entropy_weights is not None:
            entropy_weight = tl.load(p_entropy_weights + i_row)
            loss -= entropy_weight * entropy
        if p_dlogits is not None:
            _gradient_row(
                p_row,
                p_dlogits + i_row * stride_dlogits,
                i_target,
                slope,
                entropy_weight,
                peak,
                target,
                others,
                weighted,
                v_size,
                inv_temperature,
                p_entropy_weights is not None,
                BV,
            )
    elif p_dlogits is not None:
        zero_row(p_dlogits + i_row * stride_dlogits, v_size, BV)
    tl.store(p_loss + i_row, loss)
    tl.store(p_logp + i_row, logp)
    tl.store(p_entropy + i_row, entropy)
    tl.store(p_ratio + i_row, ratio)
    tl.store(p_mass + i_row, mass)
    tl.store(p_slope + i_row, slope)
    if p_ref_logp is not None:
        tl.store(p_kl + i_row, kl)


class PolicyRows(NamedTuple):
    loss: Tensor
    """weights x (policy_weights x objective + beta x KL) - entropy_weights x entropy."""
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None
    mass: Tensor
    """L2 norm of what the loss without its entropy term has as gradient in the row's logits."""
    slope: Tensor
    """Its derivative in logp."""


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    policy_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    objective: str = "clip",
    low: float = 0.0,
    high: float = 0.0,
    cap: float = math.inf,
    dual_clip: float = math.inf,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    bias_corrected_kl: bool = False,
    log_ratio_clamp: float = 20.0,
    dlogits: Tensor | None = None,
) -> PolicyRows:
    """`weights * (policy_weights * objective + beta * KL) - entropy_weights * entropy`, a row each,
    with r = exp(clamped(logp - old_logp)).

    logits [N, V] of any row stride, targets [N] int32 or int64, the other tensors [N] float32,
    temperature a number or [N] float32 -> [N] float32 each; kl where ref_logp is given. `dlogits`
    [N, V], logits itself or other memory of any float dtype, receives d(sum(loss)) / d(logits).
    Objectives of the log-prob lp and the advantage A:
      clip       -min(min(r, cap) A, clip(r, low, high) A), where A < 0 at most -dual_clip A
      cispo      -clip(r, low, high) A lp, the ratio a constant
      sapo       -4 / tau sigmoid(tau (r - 1)) A, tau = high where A > 0, else low
      dppo_tv    -min(r, cap) A lp, the ratio a constant, while p moved by at most high up (A > 0)
                 or low down
      dppo_kl    the same with the binary KL of old and new p as the distance
      dro        -(lp A - low / 2 (lp - old_logp)^2)
      reinforce  -lp A
    `bias_corrected_kl` multiplies the KL by r. Weight 0 masks a row: outputs and gradient exactly
    0, nothing of it read. Without old_logp the ratio is exactly 1. In a live row, a target outside
    [0, V), NaN, or an impossible token gives NaN. Raises ValueError for a wrong shape, dtype,
    device or stride.
    """
    n, v = check_logits(logits, _policy_loss_kernel)
    device = logits.device
    check_tensor("targets", targets, (n,), INTEGERS, device)
    required = {"advantages": advantages, "weights": weights}
    optional = {
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "policy_weights": policy_weights,
        "entropy_weights": entropy_weights,
    }
    given = {name: vector for name, vector in optional.items() if vector is not None}
    for name, vector in (required | given).items():
        check_tensor(name, vector, (n,), (torch.float32,), device)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}, expected one of {OBJECTIVES}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator is {kl_estimator!r}, expected one of {KL_ESTIMATORS}")
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp is None, expected [N] float32 for beta = {beta}")
    scale = temperature_arguments(temperature, n, device)
    if dlogits is not None:
        check_written_rows("dlogits", dlogits, logits)
    loss, logp, entropy, ratio, mass, slope = (
        torch.empty(n, dtype=torch.float32, device=device) for _ in range(6)
    )
    kl = None if ref_logp is None else torch.empty_like(loss)
    if n:
        with torch.cuda.device_of(logits):
            _policy_loss_kernel[grid_of(n)](
                logits,
                targets,
                **{f"p_{name}": vector for name, vector in (required | optional).items()},
                p_dlogits=dlogits,
                p_loss=loss,
                p_logp=logp,
                p_entropy=entropy,
                p_ratio=ratio,
                p_kl=kl,
                p_mass=mass,
                p_slope=slope,
                stride_logits=logits.stride(0),
                stride_dlogits=0 if dlogits is None else dlogits.stride(0),
                low=float(low),
                high=float(high),
                cap=float(cap),
                dual_clip=float(dual_clip),
                beta=float(beta),
                log_ratio_clamp=float(log_ratio_clamp),
                OBJECTIVE=objective,
                ESTIMATOR=kl_estimator.removesuffix("+"),
                K2_SLOPE=kl_estimator.endswith("+"),
                BIAS_CORRECTED=bias_corrected_kl,
                **scale,
                **vocabulary_arguments(CONFIGS, v),
            )
    return PolicyRows(loss, logp, entropy, ratio, kl, mass, slope)
