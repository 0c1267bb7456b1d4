"""group_advantage against the float64 oracle: ragged groups in any order, NaN rewards left out.

Grid: blocks of 4 members, so that groups of 1 to 11 are a part of a block, one, or several; every
scale with every baseline. NaN rewards stand in the first, the middle and the last block.
"""

import dataclasses
import inspect
import itertools
import math

import pytest
import torch

from grpo_fast import reference
from grpo_fast.testing import assert_close_to_oracle
from grpo_kernels import group_advantage as module

SMALL_BLOCKS = [{"BS": 4, "num_warps": 1}]
SIZES = (3, 1, 4, 11, 2, 5, 6, 8)
NAN = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    sizes: tuple[int, ...] = SIZES
    scale: str = "group"
    baseline: str = "mean"
    unbiased: bool = True
    shuffled: bool = False
    unscored: bool = True
    mean: float = 0.0
    ties: bool = False
    eps: float = 1e-4
    index: torch.dtype = torch.int64


CASES = {
    "plain": Case(unscored=False),
    "unscored": Case(),
    "shuffled": Case(shuffled=True),
    "int32": Case(shuffled=True, index=torch.int32),
    "far from zero": Case(mean=1e3),
    "no eps": Case(sizes=(3, 5, 7), eps=0.0, unscored=False),
    "one group": Case(sizes=(13,)),
    "ties": Case(baseline="pass_at_k", ties=True),
    "means of both signs": Case(scale="mean", mean=0.3),
} | {
    f"scale {scale}, baseline {baseline}, unbiased {unbiased}": Case(
        scale=scale, baseline=baseline, unbiased=unbiased, shuffled=True
    )
    for scale, baseline in itertools.product(module.SCALES, module.BASELINES)
    for unbiased in ((True, False) if scale == "group" else (True,))
}


def arguments(case: Case, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict]:
    """rewards, offsets, order and flags; the last two groups have one scored member and none."""
    generator = torch.Generator().manual_seed(sum(case.sizes))
    total = sum(case.sizes)
    rewards = torch.randn(total, generator=generator) + case.mean
    if case.ties:
        rewards = rewards.round()
    offsets = torch.tensor([0, *itertools.accumulate(case.sizes)])
    if case.unscored:
        rewards[torch.rand(total, generator=generator) < 0.25] = NAN
        rewards[offsets[-2] :] = NAN
        if len(case.sizes) > 1:
            rewards[offsets[-3] + 1 : offsets[-2]] = NAN
    order = None
    if case.shuffled:
        order = torch.randperm(total, generator=generator)
        rewards = torch.empty_like(rewards).index_copy_(0, order, rewards)
        order = order.to(case.index).to(device)
    flags = {name: getattr(case, name) for name in ("scale", "baseline", "unbiased", "eps")}
    return rewards.to(device), offsets.to(case.index).to(device), order, flags


def expected(rewards, offsets, order, flags: dict, dtype: torch.dtype):
    spans = torch.diff(offsets).long()
    group = torch.arange(len(spans), device=rewards.device).repeat_interleave(spans)
    ids = group if order is None else torch.empty_like(group).index_copy_(0, order.long(), group)
    return reference.group_advantage(rewards.to(dtype), ids, **flags)


def check_group_advantage(group_advantage, case: Case, device) -> None:
    """The comparison of this file, for any launcher."""
    rewards, offsets, order, flags = arguments(case, device)
    eager, oracle = (
        expected(rewards, offsets, order, flags, dtype) for dtype in (torch.float32, torch.float64)
    )
    out = group_advantage(rewards, offsets, order=order, **flags)
    for name in ("advantages", "mean", "std"):
        assert_close_to_oracle(*(getattr(x, name) for x in (out, eager, oracle)), name=name)
    assert out.degenerate.dtype == torch.bool
    assert torch.equal(out.degenerate, oracle.degenerate)
    teaches_nothing = oracle.advantages == 0
    assert not out.advantages[teaches_nothing].any()


@pytest.fixture
def launcher(monkeypatch, guard):
    """group_advantage in small blocks, each argument between canaries."""
    monkeypatch.setattr(module, "CONFIGS", SMALL_BLOCKS)
    return guard(module.group_advantage)


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, launcher, device):
    check_group_advantage(launcher, CASES[name], device)


def test_own_block(guard, device):
    check_group_advantage(guard(module.group_advantage), Case(sizes=(130, 16, 128, 9)), device)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e7])
@pytest.mark.parametrize("baseline", module.BASELINES)
def test_equal_rewards_teach_exactly_nothing(value, baseline, launcher, device):
    """0.1 seven times has a rounded mean that is not 0.1."""
    rewards = torch.full((7,), value, device=device)
    rewards[3] = NAN
    out = launcher(rewards, torch.tensor([0, 7], device=device), baseline=baseline)
    assert out.degenerate.tolist() == [True]
    assert not out.advantages.any()


@pytest.mark.parametrize("unbiased", [True, False])
def test_too_few_scored_members(unbiased, launcher, device):
    """None, one of three, and an empty group: no advantage, no std, a mean where there is one."""
    rewards = torch.tensor([NAN, NAN, NAN, 2.0, NAN], device=device)
    offsets = torch.tensor([0, 2, 5, 5], device=device)
    out = launcher(rewards, offsets, unbiased=unbiased)
    assert not out.advantages.any()
    assert out.degenerate.all()
    assert out.std.isnan().all()
    assert out.mean.isnan().tolist() == [True, False, True]
    assert float(out.mean[1]) == 2.0


def test_no_groups(launcher, device):
    out = launcher(torch.zeros(0, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    assert [len(x) for x in out] == [0, 0, 0, 0]


def test_a_groups_result_is_its_own(launcher, device):
    rewards = torch.rand(12, device=device)
    offsets = torch.tensor([0, 5, 12], device=device)
    both = launcher(rewards, offsets)
    rewards[5:] = NAN
    one = launcher(rewards, offsets)
    assert torch.equal(both.advantages[:5], one.advantages[:5])
    assert not one.advantages[5:].any()


def test_eps_is_a_run_time_argument():
    parameters = inspect.signature(module._group_advantage_kernel.fn).parameters
    constants = {name for name, p in parameters.items() if p.annotation is not p.empty}
    assert constants == {"SCALE", "BASELINE", "UNBIASED", "BS"}


def test_the_best_gets_its_lead_over_the_second(launcher, device):
    """A lone best, two that share the top, and all of them below 0."""
    rewards = torch.tensor([0, 1, 3, NAN, 2, 1, 2, -5, -1, -8], device=device)
    offsets = torch.tensor([0, 4, 7, 10], device=device)
    out = launcher(rewards, offsets, scale="none", baseline="pass_at_k")
    assert out.advantages.tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 4, 0]


def test_a_mean_that_is_not_positive_scales_nothing(launcher, device):
    rewards = torch.tensor([0, 1, 3, 4, NAN, -1, 1, -3, -1], device=device)
    out = launcher(rewards, torch.tensor([0, 5, 7, 9], device=device), scale="mean")
    assert out.advantages.tolist() == [-1, -0.5, 0.5, 1, 0, 0, 0, 0, 0]
    assert not out.degenerate.any()


@pytest.mark.gpu
def test_many_groups(device):
    check_group_advantage(module.group_advantage, Case(sizes=(8, 3) * 500), device)
    p = 70_000
    out = module.group_advantage(
        torch.tensor([0.0, 1.0], device=device).repeat(p),
        torch.arange(0, 2 * p + 1, 2, device=device),
        scale="none",
    )
    assert torch.equal(out.advantages, torch.tensor([-0.5, 0.5], device=device).repeat(p))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"rewards": torch.zeros(4).double()}, "rewards is torch.strided torch.float64"),
        ({"rewards": torch.zeros(2, 2)}, r"rewards has shape \(2, 2\), expected \[S\]"),
        ({"rewards": [0.0, 1.0]}, "rewards has shape list, expected"),
        ({"offsets": torch.tensor(4)}, r"offsets has shape \(\), expected \[P \+ 1\]"),
        ({"offsets": torch.zeros(0).long()}, r"offsets has shape \(0,\), expected \[P \+ 1\]"),
        ({"offsets": torch.zeros(2)}, "offsets is torch.strided torch.float32"),
        ({"order": torch.zeros(3).long()}, r"order has shape \(3,\), expected \(4,\)"),
    ],
)
def test_a_wrong_argument_is_named(changed, message, device):
    good = {"rewards": torch.zeros(4), "offsets": torch.tensor([0, 4]), "order": None}
    given = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (good | changed).items()
    }
    with pytest.raises(ValueError, match=message):
        module.group_advantage(given["rewards"], given["offsets"], order=given["order"])


@pytest.mark.parametrize("name", ["scale", "baseline"])
def test_an_unknown_choice_is_named(name, device):
    rewards, offsets = torch.zeros(4, device=device), torch.tensor([0, 4], device=device)
    with pytest.raises(ValueError, match=f"{name} is 'batch', expected one of"):
        module.group_advantage(rewards, offsets, **{name: "batch"})
