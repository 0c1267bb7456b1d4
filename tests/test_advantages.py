"""Group advantages: against the oracle for every option, of one reward and of several, ragged and
unscored groups, what must hold of any rewards, and bad arguments."""

import itertools
import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast import InputError, group_advantages, reference
from grpo_fast.advantage_config import Baseline, MultiReward, Scale, advantage_conflict

NAN = math.nan
# dead group, unscored member, unscored group, a pair, one far outlier
REWARDS = torch.tensor([1, 1, 1, 0, NAN, 1, NAN, NAN, NAN, 0.25, 0.5, -3, 100, 0, 0.1])
IDS = torch.tensor([5, 5, 5, 2, 2, 2, 9, 9, 9, 0, 0, 7, 7, 7, 7])
SCALES, BASELINES, MULTI = (typing.get_args(choices) for choices in (Scale, Baseline, MultiReward))
CHOICES = [
    {"multi_reward": multi, "scale": scale, "baseline": baseline}
    for multi, scale, baseline in itertools.product(MULTI, SCALES, BASELINES)
    if advantage_conflict(scale=scale, baseline=baseline, multi_reward=multi) is None
]
# Two rewards and a third that applies to nobody in the group of three at the end.
SEVERAL = torch.stack([REWARDS, REWARDS.flip(0), torch.arange(15.0) % 4], 1)
SEVERAL[9:11, 2] = NAN
WEIGHTS = (1.0, -0.5, 0.25)


def words(options: dict) -> str:
    return "-".join(map(str, options.values()))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("options", CHOICES, ids=words)
@pytest.mark.parametrize("several", [False, True])
def test_against_the_oracle_ragged_and_shuffled(several, options, impl, device):
    shuffle = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    table = SEVERAL if several else REWARDS[:, None]
    weights = WEIGHTS if several else (1.0,)
    rewards, ids = table[shuffle].to(device), IDS[shuffle].to(device)
    for unbiased in (True, False):
        own = {"unbiased": unbiased, **options}
        found = group_advantages(rewards, weights=weights, group_ids=ids, impl=impl, **own)
        expected = reference.multi_reward_advantage(
            rewards.double(), ids, torch.tensor(weights, device=device).double(), **own
        )
        for name, got, want in zip(found._fields, found, expected, strict=True):
            assert torch.allclose(
                got.double(), want.double(), rtol=1e-5, atol=1e-6, equal_nan=True
            ), name


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


@pytest.mark.parametrize("options", CHOICES, ids=words)
def test_nothing_scored(options, device):
    nothing = torch.full((4, 2), NAN, device=device)
    found = group_advantages(nothing, weights=(1, 1), group_size=2, **options)
    assert found.advantages.tolist() == [0.0] * 4
    assert found.degenerate.all()
    assert found.group_mean.isnan().all()


# Of two rewards: (1, 0.5), one that does not apply, one completion nobody could score, (2, 1.5);
# then a group that is right but for one.
TABLE = [[1, 0.5], [0, NAN], [NAN, NAN], [2, 1.5], [1, 1], [1, NAN], [NAN, 0], [1, 1]]
# Sums with weights (1, 2): 2, 0, -, 5 of mean 7/3 and std 2.5166; 3, 1, 0, 3 of mean 7/4, std 1.5.
BY_HAND = {
    "group": [-0.132448, -0.927136, 0, 1.059584, 0.833278, -0.499967, -1.166589, 0.833278],
    # all seven sums: std 1.825742
    "batch": [-0.182564, -1.277949, 0, 1.460514, 0.684616, -0.410769, -0.958462, 0.684616],
    "none": [-0.333333, -2.333333, 0, 2.666667, 1.25, -0.75, -1.75, 1.25],
}
# z-scores 0, -0.9999, -, 0.9999 and -0.707007, -, -, 0.707007 (std 1 and 0.707107); 0, 0, -, 0 and
# 0.577250, -, -1.154501, 0.577250. With weights (1, 2): -1.414014, -0.9999, -, 2.413914, 1.154501,
# 0, -2.309001, 1.154501, of mean 0 and std 1.674486.
GDPO = [-0.844395, -0.597102, 0, 1.441498, 0.689424, 0, -1.378848, 0.689424]


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("scale", BY_HAND)
def test_several_rewards_summed_by_hand(scale, impl, device):
    found = group_advantages(
        torch.tensor(TABLE, device=device), weights=(1, 2), group_size=4, scale=scale, impl=impl
    )
    assert found.advantages.tolist() == pytest.approx(BY_HAND[scale], abs=2e-6)
    assert found.group_mean.tolist() == pytest.approx([7 / 3, 7 / 4])
    assert found.group_std.tolist() == pytest.approx([2.516611, 1.5])


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_several_rewards_normalized_by_hand(impl, device):
    found = group_advantages(
        torch.tensor(TABLE, device=device),
        weights=(1, 2),
        group_size=4,
        multi_reward="normalize_then_sum",
        impl=impl,
    )
    assert found.advantages.tolist() == pytest.approx(GDPO, abs=2e-6)
    assert found.group_mean.tolist() == pytest.approx([7 / 3, 7 / 4])
    assert found.degenerate.tolist() == [False, False]


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_gdpo_sees_what_a_sum_hides(impl, device):
    """Equal sums teach nothing summed, and the opposite of one another normalized; equal rewards
    teach exactly nothing either way."""
    rewards = torch.tensor([[3, 0], [2, 1], [0, 3], [0.1, 0.7], [0.1, 0.7], [0.1, 0.7]])
    options = {"weights": (1, 1), "group_size": 3, "impl": impl}
    summed = group_advantages(rewards.to(device), **options)
    assert summed.degenerate.tolist() == [True, True]
    assert not summed.advantages.any()
    other = {"multi_reward": "normalize_then_sum", "weights": (1, 0.5)}
    found = group_advantages(rewards.to(device), **options | other)
    assert found.degenerate.tolist() == [False, True]
    assert found.advantages[0] > 0 > found.advantages[2]
    assert not found.advantages[3:].any()
    # a reward of weight 0 keeps no group alive
    rewards = torch.tensor([[0.1, 0], [0.1, 1]], device=device)
    found = group_advantages(rewards, **options | other | {"weights": (1, 0), "group_size": 2})
    assert found.degenerate.tolist() == [True]
    assert not found.advantages.any()


def test_sums_equal_on_paper_are_equal(device):
    """In float32 the sum of 0.3, 0.7 and 0.9 has three values, by order, which 1 / eps must not
    amplify."""
    rewards = torch.tensor(list(itertools.permutations((0.3, 0.7, 0.9))), device=device)
    found = group_advantages(rewards, weights=(1, 1, 1), group_size=6)
    assert found.degenerate.tolist() == [True]


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize(
    "options, expected",
    [
        # the best of 3, 1, 0 leads by 2; two that share the top lead by nothing
        ({"baseline": "pass_at_k", "scale": "none"}, [0, 2, 0, NAN, 0, 0, 0, 0]),
        # over the std of 0, 3, 1, sqrt(7 / 3)
        ({"baseline": "pass_at_k", "eps": 0}, [0, 2 / math.sqrt(7 / 3), 0, NAN, 0, 0, 0, 0]),
        # mean 4/3 and 3/2
        ({"scale": "mean"}, [-1, 1.25, -0.25, NAN, 1 / 3, 1 / 3, -1, 1 / 3]),
        # 7 scored, 5 of them not 0
        (
            {"scale": "nonzero"},
            [x * 7 / 5 for x in (-4 / 3, 5 / 3, -1 / 3, NAN, 0.5, 0.5, -1.5, 0.5)],
        ),
    ],
    ids=["lead", "lead over std", "maxrl", "gpg"],
)
def test_other_baselines_and_scales_by_hand(options, expected, impl, device):
    rewards = torch.tensor([0, 3, 1, NAN, 2, 2, 0, 2], device=device)
    found = group_advantages(rewards, group_size=4, impl=impl, **options).advantages
    expected = [0 if math.isnan(x) else x for x in expected]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_scales_without_a_number_to_scale_by_give_0(impl, device):
    """MaxRL of means 0 and -1, GPG of a batch without a reward that is not 0."""
    rewards = torch.tensor([-1.0, 1, -2, 0], device=device)
    found = group_advantages(rewards, group_size=2, scale="mean", impl=impl)
    assert not found.advantages.any()
    assert found.degenerate.tolist() == [False, False]
    nothing = torch.zeros(4, device=device)
    found = group_advantages(nothing, group_size=2, scale="nonzero", impl=impl)
    assert not found.advantages.any()


numbers = st.integers(-8, 8).map(lambda k: k / 4) | st.just(NAN)
groups = st.lists(st.lists(numbers, min_size=2, max_size=6), min_size=1, max_size=4)


def flat(rewards: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [p for p, group in enumerate(rewards) for _ in group]
    return torch.tensor([r for group in rewards for r in group]), torch.tensor(ids)


def column(rewards: torch.Tensor, multi: str) -> tuple[torch.Tensor, tuple[float, ...]]:
    """One reward, or two that differ."""
    if multi == "sum_then_normalize":
        return rewards[:, None], (1.0,)
    return torch.stack([rewards, rewards.roll(1)], 1), (1.0, 0.5)


@pytest.mark.parametrize("options", CHOICES, ids=words)
@settings(max_examples=40, deadline=None)
@given(rewards=groups, seed=st.integers(0, 99))
def test_neither_order_nor_unscored_completions_change_anything(options, rewards, seed):
    values, ids = flat(rewards)
    table, weights = column(values, options["multi_reward"])
    before = group_advantages(table, weights=weights, group_ids=ids, **options).advantages
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(0, len(rewards), (3,), generator=generator)
    order = torch.randperm(len(ids) + 3, generator=generator)
    table = torch.cat([table, table.new_full((3, table.shape[1]), NAN)])[order]
    ids = torch.cat([ids, extra])[order]
    after = group_advantages(table, weights=weights, group_ids=ids, **options).advantages
    after = torch.empty_like(after).index_copy_(0, order, after)
    assert not after[-3:].any()
    assert torch.allclose(after[:-3], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", CHOICES, ids=words)
@settings(max_examples=40, deadline=None)
@given(rewards=groups)
def test_advantages_of_a_group_add_up_to_0(options, rewards):
    """With every baseline but the best one's lead, which is positive."""
    values, ids = flat(rewards)
    table, weights = column(values, options["multi_reward"])
    found = group_advantages(table, weights=weights, group_ids=ids, **options).advantages
    sums = torch.zeros(len(rewards)).index_add_(0, ids, found)
    if options["baseline"] == "pass_at_k":
        assert (found >= 0).all()
    else:
        assert torch.allclose(sums, torch.zeros_like(sums), atol=1e-4 * float(found.abs().max()))


@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale != "mean"])
@settings(max_examples=40, deadline=None)
@given(rewards=groups)
def test_leave_one_out_is_the_centred_reward_times_n_over_n_minus_1(scale, rewards):
    values, ids = flat(rewards)
    own, others = (
        group_advantages(values, group_ids=ids, scale=scale, baseline=baseline).advantages
        for baseline in ("mean", "leave_one_out")
    )
    n = torch.zeros(len(rewards)).index_add_(0, ids, (~values.isnan()).float())[ids]
    assert torch.allclose(others, own * n / (n - 1).clamp(min=1), rtol=1e-4, atol=1e-6)


def test_lists_are_welcome():
    assert group_advantages([0, 1], group_size=2, scale="none").advantages.tolist() == [-0.5, 0.5]


BAD = {
    "inf": (([0.0, math.inf],), {"group_size": 2}, r"rewards\[1\] is inf"),
    "inf-of-several": (
        ([[0.0, 1.0], [-math.inf, 0.0]],),
        {"group_size": 2, "weights": (1, 1)},
        r"rewards\[1, 0\] is -inf",
    ),
    "overflow": (
        ([[0.0, 0.0], [3e38, 3e38]],),
        {"group_size": 2, "weights": (1, 1)},
        r"weighted sum of rewards\[1\] overflows float32",
    ),
    "no-weights": (([[0.0], [1.0]],), {"group_size": 2}, r"\(2, 1\), expected \[S\]"),
    "weights-alone": (
        ([0.0, 1.0],),
        {"group_size": 2, "weights": (1,)},
        r"\(2,\), expected \[S, R\] beside weights",
    ),
    "weights": (
        ([[0.0, 1.0]] * 2,),
        {"group_size": 2, "weights": (1, 1, 1)},
        r"weights has shape \(3,\) beside rewards \(2, 2\)",
    ),
    "zero-weights": (
        ([[0.0, 1.0]] * 2,),
        {"group_size": 2, "weights": (0, 0)},
        r"weights = \[0.0, 0.0\], expected finite numbers, at least one not 0",
    ),
    "nan-weights": (
        ([[0.0, 1.0]] * 2,),
        {"group_size": 2, "weights": (NAN, 1)},
        "weights = .*expected finite",
    ),
    "multi": (
        ([0.0] * 2,),
        {"group_size": 2, "multi_reward": "normalise_then_sum"},
        "did you mean 'normalize_then_sum'",
    ),
    "gdpo-scale": (
        ([0.0] * 2,),
        {"group_size": 2, "multi_reward": "normalize_then_sum", "scale": "none"},
        "scale = 'none' and baseline = 'mean': leave both out",
    ),
    "gdpo-baseline": (
        ([0.0] * 2,),
        {"group_size": 2, "multi_reward": "normalize_then_sum", "baseline": "pass_at_k"},
        "baseline = 'pass_at_k': leave both out",
    ),
    "maxrl-baseline": (
        ([0.0] * 2,),
        {"group_size": 2, "scale": "mean", "baseline": "leave_one_out"},
        "scale = 'mean' .MaxRL. divides by the mean it subtracts",
    ),
    "gpg-baseline": (
        ([0.0] * 2,),
        {"group_size": 2, "scale": "nonzero", "baseline": "pass_at_k"},
        "scale = 'nonzero' .GPG.*choose scale group, batch or none",
    ),
    "one": (([0.0],), {"group_size": 1}, "group_size = 1, expected at least 2"),
    "ragged": (([0.0] * 5,), {"group_size": 2}, "5 rewards do not divide into groups of .* 2"),
    "both": (([0.0] * 2,), {"group_size": 2, "group_ids": [0, 0]}, "not both"),
    "neither": (([0.0] * 2,), {}, "either group_size"),
    "shape": ((torch.zeros(2, 2),), {"group_size": 2}, r"rewards has shape \(2, 2\)"),
    "ids": (([0.0] * 2,), {"group_ids": [0, 1, 2]}, r"group_ids has shape \(3,\)"),
    "float-ids": (([0.0] * 2,), {"group_ids": [0.0, 0.5]}, "expected integers"),
    "scale": (
        ([0.0] * 2,),
        {"group_size": 2, "scale": "std"},
        "choose one of group, batch, none, mean, nonzero",
    ),
    "baseline": (
        ([0.0] * 2,),
        {"group_size": 2, "baseline": "loo"},
        "mean, leave_one_out, pass_at_k",
    ),
    "eps": (([0.0] * 2,), {"group_size": 2, "eps": -1}, "eps = -1"),
}


@pytest.mark.parametrize("arguments, options, message", BAD.values(), ids=BAD.keys())
def test_bad_argument_is_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        group_advantages(*arguments, **options)
