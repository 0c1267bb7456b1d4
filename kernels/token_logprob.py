"""token_logprob: logits [N, V] and targets [N] to log-prob, log-sum-exp and entropy, and back.

Letters: `N` rows, `V` vocabulary; `i_` program ids, `o_` offsets, `m_` masks, `p_` pointers, `b_`
blocks, `BV` entries of a row at a time. Logits float32, bfloat16 or float16; arithmetic and [N]
vectors float32. One program a row, no atomics: the same bits every time, whatever else is in the
batch.
"""

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
    inverse_temperature,
    row_logprob,
    row_statistics,
    zero_row,
)

CONFIGS = STATISTICS_CONFIGS
# Of the gradient: 8 entries a thread, no spills, five programs on an SM.
GRADIENT_CONFIGS = [
    {"BV": 2048, "num_warps": 8},
    {"BV": 256, "num_warps": 1},
]


@triton.jit(do_not_specialize=["v_units"])
def _token_logprob_fwd_kernel(
    p_logits,
    p_targets,
    p_temperature,
    p_logp,
    p_lse,
    p_entropy,
    p_other_squares,
    v_units,
    stride_logits,
    temperature,
    UNIT: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    inv_temperature = inverse_temperature(p_temperature, temperature, i_row)
    i_target = tl.load(p_targets + i_row)
    p_row = p_logits + i_row * stride_logits
    peak, target, others, weighted, squares = row_statistics(
        p_row, i_target, v_units * UNIT, inv_temperature, p_other_squares is not None, BV
    )
    logp, log_total, total, entropy = row_logprob(target, others, weighted, inv_temperature)
    tl.store(p_logp + i_row, logp)
    tl.store(p_lse + i_row, peak * inv_temperature + log_total)
    if p_entropy is not None:
        tl.store(p_entropy + i_row, entropy)
    if p_other_squares is not None:
        tl.store(p_other_squares + i_row, squares / (total * total))


@triton.jit
def _gradient_row(
    p_row,
    p_out,
    i_target,
    dlogp,
    dentropy,
    lse,
    entropy,
    v_size,
    inv_temperature,
    HAS_ENTROPY: tl.constexpr,
    BV: tl.constexpr,
):
    i_target = i_target.to(tl.int32)
    b_target = tl.zeros([BV], tl.float32)
    for o in range(0, v_size, BV):
        o_v = o + tl.arange(0, BV)
        m_v = o_v < v_size
        b_x = tl.load(p_row + o_v, mask=m_v, other=-INF).to(tl.float32)
        b_logp = b_x * inv_temperature - lse
        b_p = tl.exp2(b_logp * LOG2E)
        b_gradient = b_p * (-dlogp * inv_temperature)
        # The target's 1 - p is the sum of all other p, which loses no digit as p goes to 1.
        b_share = tl.where(o_v == i_target, 0.0, -b_gradient)
        if HAS_ENTROPY:
            b_slope = tl.where(b_x == -INF, 0.0, b_p * (b_logp + entropy))
            b_slope = b_slope * (-dentropy * inv_temperature)
            b_gradient += b_slope
            b_share = tl.where(o_v == i_target, b_slope, b_share)
        b_target += b_share
        tl.store(p_out + o_v, b_gradient.to(p_out.dtype.element_ty), mask=m_v)
    target = tl.sum(b_target, 0)
    # The target's column was stored by another thread above.
    tl.debug_barrier()
    inside = (i_target >= 0) & (i_target < v_size)
    tl.store(p_out + i_target, target.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["v_units"])
def _token_logprob_bwd_kernel(
    p_dlogp,
    p_dentropy,
    p_logits,
    p_targets,
    p_lse,
    p_entropy,
    p_temperature,
    p_out,
    v_units,
    stride_logits,
    stride_out,
    temperature,
    UNIT: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    dlogp = tl.load(p_dlogp + i_row)
    live = dlogp != 0.0
    dentropy = 0.0
    entropy = 0.0
    if p_dentropy is not None:
        dentropy = tl.load(p_dentropy + i_row)
        live = live | (dentropy != 0.0)
        entropy = tl.load(p_entropy + i_row)
    p_row = p_out + i_row * stride_out
    if live:
        _gradient_row(
            p_logits + i_row * stride_logits,
            p_row,
            tl.load(p_targets + i_row),
            dlogp,
            dentropy,
            tl.load(p_lse + i_row),
            entropy,
            v_units * UNIT,
            inverse_temperature(p_temperature, temperature, i_row),
            p_dentropy is not None,
            BV,
        )
    else:
        zero_row(p_row, v_units * UNIT, BV)


class TokenLogProb(NamedTuple):
    logp: Tensor
    lse: Tensor
    entropy: Tensor | None
    other_squares: Tensor | None
    """Sum of p^2 over the vocabulary without the target."""


def token_logprob_fwd(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = True,
    return_squares: bool = False,
) -> TokenLogProb:
    """`log_softmax(logits / temperature).gather(targets)`, its log-sum-exp, its entropy in nats and
    the sum of the other entries' squared probabilities, the last two on request.

    logits [N, V] of any row stride, targets [N] int32 or int64, temperature a number or [N] float32
    -> [N] float32 each. A target outside [0, V) gives NaN, as does a NaN or +inf in the row.
    Raises ValueError for a wrong shape, dtype, device or stride.
    """
    n, v = check_logits(logits, _token_logprob_fwd_kernel)
    check_tensor("targets", targets, (n,), INTEGERS, logits.device)
    scale = temperature_arguments(temperature, n, logits.device)
    logp, lse = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropy = torch.empty_like(logp) if return_entropy else None
    other_squares = torch.empty_like(logp) if return_squares else None
    if n:
        with torch.cuda.device_of(logits):
            _token_logprob_fwd_kernel[grid_of(n)](
                logits,
                targets,
                p_logp=logp,
                p_lse=lse,
                p_entropy=entropy,
                p_other_squares=other_squares,
                stride_logits=logits.stride(0),
                **scale,
                **vocabulary_arguments(CONFIGS, v),
            )
    return TokenLogProb(logp, lse, entropy, other_squares)


def token_logprob_bwd(
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """`(dlogp (1[v = t] - p) - dentropy p (log p + entropy)) / temperature`: -> [N, V].

    dlogp, lse and, with an entropy gradient, dentropy and entropy are [N] float32; lse and entropy
    as `token_logprob_fwd` made them. The result is allocated like logits, or written to `out`,
    which may be logits itself or of another float dtype. Rows without an incoming gradient come out
    as exact zeros, their logits unread. Raises ValueError for a wrong shape, dtype, device, stride.
    """
    n, v = check_logits(logits, _token_logprob_bwd_kernel)
    check_tensor("targets", targets, (n,), INTEGERS, logits.device)
    vectors = {"dlogp": dlogp, "lse": lse}
    if dentropy is not None:
        vectors |= {"dentropy": dentropy, "entropy": entropy}
    for name, vector in vectors.items():
        check_tensor(name, vector, (n,), (torch.float32,), logits.device)
    scale = temperature_arguments(temperature, n, logits.device)
    if out is None:
        out = torch.empty((n, v), dtype=logits.dtype, device=logits.device)
    check_written_rows("out", out, logits)
    if n:
        with torch.cuda.device_of(logits):
            _token_logprob_bwd_kernel[grid_of(n)](
                dlogp,
                dentropy,
                logits,
                targets,
                lse,
                None if dentropy is None else entropy,
                p_out=out,
                stride_logits=logits.stride(0),
                stride_out=out.stride(0),
                **scale,
                **vocabulary_arguments(GRADIENT_CONFIGS, v),
            )
    return out
