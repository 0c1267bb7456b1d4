"""segment_reduce: packed values [T] and bounds [S+1] to one sum or mean a sequence [S].

Letters: `T` packed tokens, `S` sequences; `i_` program ids, `o_` offsets, `p_` pointers, `b_`
blocks, `BT` tokens at a time. Sums in float32. One program a sequence, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FLOATS, INTEGERS, check_kernel_runs, check_tensor, grid_of, length_of

# Completions of hundreds to thousands of tokens are one to a few blocks.
CONFIGS = [{"BT": 1024, "num_warps": 4}]
REDUCTIONS = ("sum", "mean")


@triton.jit
def _segment_reduce_kernel(p_x, p_cu_seqlens, p_out, MEAN: tl.constexpr, BT: tl.constexpr):
    i_segment = tl.program_id(0).to(tl.int64)
    start = tl.load(p_cu_seqlens + i_segment).to(tl.int64)
    end = tl.load(p_cu_seqlens + i_segment + 1).to(tl.int64)
    b_sum = tl.zeros([BT], tl.float32)
    for o in range(start, end, BT):
        o_t = o + tl.arange(0, BT)
        b_sum += tl.load(p_x + o_t, mask=o_t < end, other=0).to(tl.float32)
    result = tl.sum(b_sum, 0)
    if MEAN:
        result = result / tl.where(end > start, end - start, 1).to(tl.float32)
    tl.store(p_out + i_segment, result)


def segment_reduce(x: Tensor, cu_seqlens: Tensor, *, reduce: str = "sum") -> Tensor:
    """`[reduce(x[a:b]) for a, b in pairwise(cu_seqlens)]`: x [T], cu_seqlens [S+1] -> [S] float32.

    x float32, bfloat16, float16 or bool; cu_seqlens int32 or int64, ascending from 0 to T; an empty
    segment is 0. Raises ValueError for a wrong shape, dtype, device or stride.
    """
    t = length_of("x", x, "[T]")
    s = length_of("cu_seqlens", cu_seqlens, "[S + 1]", least=1) - 1
    device = x.device
    check_tensor("x", x, (t,), (*FLOATS, torch.bool), device)
    check_kernel_runs("x", x, _segment_reduce_kernel)
    check_tensor("cu_seqlens", cu_seqlens, (s + 1,), INTEGERS, device)
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is {reduce!r}, expected one of {REDUCTIONS}")
    out = torch.empty(s, dtype=torch.float32, device=device)
    if s:
        with torch.cuda.device_of(x):
            _segment_reduce_kernel[grid_of(s)](
                x.view(torch.uint8) if x.dtype == torch.bool else x,
                cu_seqlens,
                out,
                MEAN=reduce == "mean",
                **CONFIGS[0],
            )
    return out
