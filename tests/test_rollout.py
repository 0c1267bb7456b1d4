"""Scores to advantages, as a TrainConfig asks for them."""

import math

import pytest

from grpo_fast import TrainConfig
from grpo_fast.metrics import rollout_metrics, winners_alike
from grpo_fast.prompts import Prompt
from grpo_fast.rollout import Completion, ScoredGroup, set_advantages

NAN = math.nan
WEIGHTS = (1.0, 2.0)


def groups_of(*tables) -> list[ScoredGroup]:
    """One group a table of [G, R] rewards; the sums are made as `rewards.score` makes them."""
    groups = []
    for table in tables:
        completions = []
        for values in table:
            terms = [w * v for w, v in zip(WEIGHTS, values, strict=True) if not math.isnan(v)]
            completion = Completion([1], [0.0], "", "stop", sum(terms) if terms else NAN)
            completion.rewards = dict(zip("ab", values, strict=True))
            completions.append(completion)
        groups.append(ScoredGroup(Prompt(text="", token_ids=(1,), columns={}, row=0), completions))
    return groups


def advantages(groups: list[ScoredGroup], **options) -> list[float]:
    config = TrainConfig(
        model="m",
        dataset="d",
        reward=("r:a", "r:b"),
        reward_weights=WEIGHTS,
        group_size=len(groups[0].completions),
        **options,
    )
    set_advantages(groups, config)
    return [c.advantage for group in groups for c in group.completions]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"scale_rewards": "none"}, [-1 / 3, -7 / 3, 0, 8 / 3, 1.25, -0.75, -1.75, 1.25]),
        (
            {"scale_rewards": "none", "baseline": "leave_one_out"},
            [-0.5, -3.5, 0, 4, 5 / 3, -1, -7 / 3, 5 / 3],
        ),
        ({"scale_rewards": "none", "baseline": "pass_at_k"}, [0, 0, 0, 3, 0, 0, 0, 0]),
        ({"scale_rewards": "mean"}, [-1 / 7, -1, 0, 8 / 7, 5 / 7, -3 / 7, -1, 5 / 7]),
        (
            {"scale_rewards": "nonzero"},
            [7 / 5 * x for x in (-1 / 3, -7 / 3, 0, 8 / 3, 1.25, -0.75, -1.75, 1.25)],
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            [-0.844395, -0.597102, 0, 1.441498, 0.689424, 0, -1.378848, 0.689424],
        ),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_the_options_of_a_run_reach_the_advantages(options, expected):
    """Sums 2, 0, -, 5 and 3, 1, 0, 3."""
    groups = groups_of(
        [(1, 0.5), (0, NAN), (NAN, NAN), (2, 1.5)], [(1, 1), (1, NAN), (NAN, 0), (1, 1)]
    )
    assert advantages(groups, **options) == pytest.approx(expected, abs=2e-6)


def test_a_group_is_degenerate_in_the_sense_of_the_aggregation():
    """Sums of 3 each, of rewards that differ."""
    for rule, dead in (("sum_then_normalize", True), ("normalize_then_sum", False)):
        groups = groups_of([(1, 1), (3, 0), (2, 0.5)])
        advantages(groups, multi_objective_aggregation=rule)
        assert groups[0].degenerate == dead


def group_of(*texts: str, losers: int = 1) -> ScoredGroup:
    """Winners of these texts, and losers that say what winners say."""
    (group,) = groups_of([(1, 1)] * len(texts) + [(0, 0)] * losers)
    for completion, text in zip(group.completions, (*texts, *[texts[0]] * losers), strict=True):
        completion.text = text
        completion.advantage = 1.0 if completion.reward else -1.0
    return group


def test_winners_alike_is_the_jaccard_similarity_of_their_word_pairs():
    assert winners_alike(group_of("the sum is 4", "the sum is 4")) == 1
    # Pairs: (^ the) (the sum) | (sum is) (is 4) against (sum is) (is 5): 3 of 5 are shared.
    assert winners_alike(group_of("the sum is 4", "the sum is 5")) == pytest.approx(3 / 5)
    assert winners_alike(group_of("12", "13")) == 0
    assert winners_alike(group_of("", "")) == 1
    assert winners_alike(group_of("a b", "a b", "c d")) == pytest.approx(1 / 3)
    # It does not grow with the number of winners.
    assert winners_alike(group_of("a", "b", "c", "d", *"aaaa")) == 0


def test_fewer_than_two_winners_are_not_alike():
    assert winners_alike(group_of("a b", losers=3)) is None
    assert "groups/winners_alike" not in rollout_metrics([group_of("a b", losers=3)])
    pair = [group_of("a b", losers=3), group_of("a b", "a b")]
    assert rollout_metrics(pair)["groups/winners_alike"] == 1
