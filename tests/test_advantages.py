"""Group advantages: against the oracle for every option, ragged and unscored groups, and bad
arguments."""

import itertools
import math

import pytest
import torch

from grpo_fast import InputError, group_advantages, reference

NAN = math.nan
# dead group, unscored member, unscored group, a pair, one far outlier
REWARDS = torch.tensor([1, 1, 1, 0, NAN, 1, NAN, NAN, NAN, 0.25, 0.5, -3, 100, 0, 0.1])
IDS = torch.tensor([5, 5, 5, 2, 2, 2, 9, 9, 9, 0, 0, 7, 7, 7, 7])
OPTIONS = list(
    itertools.product(("group", "batch", "none"), ("mean", "leave_one_out"), (True, False))
)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("scale, baseline, unbiased", OPTIONS)
def test_against_the_oracle_ragged_and_shuffled(scale, baseline, unbiased, impl, device):
    shuffle = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    rewards, ids = REWARDS[shuffle].to(device), IDS[shuffle].to(device)
    options = {"scale": scale, "baseline": baseline, "unbiased": unbiased}
    found = group_advantages(rewards, group_ids=ids, impl=impl, **options)
    expected = reference.group_advantage(rewards.double(), ids, **options)
    for name, got, want in zip(found._fields, found, expected, strict=True):
        assert torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-6, equal_nan=True), (
            name
        )


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_group_size_is_neighbours(impl, device):
    rewards = torch.tensor([0.0, 1.0, 3.0, 3.0], device=device)
    found = group_advantages(rewards, group_size=2, scale="none", impl=impl)
    assert found.advantages.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert found.group_mean.tolist() == [0.5, 3.0]
    assert found.degenerate.tolist() == [False, True]


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_teach_exactly_nothing(value, impl, device):
    """Rounding in the mean of G equal numbers must not be amplified by 1 / eps."""
    found = group_advantages(torch.full((14,), value, device=device), group_size=7, impl=impl)
    assert not found.advantages.any()
    assert found.degenerate.all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_nothing_scored(scale, device):
    found = group_advantages(torch.full((4,), NAN, device=device), group_size=2, scale=scale)
    assert found.advantages.tolist() == [0.0] * 4
    assert found.degenerate.all()
    assert found.group_mean.isnan().all()


def test_advantages_do_not_depend_on_the_order_of_members(device):
    rewards = torch.rand(12, device=device)
    ids = torch.arange(12, device=device) % 3
    whole = group_advantages(rewards, group_ids=ids).advantages
    back = torch.arange(11, -1, -1, device=device)
    flipped = group_advantages(rewards[back], group_ids=ids[back]).advantages
    assert torch.allclose(flipped[back], whole, atol=1e-6)


def test_lists_are_welcome():
    assert group_advantages([0, 1], group_size=2, scale="none").advantages.tolist() == [-0.5, 0.5]


BAD = {
    "inf": (([0.0, math.inf],), {"group_size": 2}, r"rewards\[1\] is inf"),
    "one": (([0.0],), {"group_size": 1}, "group_size = 1, expected at least 2"),
    "ragged": (([0.0] * 5,), {"group_size": 2}, "5 rewards do not divide into groups of .* 2"),
    "both": (([0.0] * 2,), {"group_size": 2, "group_ids": [0, 0]}, "not both"),
    "neither": (([0.0] * 2,), {}, "either group_size"),
    "shape": ((torch.zeros(2, 2),), {"group_size": 2}, r"rewards has shape \(2, 2\)"),
    "ids": (([0.0] * 2,), {"group_ids": [0, 1, 2]}, r"group_ids has shape \(3,\)"),
    "float-ids": (([0.0] * 2,), {"group_ids": [0.0, 0.5]}, "expected integers"),
    "scale": (([0.0] * 2,), {"group_size": 2, "scale": "std"}, "choose one of group, batch, none"),
    "baseline": (([0.0] * 2,), {"group_size": 2, "baseline": "loo"}, "mean, leave_one_out"),
    "eps": (([0.0] * 2,), {"group_size": 2, "eps": -1}, "eps = -1"),
}


@pytest.mark.parametrize("arguments, options, message", BAD.values(), ids=BAD.keys())
def test_bad_argument_is_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        group_advantages(*arguments, **options)
