"""segment_reduce against the float64 oracle: ragged segments, empty ones, every dtype.

Grid: blocks of 8 tokens; segments of none, a part of a block, whole blocks and several with a rest.
"""

import dataclasses
import inspect
import itertools
import math

import pytest
import torch

from grpo_fast import reference
from grpo_fast.testing import assert_close_to_oracle
from grpo_kernels import segment_reduce as module

SMALL_BLOCKS = [{"BT": 8, "num_warps": 1}]
LENGTHS = (3, 0, 8, 1, 21, 16, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    lengths: tuple[int, ...] = LENGTHS
    dtype: torch.dtype = torch.float32
    reduce: str = "sum"
    index: torch.dtype = torch.int64


CASES = {
    f"{reduce} {str(dtype).removeprefix('torch.')}": Case(reduce=reduce, dtype=dtype)
    for reduce in ("sum", "mean")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bool)
} | {
    "int32": Case(index=torch.int32),
    "one segment": Case(lengths=(19,), reduce="mean"),
    "all empty": Case(lengths=(0, 0), reduce="mean"),
}


def arguments(case: Case, device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(case.lengths))
    x = torch.randn(sum(case.lengths), generator=generator)
    x = x > 0 if case.dtype == torch.bool else x.to(case.dtype)
    bounds = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=case.index)
    return x.to(device), bounds.to(device)


def check_segment_reduce(segment_reduce, case: Case, device) -> None:
    """The comparison of this file, for any launcher."""
    x, bounds = arguments(case, device)
    eager, oracle = (
        reference.segment_reduce(x.to(dtype), bounds, reduce=case.reduce)
        for dtype in (torch.float32, torch.float64)
    )
    found = segment_reduce(x, bounds, reduce=case.reduce)
    assert found.dtype == torch.float32
    assert_close_to_oracle(found, eager, oracle, name=case.reduce)
    empty = torch.diff(bounds) == 0
    assert not found[empty].any()


@pytest.fixture
def launcher(monkeypatch, guard):
    """segment_reduce in small blocks, each argument between canaries."""
    monkeypatch.setattr(module, "CONFIGS", SMALL_BLOCKS)
    return guard(module.segment_reduce)


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, launcher, device):
    check_segment_reduce(launcher, CASES[name], device)


def test_own_block(guard, device):
    check_segment_reduce(guard(module.segment_reduce), Case(lengths=(1030, 1024, 7)), device)


def test_sums_of_ones_are_counts(launcher, device):
    bounds = torch.tensor([0, 3, 3, 40], device=device)
    counts = launcher(torch.ones(40, dtype=torch.bool, device=device), bounds)
    assert counts.tolist() == [3.0, 0.0, 37.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_segment(value, launcher, device):
    x = torch.ones(20, device=device)
    x[12] = value
    out = launcher(x, torch.tensor([0, 12, 13, 20], device=device))
    assert out[[0, 2]].tolist() == [12.0, 7.0]
    assert not out[1].isfinite()


def test_tokens_before_the_first_and_after_the_last_bound_are_not_counted(launcher, device):
    x = torch.ones(20, device=device)
    assert launcher(x, torch.tensor([2, 5, 9], device=device)).tolist() == [3.0, 4.0]


def test_no_segments(launcher, device):
    out = launcher(torch.ones(3, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    assert out.shape == (0,)


def test_lengths_are_run_time_arguments():
    parameters = inspect.signature(module._segment_reduce_kernel.fn).parameters
    constants = {name for name, p in parameters.items() if p.annotation is not p.empty}
    assert constants == {"MEAN", "BT"}


@pytest.mark.gpu
def test_many_segments(device):
    bounds = torch.arange(0, 210_001, 3, device=device)
    out = module.segment_reduce(torch.ones(210_000, device=device), bounds)
    assert torch.equal(out, torch.full((70_000,), 3.0, device=device))
    check_segment_reduce(module.segment_reduce, Case(lengths=(100_000, 1, 5000)), device)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.zeros(4).double()}, "x is torch.strided torch.float64, expected"),
        ({"x": torch.zeros(4).int()}, "x is torch.strided torch.int32, expected"),
        ({"x": torch.zeros(2, 2)}, r"x has shape \(2, 2\), expected \[T\]"),
        ({"x": torch.zeros(8)[::2]}, r"x has strides \(2,\), expected 1"),
        ({"cu_seqlens": torch.zeros(0).long()}, r"cu_seqlens has shape \(0,\), expected \[S \+ 1"),
        ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens is torch.strided torch.float32"),
        ({"reduce": "max"}, r"reduce is 'max', expected one of \('sum', 'mean'\)"),
    ],
)
def test_a_wrong_argument_is_named(changed, message, device):
    good = {"x": torch.zeros(4), "cu_seqlens": torch.tensor([0, 4]), "reduce": "sum"}
    given = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (good | changed).items()
    }
    with pytest.raises(ValueError, match=message):
        module.segment_reduce(given["x"], given["cu_seqlens"], reduce=given["reduce"])
