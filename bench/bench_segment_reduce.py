"""segment_reduce: packed values [T] to one sum a sequence [S].

Bytes: 4 T read; bounds and sums, 12 S.
"""

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.implementation import launchers

from .inputs import generator_on
from .timing import (
    Case,
    Size,
    assert_right,
    benchmark_column,
    copy_ceiling,
    implementation_on,
    input_sets,
)

SIZES = {
    "cpu": [Size(label="sum", shape={"T": 65536, "S": 128})],
    "cuda": [Size(label="sum", shape={"T": 4194304, "S": 4096})],
}


def case(size: Size, device: torch.device) -> Case:
    t, s = size.shape["T"], size.shape["S"]
    moved = 4 * t + 12 * s
    sets = input_sets(moved, device)
    source = generator_on(device, 0)
    x = torch.randn(sets, t, generator=source, device=device)
    # Ragged on purpose: completions end when they end.
    inner = torch.randint(0, t + 1, (s - 1,), generator=source, device=device).sort().values
    cu_seqlens = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), t)])
    ids = torch.arange(s, device=device).repeat_interleave(torch.diff(cu_seqlens))
    kernels = launchers(implementation_on(device))

    def ours(call: int) -> Tensor:
        return kernels.segment_reduce(x[call % sets], cu_seqlens, reduce="sum")

    def eager(call: int) -> Tensor:
        return torch.zeros(s, device=device).index_add_(0, ids, x[call % sets])

    def check() -> None:
        oracle = reference.segment_reduce(x[0].double().cpu(), cu_seqlens.cpu())
        assert_right(ours(0), eager(0), oracle, name="sums")

    return Case(
        op="segment_reduce",
        size=size,
        columns={"ours": ours, "eager": eager, "ceiling": copy_ceiling(moved, device)},
        check=check,
        bytes=moved,
        flops=t,
    )


def test_segment_reduce(benchmark, size, column, device):
    benchmark_column(benchmark, case(size, device), column, device)
