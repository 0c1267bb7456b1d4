"""What stands around the oracle's objective, by hand: KL, corrections, entropy, gradient mass."""

from math import exp, log, sqrt

import pytest
import torch
from by_hand import INF, NAN, by_hand, entropy, near, vector

from grpo_fast import LossConfig, reference
from grpo_fast.reference_loss import kl_divergence

pytestmark = pytest.mark.usefixtures("one_thread")

D = log(2)
KL_CASES = {
    # p = 0.5 and 0.25 against 0.25 and 0.5: d = log 2 and -log 2 -> values, slopes
    "k1": ([D, -D], [1, 1]),
    "k2": ([D * D / 2, D * D / 2], [D, -D]),
    "k3": ([0.5 - 1 + D, 2 - 1 - D], [1 - 0.5, 1 - 2]),
    "abs": ([D, D], [1, -1]),
    "k1+": ([D, -D], [D, -D]),
    "k3+": ([0.5 - 1 + D, 2 - 1 - D], [D, -D]),
    "abs+": ([D, D], [D, -D]),
}


@pytest.mark.parametrize("estimator", KL_CASES)
def test_kl_by_hand(estimator):
    values, slopes = KL_CASES[estimator]
    tokens = {"p": [0.5, 0.25], "advantages": [0, 0], "ref": [0.25, 0.5]}
    rows, found = by_hand(**tokens, beta=0.3, kl_estimator=estimator)
    assert rows.kl.tolist() == near(values)
    assert rows.loss.tolist() == near([0.3 * value for value in values])
    assert found == near([0.3 * slope for slope in slopes])
    # without beta it is only measured, and spoils nothing
    rows, found = by_hand(**tokens | {"ref": [0.25, NAN]}, kl_estimator=estimator)
    assert rows.kl.tolist() == pytest.approx([values[0], NAN], nan_ok=True)
    assert rows.loss.tolist() == found == [0, 0]
    # times the ratios 2 and 0.5: value r k, slope r (k' + k)
    options = {"beta": 0.3, "use_bias_correction_kl": True, "old": [0.25, 0.5]}
    rows, found = by_hand(**tokens, **options, kl_estimator=estimator)
    assert rows.kl.tolist() == near([2 * values[0], 0.5 * values[1]])
    both = [slope + value for slope, value in zip(slopes, values, strict=True)]
    assert found == near([0.3 * 2 * both[0], 0.3 * 0.5 * both[1]])


def test_bias_corrected_kl_has_the_ratio_of_the_level_by_hand():
    # token ratios 2 and 0.5: 1 for the sequence; k1 sums to log 2 + log 2
    tokens = {"p": [0.5, 0.25], "old": [0.25, 0.5], "ref": [0.25, 0.125], "advantages": [0, 0]}
    options = {"beta": 1.0, "kl_estimator": "k1", "use_bias_correction_kl": True}
    rows, slopes = by_hand(**tokens, **options, loss_type="gspo")
    assert rows.loss.tolist() == near([D, D])
    # d(r (k_1 + k_2)) = r (1 + (k_1 + k_2) / 2)
    assert slopes == near([1 + D, 1 + D])


def test_far_off_tokens_are_taken_at_the_limit_and_still_pulled_back():
    # p / old = e^2, p / ref = e^-3, taken as e and e^-1
    rows, slopes = by_hand(
        [0.1], [-1], old=[0.1 * exp(-2)], ref=[0.1 * exp(3) / 3], beta=1.0, log_ratio_clamp=1.0
    )
    k3 = exp(1) - 1 - 1
    assert float(rows.ratio) == near(exp(1))
    assert float(rows.kl) == near(k3)
    assert slopes == near([exp(1) + 1 - exp(1)])
    d = vector([100.0, -100.0, NAN, INF, -INF])
    zero = torch.zeros(5, dtype=torch.float64)
    kl = kl_divergence(d, zero, estimator="k1", limit=20.0)
    assert kl.nan_to_num(nan=7).tolist() == [20, -20, 7, 7, 7]


CORRECTIONS = {
    # old / sampler = 4 and 0.25, then 2 and 1.5; bounds [0.5, 2.5]
    "token_truncate": [2.5, 0.5, 2, 1.5],
    "token_mask": [0, 0, 2, 1.5],
    "sequence_truncate": [1, 1, 2.5, 2.5],
    "sequence_mask": [1, 1, 0, 0],
    "geometric_truncate": [1, 1, sqrt(3), sqrt(3)],
    "geometric_mask": [1, 1, sqrt(3), sqrt(3)],
}


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_importance_sampling_correction_by_hand(correction):
    tokens = {"p": [0.5] * 4, "advantages": [1, 1, 1, 1], "lengths": [2, 2], "ref": [0.5] * 4}
    tokens |= {"old": [0.4, 0.2, 0.4, 0.3], "sampler": [0.1, 0.8, 0.2, 0.2]}
    options = {"loss_type": "reinforce", "beta": 1.0, "kl_estimator": "k1"}
    options |= {"importance_sampling_correction": correction}
    bounds = {"importance_sampling_min": 0.5, "importance_sampling_max": 2.5}
    weights = CORRECTIONS[correction]
    rows, slopes = by_hand(**tokens, **options, **bounds)
    # the KL, whose slope is 1, is not weighted
    assert slopes == near([1 - w for w in weights])
    assert rows.loss.tolist() == near([w * D for w in weights])
    # without bounds both rules leave the weight alone
    free = {"token": [4, 0.25, 2, 1.5], "sequence": [1, 1, 3, 3]}
    free |= {"geometric": [1, 1, sqrt(3), sqrt(3)]}
    _, slopes = by_hand(**tokens, **options, importance_sampling_max=None)
    assert slopes == near([1 - w for w in free[correction.partition("_")[0]]])


def test_a_token_the_sampler_could_not_score_weighs_one_by_hand():
    tokens = {"p": [0.5] * 2, "advantages": [1, 1], "old": [0.4, 0.2], "sampler": [NAN, 0.1]}
    for correction, weights in {
        "token_truncate": [1, 2],
        "sequence_truncate": [2, 2],
        "geometric_truncate": [sqrt(2), sqrt(2)],
    }.items():
        options = {"loss_type": "reinforce", "importance_sampling_correction": correction}
        _, slopes = by_hand(**tokens, **options)
        assert slopes == near([-w for w in weights])


def test_correction_on_policy_is_against_the_policy_itself_by_hand():
    options = {"loss_type": "reinforce", "importance_sampling_correction": "token_truncate"}
    _, slopes = by_hand([0.4, 0.2], [1, 1], sampler=[0.2, 0.4], **options)
    assert slopes == near([-2, -0.5])


def test_off_policy_sequences_with_negative_advantage_are_left_out_by_hand():
    """Mean of log(behaviour / p): log 2 and log 1.1, and the same with A > 0."""
    tokens = {"p": [0.2, 0.2, 0.5, 0.5, 0.2], "lengths": [2, 2, 1], "advantages": [-1] * 4 + [1]}
    behaviour = [0.8, 0.2, 0.55, 0.55, 0.4]
    options = {"loss_type": "reinforce", "off_policy_mask_threshold": 0.5}
    _, slopes = by_hand(**tokens, old=behaviour, **options)
    assert slopes == near([0, 0, 1, 1, -1])
    # the sampler, where there is one, is the behaviour
    _, slopes = by_hand(**tokens, old=tokens["p"], sampler=behaviour, **options)
    assert slopes == near([0, 0, 1, 1, -1])
    _, slopes = by_hand(**tokens, old=behaviour, sampler=tokens["p"], **options)
    assert slopes == near([1, 1, 1, 1, -1])
    # a token it could not score counts as one without a gap: log 4 becomes 0
    behaviour = [NAN, *behaviour[1:]]
    _, slopes = by_hand(**tokens, old=tokens["p"], sampler=behaviour, **options)
    assert slopes == near([1, 1, 1, 1, -1])


def test_top_entropy_by_hand():
    """Of five tokens, one masked, the two nearest to 0.5 teach; the KL is of all."""
    tokens = {"p": [0.9, 0.6, 0.5, 0.3, 0.8], "mask": [True, True, False, True, True]}
    options = {"loss_type": "reinforce", "top_entropy_quantile": 0.5, "beta": 2.0}
    rows, slopes = by_hand(
        **tokens, advantages=[1] * 5, ref=[0.1] * 5, kl_estimator="k1", **options
    )
    assert slopes == near([2, 2 - 1, 0, 2 - 1, 2])
    assert rows.entropy.tolist() == near(
        [entropy(p) for p in (0.9, 0.6)] + [0] + [entropy(p) for p in (0.3, 0.8)]
    )
    # all of them, and the one at the top
    for share, teach in ((1.0, [1, 1, 0, 1, 1]), (0.0, [0, 1, 0, 0, 0])):
        options = {"loss_type": "reinforce", "top_entropy_quantile": share}
        _, slopes = by_hand(**tokens, advantages=[1] * 5, **options)
        assert slopes == near([-x for x in teach])


@pytest.mark.parametrize(
    "options, weights",
    [
        ({}, [0.3 / 4] * 2 + [0] + [0.3 / 4] * 2),
        ({"entropy_denominator": 10}, [0.03, 0.03, 0, 0.03, 0.03]),
        ({"top_entropy_quantile": 0.5}, [0, 0.15, 0, 0.15, 0]),
        ({"top_entropy_quantile": 0.5, "entropy_denominator": 10}, [0, 0.03, 0, 0.03, 0]),
    ],
)
def test_entropy_bonus_by_hand(options, weights):
    p = [0.9, 0.6, 0.5, 0.3, 0.8]
    rows, slopes = by_hand(
        p,
        [0] * 5,
        mask=[True, True, False, True, True],
        weights=[0.1, 0.2, 0.0, 0.3, 0.4],
        loss_type="reinforce",
        entropy_coef=0.3,
        **options,
    )
    assert rows.loss.tolist() == near([-w * entropy(q) for w, q in zip(weights, p, strict=True)])
    # dH / d(logit) = -p (log p + H), of which log p has (1 - p)
    expected = [w * q * (log(q) + entropy(q)) / (1 - q) for w, q in zip(weights, p, strict=True)]
    assert slopes == near(expected)
    assert rows.mass.tolist() == near([0] * 5)


def test_top_entropy_acts_on_given_entropy_weights_by_hand():
    rows = reference.policy_rows(
        torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 9.0]]).double(),
        torch.zeros(3, dtype=torch.long),
        torch.zeros(3, dtype=torch.float64),
        torch.ones(3, dtype=torch.float64),
        mask=torch.tensor([True, True, True]),
        cu_seqlens=None,
        old_logp=None,
        ref_logp=None,
        sampler_logp=None,
        entropy_weights=vector([0.5, 0.25, 0.25]),
        temperature=1.0,
        config=LossConfig(top_entropy_quantile=0.1),
    )
    assert rows.loss.tolist() == near([-0.5 * log(2), 0, 0])


def test_gradient_mass_by_hand():
    """|slope| / T times the norm of (1 - p, other probabilities)."""
    logits = vector([[0.5, 0.3, 0.2]] * 3).log()
    rows = reference.policy_loss(
        2 * logits,
        torch.tensor([0, 2, 1]),
        vector([3.0, -1.0, 5.0]),
        vector([0.5, 1.0, 0.0]),
        policy_weights=vector([1.0, 0.25, 1.0]),
        entropy_weights=vector([1.0, 1.0, 0.0]),
        temperature=2.0,
        objective="reinforce",
    )
    expected = [
        0.5 * 3 / 2 * sqrt(0.5**2 + 0.3**2 + 0.2**2),
        0.25 * 1 / 2 * sqrt(0.8**2 + 0.5**2 + 0.3**2),
        0,
    ]
    assert rows.mass.tolist() == near(expected)
    squares = reference.token_logprob(logits, torch.tensor([0, 2, 1])).other_squares
    assert squares.tolist() == near([0.3**2 + 0.2**2, 0.5**2 + 0.3**2, 0.5**2 + 0.2**2])


def test_gradient_mass_reaches_through_the_sequence_by_hand():
    # two tokens of weight 1 share a ratio of 1: each has slope -(1 + 3) / 2
    rows, _ = by_hand([0.6, 0.4], [1, 3], loss_type="gspo")
    assert rows.mass.tolist() == near([2 * sqrt(2) * 0.4, 2 * sqrt(2) * 0.6])


def test_temperature_of_each_token_by_hand():
    tokens = {"p": [0.6, 0.4], "advantages": [1, 1], "loss_type": "reinforce"}
    rows, slopes = by_hand(**tokens, temperature=[0.5, 2.0])
    assert rows.logp.tolist() == near([log(0.6), log(0.4)])
    assert slopes == near([-1, -1])
    assert rows.mass.tolist() == near([sqrt(2) * 0.4 / 0.5, sqrt(2) * 0.6 / 2])
