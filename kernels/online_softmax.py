"""Device functions of the kernels that stream rows of logits [N, V]: one row a program.

A row's exponentials are taken relative to its peak, and the target's term stays out of the sum: for
a likely target, log p = -log1p(others) and 1 - p = others / total lose no digit. NaN goes through
every sum; bounds are `tl.where`, because min and max drop NaN.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


@triton.jit
def log1p_fraction(x):
    """log(1 + x) for x in [0, 1], to float32: 2 artanh(z) with z = x / (2 + x) <= 1/3."""
    z = x / (2.0 + x)
    s = z * z
    series = 1.0 / 15.0 + s * (1.0 / 17.0)
    series = 1.0 / 13.0 + s * series
    series = 1.0 / 11.0 + s * series
    series = 1.0 / 9.0 + s * series
    series = 1.0 / 7.0 + s * series
    series = 1.0 / 5.0 + s * series
    series = 1.0 / 3.0 + s * series
    return 2.0 * z + 2.0 * z * s * series


@triton.jit
def inverse_temperature(p_temperature, temperature, i_row):
    """1 / temperature in float32, of the row or of all rows."""
    if p_temperature is not None:
        return 1.0 / tl.load(p_temperature + i_row)
    else:
        return 1.0 / tl.cast(temperature, tl.float32)


@triton.jit
def row_statistics(
    p_row, i_target, v_size, inv_temperature, SQUARES: tl.constexpr, BV: tl.constexpr
):
    """(peak, target, others, weighted, squares) of a row x, with e = exp((x - peak) / temperature).

    peak is the largest logit (0 for a row of -inf only), target = x_t - peak, others the sum of e
    without the target's, weighted the sum of e (x - peak) with it, squares, if asked for, the sum
    of e^2 without the target's. A target outside [0, V) is never read and makes all of them NaN.
    """
    inside = (i_target >= 0) & (i_target < v_size)
    i_target = i_target.to(tl.int32)
    x_target = tl.load(p_row + i_target, mask=inside, other=0.0).to(tl.float32)
    x_target = tl.where(inside, x_target, NAN)
    scale = inv_temperature * LOG2E
    peak = x_target
    b_others = tl.zeros([BV], tl.float32)
    b_weighted = tl.zeros([BV], tl.float32)
    b_squares = tl.zeros([BV], tl.float32)
    for o in range(0, v_size, BV):
        o_v = o + tl.arange(0, BV)
        m_v = (o_v < v_size) & (o_v != i_target)
        b_x = tl.load(p_row + o_v, mask=o_v < v_size, other=-INF).to(tl.float32)
        b_x = tl.where(m_v, b_x, -INF)
        b_peak = tl.max(b_x, 0)
        if b_peak > peak:
            # Before the first finite logit nothing is summed, and -inf - -inf would be NaN.
            growth = tl.where(peak == -INF, 0.0, peak - b_peak)
            decay = tl.exp2(growth * scale)
            b_weighted = (b_weighted + b_others * growth) * decay
            b_others = b_others * decay
            if SQUARES:
                b_squares = b_squares * (decay * decay)
            peak = b_peak
        b_d = b_x - tl.where(peak == -INF, 0.0, peak)
        b_e = tl.exp2(b_d * scale)
        b_others += b_e
        if SQUARES:
            b_squares += b_e * b_e
        b_weighted += tl.where(b_d == -INF, 0.0, b_e * b_d)
    peak = tl.where(peak == -INF, 0.0, peak)
    target = x_target - peak
    e_target = tl.exp2(target * scale)
    weighted = tl.sum(b_weighted, 0) + tl.where(target == -INF, 0.0, e_target * target)
    squares = 0.0
    if SQUARES:
        squares = tl.sum(b_squares, 0)
    return peak, target, tl.sum(b_others, 0), weighted, squares


@triton.jit
def row_logprob(target, others, weighted, inv_temperature):
    """(logp, log_total, total, entropy) from `row_statistics`.

    lse is peak / temperature + log_total. Entropy is log_total - weighted / (temperature total),
    neither term negative.
    """
    e_target = tl.exp2(target * (inv_temperature * LOG2E))
    total = others + e_target
    # Only the peak's own term, 1, can exceed all others together.
    log_total = tl.where(e_target > others, log1p_fraction(others), tl.log(total))
    logp = target * inv_temperature - log_total
    entropy = log_total - weighted * inv_temperature / total
    return logp, log_total, total, entropy


@triton.jit
def zero_row(p_row, v_size, BV: tl.constexpr):
    for o in range(0, v_size, BV):
        o_v = o + tl.arange(0, BV)
        tl.store(p_row + o_v, tl.zeros([BV], p_row.dtype.element_ty), mask=o_v < v_size)
