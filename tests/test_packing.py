"""Groups to micro-batches and back: nothing lost, the budget hard, rows that predict what they
should."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast import ConfigError, InputError
from grpo_fast.packing import Group, collate, members, micro_batches, per_completion


def group(prompt: int, *lengths: int, **more) -> Group:
    """A group of a prompt and completions of these lengths, all ids distinct."""
    ids = iter(range(1, 10**6))
    prompt_ids = [next(ids) for _ in range(prompt)]
    completions = [[next(ids) for _ in range(length)] for length in lengths]
    more = {"advantages": [float(k) for k in range(len(lengths))]} | more
    return Group(prompt_ids=prompt_ids, completion_ids=completions, **more)


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), lengths), min_size=0, max_size=5), st.integers(18, 80))
def test_every_completion_once_and_within_the_budget(shapes, budget):
    groups = [group(prompt, *sizes) for prompt, sizes in shapes]
    batches = micro_batches(groups, budget)
    placed = [row for batch in batches for row in batch]
    assert sorted(placed) == sorted(members(groups))
    for batch in batches:
        assert len(batch) * max(row.length for row in batch) <= budget


def test_largest_micro_batch_comes_first():
    batches = micro_batches([group(3, 1, 8, 2), group(2, 9, 1)], 22)
    longest = [max(row.length for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_too_long_for_the_budget_says_what_to_change():
    with pytest.raises(
        ConfigError, match="token_budget = 8 is below the longest sequence, 10.*raise"
    ):
        micro_batches([group(3, 1, 7)], 8)


def test_predictors_are_the_states_before_each_target():
    groups = [group(3, 2, 0), group(1, 4)]
    batch = collate(groups, members(groups), "cpu")
    flat = batch.input_ids.reshape(-1)
    # the token after each predictor is its target, for completions that follow a prompt in their
    # row
    assert torch.equal(flat[batch.predictors + 1], batch.targets)
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 6]
    assert batch.advantages.tolist() == [0.0, 1.0, 0.0]
    assert batch.mask.all()


def test_values_find_their_way_back():
    groups = [group(2, 3, 1), group(4, 2, 5)]
    batches = [collate(groups, rows, "cpu") for rows in micro_batches(groups, 14)]
    assert len(batches) > 1
    found = per_completion(groups, batches, [batch.targets.float() for batch in batches])
    expected = [c for g in groups for c in g.completion_ids]
    assert [part.tolist() for part in found] == expected


def test_per_token_values_travel_with_their_tokens():
    groups = [
        group(2, 3, 1, old_logprobs=[torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0])]),
        group(1, 2, old_logprobs=[torch.tensor([-5.0, -6.0])], completion_masks=[[0, 1]]),
    ]
    batch = collate(groups, members(groups), "cpu")
    assert batch.old_logprobs.tolist() == [-1, -2, -3, -4, -5, -6]
    assert batch.mask.tolist() == [True] * 4 + [False, True]
    assert batch.ref_logprobs is None


def test_rewards_become_advantages():
    made = group(1, 1, 1, advantages=None, rewards=[0.0, 1.0])
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert made.advantage_values() == pytest.approx([-half, half])


BAD = {
    "prompt": (lambda: group(0, 1), "prompt_ids is empty"),
    "neither": (lambda: group(1, 1, advantages=None), "either advantages or rewards"),
    "count": (lambda: group(1, 1, 1, advantages=[1.0]), "advantages has 1 entries, expected 2"),
    "tokens": (
        lambda: group(1, 2, old_logprobs=[torch.zeros(3)]),
        r"old_logprobs\[0\] has 3 entries for 2 tokens",
    ),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD.keys())
def test_bad_group_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_some_groups_with_old_logprobs_and_some_without():
    groups = [group(1, 1), group(1, 1, old_logprobs=[torch.zeros(1)])]
    with pytest.raises(InputError, match="given for some groups and not for others"):
        collate(groups, members(groups), "cpu")
