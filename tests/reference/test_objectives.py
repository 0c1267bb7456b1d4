"""The oracle's objectives worked out by hand: every loss type, its level, its slope."""

from math import exp, log, sqrt

import pytest
from by_hand import NAN, by_hand, entropy, near

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP_CASES = {
    # old = 0.2; clip to [0.8, 1.3]: (ratio, A, options) -> (loss, slope)
    "gain, clipped above": (1.5, 1, {}, -1.3, 0),
    "loss, not clipped above": (1.5, -1, {}, 1.5, 1.5),
    "gain, not clipped below": (0.5, 1, {}, -0.5, -0.5),
    "loss, clipped below": (0.5, -1, {}, 0.8, 0),
    "inside": (1.1, 2, {}, -2.2, -2.2),
    "delta caps a loss": (3.0, -2, {"delta": 2.0}, 4.0, 0),
    "delta leaves it below": (1.5, -2, {"delta": 2.0}, 3.0, 3.0),
    "dual clip caps a loss": (4.0, -1, {"dual_clip": 3.0}, 3.0, 0),
    "dual clip leaves it below": (2.0, -1, {"dual_clip": 3.0}, 2.0, 2.0),
    "dual clip leaves a gain": (4.0, 1, {"dual_clip": 3.0}, -1.3, 0),
    "no advantage": (4.0, 0, {"dual_clip": 3.0}, 0, 0),
}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo"])
def test_clip_by_hand(loss_type):
    for name, (ratio, advantage, options, loss, slope) in CLIP_CASES.items():
        options = {"loss_type": loss_type, "epsilon": 0.2, "epsilon_high": 0.3} | options
        rows, slopes = by_hand([0.2 * ratio], [advantage], old=[0.2], **options)
        assert float(rows.ratio) == near(ratio), name
        assert float(rows.loss) == near(loss), name
        assert slopes == near([slope]), name


def test_levels_of_the_ratio_by_hand():
    """Ratios 1.2 and 0.8 of one sequence: together sqrt(1.2 x 0.8)."""
    tokens = {"p": [0.6, 0.4], "advantages": [1, 3], "old": [0.5, 0.5], "loss_type": "grpo"}
    whole = sqrt(1.2 * 0.8)
    rows, slopes = by_hand(**tokens, importance_sampling_level="token")
    assert rows.ratio.tolist() == near([1.2, 0.8])
    assert rows.loss.tolist() == near([-1.2, -2.4])
    assert slopes == near([-1.2, -2.4])
    rows, slopes = by_hand(**tokens, importance_sampling_level="sequence")
    assert rows.ratio.tolist() == near([whole, whole])
    assert rows.loss.tolist() == near([-whole, -3 * whole])
    # d(-(1 + 3) r) / d(log p of either) = -4 r / 2
    assert slopes == near([-2 * whole, -2 * whole])
    rows, slopes = by_hand(**tokens, importance_sampling_level="sequence_token")
    assert rows.loss.tolist() == near([-whole, -3 * whole])
    assert slopes == near([-whole, -3 * whole])


def test_levels_count_live_tokens_of_their_own_sequence_by_hand():
    rows, _ = by_hand(
        [0.6, 0.9, 0.4, 0.3],
        [1, 1, 1, 1],
        old=[0.5, NAN, 0.5, 0.2],
        mask=[True, False, True, True],
        lengths=[3, 0, 1],
        loss_type="gspo",
        epsilon=0.9,
        epsilon_high=0.9,
    )
    whole = sqrt(1.2 * 0.8)
    assert rows.ratio.tolist() == near([whole, 0, whole, 1.5])
    assert rows.loss.tolist() == near([-whole, 0, -whole, -1.5])


def test_default_levels():
    for loss_type, ratios in {"grpo": [1.2, 0.8], "gspo": [sqrt(0.96)] * 2}.items():
        rows, _ = by_hand([0.6, 0.4], [1, 1], old=[0.5, 0.5], loss_type=loss_type)
        assert rows.ratio.tolist() == near(ratios)


def test_on_policy_the_ratio_is_one_and_has_a_slope():
    for level in ("token", "sequence", "sequence_token"):
        rows, slopes = by_hand([0.6, 0.4], [2, 2], importance_sampling_level=level)
        assert rows.ratio.tolist() == [1, 1]
        assert slopes == near([-2, -2])


def test_cispo_by_hand():
    p, options = [0.6, 0.1], {"old": [0.2, 0.2], "loss_type": "cispo"}
    # ratios 3 and 0.5; upper: min(r, 2); both: within [0.8, 1.3]
    rows, slopes = by_hand(p, [1, -2], **options, epsilon_high=2.0)
    assert rows.loss.tolist() == near([-2 * log(0.6), 0.5 * 2 * log(0.1)])
    assert slopes == near([-2, 1])
    bounds = {"epsilon": 0.2, "epsilon_high": 0.3, "cispo_bounds": "both"}
    rows, slopes = by_hand(p, [1, -2], **options, **bounds)
    assert rows.loss.tolist() == near([-1.3 * log(0.6), 0.8 * 2 * log(0.1)])
    assert slopes == near([-1.3, 1.6])
    # sequence level: sqrt(3 x 0.5) for both
    options["importance_sampling_level"] = "sequence"
    rows, slopes = by_hand(p, [1, -2], **options, epsilon_high=2.0)
    assert slopes == near([-sqrt(1.5), 2 * sqrt(1.5)])


def test_sapo_by_hand():
    def gate(x):
        return 1 / (1 + exp(-x))

    options = {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 1.1}
    rows, slopes = by_hand([0.6, 0.6, 0.4], [2, -3, 1], old=[0.4, 0.4, 0.4], **options)
    # ratios 1.5, 1.5, 1; d sigmoid(tau (r - 1)) / d log p = tau r gate (1 - gate)
    up, down = gate(2.0 * 0.5), gate(1.1 * 0.5)
    assert rows.loss.tolist() == near([-4 / 2.0 * up * 2, 4 / 1.1 * down * 3, -4 / 2.0 * 0.5])
    assert slopes == near([-4 * 2 * 1.5 * up * (1 - up), 4 * 3 * 1.5 * down * (1 - down), -1])


def test_gmpo_by_hand():
    """Log-ratios 1 and -1, clipped to [-0.2, 0.4] where A gains."""
    options = {"loss_type": "gmpo", "epsilon": 0.2, "epsilon_high": 0.4}
    tokens = {"p": [0.5, 0.3], "old": [0.5 * exp(-1), 0.3 * exp(1)]}
    # A > 0: (0.4 - 1) / 2 = -0.3; the sum of both losses, -2 R, has slope -2 R / 2 in the second
    rows, slopes = by_hand(**tokens, advantages=[1, 1], **options)
    assert rows.loss.tolist() == near([-exp(-0.3)] * 2)
    assert slopes == near([0, -exp(-0.3)])
    # A < 0: (1 - 0.2) / 2 = 0.4
    rows, slopes = by_hand(**tokens, advantages=[-1, -1], **options)
    assert rows.loss.tolist() == near([exp(0.4)] * 2)
    assert slopes == near([exp(0.4), 0])


VESPO = {"p": [0.6, 0.4], "old": [0.4, 0.5], "loss_type": "vespo"}


def test_vespo_by_hand():
    """Ratios 1.5 and 0.8: w = 1.2."""
    for advantage, phi in (
        (1, exp(3 + 2 * log(1.2) - 3 * 1.2)),
        (-1, exp(2 + 3 * log(1.2) - 2 * 1.2)),
    ):
        rows, slopes = by_hand(advantages=[advantage] * 2, **VESPO)
        assert rows.loss.tolist() == near(
            [-phi * advantage * log(0.6), -phi * advantage * log(0.4)]
        )
        assert slopes == near([-phi * advantage] * 2)
    options = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5}
    rows, slopes = by_hand(advantages=[1, 1], **VESPO, **options)
    assert slopes == near([-exp(0.5 + log(1.2) - 0.5 * 1.2)] * 2)


@pytest.mark.parametrize(
    "correction, w",
    [
        # old / sampler = 2 and 0.5, at most 1.6
        ("token_truncate", 1.2 * 1.6 * 0.5),
        # a weight of 0 is taken as 1e-8
        ("token_mask", max(1.2 * 1e-8 * 0.5, 1e-8)),
        # 2 x 0.5, once for the sequence
        ("sequence_truncate", 1.2 * 1.0),
        ("geometric_mask", 1.2 * 1.0),
    ],
)
def test_vespo_has_the_sampler_s_correction_inside_by_hand(correction, w):
    _, slopes = by_hand(
        advantages=[1, 1],
        **VESPO,
        sampler=[0.2, 1.0],
        importance_sampling_correction=correction,
        importance_sampling_max=1.6,
    )
    assert slopes == near([-exp(3 + 2 * log(w) - 3 * w)] * 2)


def test_vespo_counts_a_sequence_s_weight_once_by_hand():
    # old / sampler = 2 and 1.5: 3 for the sequence, sqrt(3) as its mean
    for correction, weight in (("sequence_mask", 3.0), ("geometric_truncate", sqrt(3))):
        _, slopes = by_hand(
            advantages=[1, 1],
            **VESPO,
            sampler=[0.2, 1 / 3],
            importance_sampling_correction=correction,
            importance_sampling_max=4.0,
        )
        w = 1.2 * weight
        assert slopes == near([-exp(3 + 2 * log(w) - 3 * w)] * 2)


def test_dppo_tv_by_hand():
    """p may rise by 0.2 and fall by 0.1; ratios count to 1.5."""
    rows, slopes = by_hand(
        [0.5, 0.7, 0.7, 0.2, 0.35],
        [1, 1, -1, -1, -2],
        old=[0.4] * 5,
        loss_type="dppo_tv",
        epsilon=0.1,
        epsilon_high=0.2,
        delta=1.5,
    )
    # up by 0.1; up by 0.3; up, where A wants down; down by 0.2; down by 0.05
    assert rows.loss.tolist() == near([-1.25 * log(0.5), 0, 1.5 * log(0.7), 0, 1.75 * log(0.35)])
    assert slopes == near([-1.25, 0, 1.5, 0, 1.75])


def test_dppo_kl_by_hand():
    """From 0.5 to 0.25: 0.5 log 2 + 0.5 log(0.5 / 0.75) = log(4 / 3) / 2 = 0.1438."""
    tokens = {"p": [0.25, 0.25, 0.75, 0.75], "old": [0.5] * 4, "loss_type": "dppo_kl"}
    away, back = [-1, 1], [-1, 1]
    for bound, valid in ((0.14, 0), (0.15, 1)):
        options = {"epsilon": bound, "epsilon_high": bound}
        _, slopes = by_hand(**tokens, advantages=[*away, *back], **options)
        assert slopes == near([0.5 * valid, -0.5, 1.5, -1.5 * valid])


def test_dro_by_hand():
    d = log(1.2)
    rows, slopes = by_hand([0.6, 0.6], [1, -2], old=[0.5, 0.5], loss_type="dro", dro_beta=0.5)
    assert rows.loss.tolist() == near([-log(0.6) + 0.25 * d * d, 2 * log(0.6) + 0.25 * d * d])
    assert slopes == near([-1 + 0.5 * d, 2 + 0.5 * d])


@pytest.mark.parametrize("loss_type", ["gpg", "reinforce"])
def test_reinforce_by_hand(loss_type):
    rows, slopes = by_hand([0.6, 0.1], [1, -2], old=[0.2, 0.5], loss_type=loss_type)
    assert rows.loss.tolist() == near([-log(0.6), 2 * log(0.1)])
    assert slopes == near([-1, 2])


def test_own_objective_by_hand():
    """Called once with what the docstring of Tokens promises; corrections and KL stay outside."""

    def objective(tokens, config):
        assert config.loss_type == "vespo"
        assert tokens.old_logprobs.exp().tolist() == near([0.5, 0.5, 1, 0.2])
        assert tokens.mask.tolist() == [True, True, False, True]
        assert tokens.advantages.tolist() == [1, 2, 0, 4]
        assert tokens.sequence_sum(tokens.advantages).tolist() == [3, 3, 3, 4]
        mean = tokens.sequence_mean(tokens.logprobs)
        return -tokens.ratio * tokens.advantages + tokens.entropy + mean * mean / 2

    rows, slopes = by_hand(
        [0.6, 0.4, 0.5, 0.3],
        [1, 2, 7, 4],
        old=[0.5, 0.5, 0.5, 0.2],
        ref=[0.6, 0.4, 0.5, 0.3],
        sampler=[0.25, 0.5, 0.5, 0.2],
        mask=[True, True, False, True],
        lengths=[3, 1],
        objective=objective,
        loss_type="vespo",
        importance_sampling_correction="token_truncate",
        beta=1.0,
        kl_estimator="k1",
    )
    mean, last = (log(0.6) + log(0.4)) / 2, log(0.3)
    terms = [-1.2 + entropy(0.6) + mean**2 / 2, -1.6 + entropy(0.4) + mean**2 / 2]
    terms.append(-6 + entropy(0.3) + last**2 / 2)
    assert rows.loss.tolist() == near([2 * terms[0], terms[1], 0, terms[2]])

    def rise(p):
        return -p * (log(p) + entropy(p)) / (1 - p)

    # weights 2 and 1; the mean's slope is (2 + 1) mean / 2 for either token; KL adds 1
    expected = [2 * (-1.2 + rise(0.6)) + 1.5 * mean, -1.6 + rise(0.4) + 1.5 * mean]
    expected += [0, -6 + rise(0.3) + last]
    assert slopes == near([x + live for x, live in zip(expected, (1, 1, 0, 1), strict=True)])
    # of the entropy no more is in the mass than of a bonus
    mass = [-2 * 1.2 + 1.5 * mean + 1, -1.6 + 1.5 * mean + 1, 0, -6 + last + 1]
    others = [sqrt(2) * x for x in (0.4, 0.6, 0.5, 0.7)]
    assert rows.mass.tolist() == near([abs(m) * q for m, q in zip(mass, others, strict=True)])
