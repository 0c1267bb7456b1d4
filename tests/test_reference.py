"""The oracle itself: gradcheck in float64, and every variant worked out by hand.

Tokens by hand have a vocabulary of two, so that a log-prob is set by its probability and the slope
of the loss in it can be read off the gradient of the logits.
"""

import math

import pytest
import torch

from grpo_fast import LossConfig, reference
from grpo_fast.reference_loss import kl_divergence
from grpo_fast.testing import random_rows, random_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = math.nan, math.inf
log, exp, sqrt = math.log, math.exp, math.sqrt


def double(rows: dict) -> dict:
    return {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}


def vector(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(probabilities) -> torch.Tensor | None:
    return None if probabilities is None else vector(probabilities).log()


def by_hand(p, advantages, *, old=None, ref=None, sampler=None, lengths=None, **options):
    """(rows, d(sum(loss)) / d(log p)) of tokens with probabilities p, all of weight 1.

    `options` are those of a LossConfig, or mask, weights and temperature of the call.
    """
    p = vector(p)
    scale = vector(options.pop("temperature", 1.0))
    logits = (torch.stack([p.log(), (1 - p).log()], 1) * scale.reshape(-1, 1)).requires_grad_()
    rows = reference.policy_rows(
        logits,
        torch.zeros(len(p), dtype=torch.long),
        vector(advantages),
        vector(options.pop("weights", [1.0] * len(p))),
        mask=torch.tensor(options.pop("mask", [True] * len(p))),
        cu_seqlens=torch.tensor([0, *(lengths or [len(p)])]).cumsum(0),
        old_logp=logs(old),
        ref_logp=logs(ref),
        sampler_logp=logs(sampler),
        entropy_denominator=options.pop("entropy_denominator", None),
        temperature=scale if scale.dim() else float(scale),
        config=LossConfig(**options),
    )
    (gradient,) = torch.autograd.grad(rows.loss.sum(), logits)
    rows = reference.PolicyRows(*(None if x is None else x.detach() for x in rows))
    # The logits are T log p.
    return rows, (gradient[:, 0] / (1 - p) * scale).tolist()


def near(expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


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


def entropy(p: float) -> float:
    return -p * log(p) - (1 - p) * log(1 - p)


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


def test_a_token_that_cannot_be_drawn_by_hand():
    logits = vector([[log(0.25), -INF, log(0.75)]]).requires_grad_()
    rows = reference.token_logprob(logits, torch.tensor([0]))
    assert rows.logp.tolist() == near([log(0.25)])
    assert rows.entropy.tolist() == near([entropy(0.25)])
    (gradient,) = torch.autograd.grad(rows.logp + rows.entropy, logits)
    slopes = [q * (log(q) + entropy(q)) for q in (0.25, 0.75)]
    assert gradient.tolist() == [near([0.75 - slopes[0], 0, -0.75 - slopes[1]])]


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


MASK = [1, 1, 0, 1, 0, 0, 0, 0, 1]
WEIGHTS = {
    # lengths 3, 2, 3, 1 with 2, 1, 0, 1 live; groups 5 5 8 9
    "sequence_mean": [1 / 8, 1 / 8, 0, 1 / 4, 0, 0, 0, 0, 1 / 4],
    "token_mean": [1 / 4, 1 / 4, 0, 1 / 4, 0, 0, 0, 0, 1 / 4],
    "constant": [1 / 40, 1 / 40, 0, 1 / 40, 0, 0, 0, 0, 1 / 40],
    "sequence_sum": [1 / 4, 1 / 4, 0, 1 / 4, 0, 0, 0, 0, 1 / 4],
    # three groups with 3, 0 and 1 live tokens
    "prompt_mean": [1 / 9, 1 / 9, 0, 1 / 9, 0, 0, 0, 0, 1 / 3],
}
NORMALISERS = {
    "sequence_mean": 4,
    "token_mean": 4,
    "constant": 40,
    "sequence_sum": 4,
    "prompt_mean": 3,
}


@pytest.mark.parametrize("aggregation", WEIGHTS)
def test_token_weights_by_hand(aggregation):
    mask = torch.tensor(MASK, dtype=torch.bool)
    cu, groups = torch.tensor([0, 3, 5, 8, 9]), torch.tensor([5, 5, 8, 9])
    config = LossConfig(aggregation=aggregation, max_completion_length=10)
    found = reference.token_weights(mask, cu, config, group_ids=groups)
    assert found.tolist() == near(WEIGHTS[aggregation])
    found = reference.token_weights(mask, cu, config, 2.0, groups)
    assert found.tolist() == near([w * NORMALISERS[aggregation] / 2 for w in WEIGHTS[aggregation]])


def test_default_aggregations():
    mask = torch.tensor(MASK, dtype=torch.bool)
    cu = torch.tensor([0, 3, 5, 8, 9])
    for loss_type, aggregation in {
        "grpo": "sequence_mean",
        "dapo": "token_mean",
        "dr_grpo": "constant",
        "luspo": "sequence_sum",
    }.items():
        config = LossConfig(loss_type=loss_type, max_completion_length=10)
        assert reference.token_weights(mask, cu, config).tolist() == near(WEIGHTS[aggregation])


def test_nothing_live_weighs_nothing():
    for cu in ([0], [0, 0], [0, 2]):
        mask = torch.zeros(cu[-1], dtype=torch.bool)
        for aggregation in WEIGHTS:
            config = LossConfig(aggregation=aggregation, max_completion_length=10)
            groups = torch.zeros(len(cu) - 1, dtype=torch.long)
            found = reference.token_weights(mask, torch.tensor(cu), config, group_ids=groups)
            assert found.tolist() == [0] * cu[-1]


def test_linear_grpo_loss_by_hand():
    """One token of two: logits 2 tanh(3 (h w + b) / 2)."""
    hidden, weight = vector([[0.5]]), vector([[0.2], [-0.4]])
    bias = vector([0.1, 0.3])
    rows = reference.linear_grpo_loss(
        hidden,
        weight,
        torch.tensor([1]),
        vector([1.0]),
        mask=torch.tensor([True]),
        bias=bias,
        softcap=2.0,
        logit_scale=3.0,
        config=LossConfig(loss_type="reinforce"),
    )
    first, second = (2 * math.tanh(3 * x / 2) for x in (0.5 * 0.2 + 0.1, 0.5 * -0.4 + 0.3))
    assert float(rows.logp) == near(second - log(exp(first) + exp(second)))
    assert float(rows.loss) == near(-float(rows.logp))


# Each of them acts on some tokens of random_sequences and not on others.
BATCH_OPTIONS = {
    "importance_sampling_correction": "token_truncate",
    "off_policy_mask_threshold": 0.0,
    "top_entropy_quantile": 0.7,
    "entropy_coef": 0.05,
}
LOSS_TYPES = {
    "grpo": {"delta": 1.5},
    "bnpo": {"dual_clip": 1.3},
    "dapo": {},
    "dr_grpo": {},
    "cispo": {"epsilon_high": 1.1},
    "sapo": {},
    "gspo": {},
    "luspo": {},
    "gmpo": {},
    "vespo": {},
    "dppo_tv": {"epsilon": 0.05},
    "dppo_kl": {"epsilon": 0.01},
    "dro": {"dro_beta": 0.5},
    "gpg": {},
    "reinforce": {},
}


def config_of(loss_type: str, **options) -> LossConfig:
    return LossConfig(
        loss_type=loss_type, **{"max_completion_length": 9} | LOSS_TYPES[loss_type] | options
    )


def batch_loss(batch: dict, config: LossConfig, logits: torch.Tensor, **options):
    """reference.grpo_loss of a padded batch of `random_sequences`."""
    length = batch["targets"].shape[1]

    def flat(name: str) -> torch.Tensor:
        return batch[name].reshape(-1)

    return reference.grpo_loss(
        logits,
        flat("targets"),
        batch["advantages"].repeat_interleave(length),
        mask=flat("mask"),
        cu_seqlens=torch.arange(len(batch["targets"]) + 1) * length,
        old_logp=flat("old_logprobs"),
        ref_logp=flat("ref_logprobs"),
        sampler_logp=flat("sampler_logprobs"),
        group_ids=batch["group_ids"],
        config=config,
        **options,
    )


def logits_of(batch: dict) -> torch.Tensor:
    return (batch["hidden"] @ batch["weight"].T).flatten(0, 1)


LEVELLED = ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "sapo")
# The others hold a factor constant; they are above, by hand.
SMOOTH = [(loss_type, level) for loss_type in LEVELLED for level in ("token", "sequence")]
SMOOTH += [(loss_type, None) for loss_type in ("gmpo", "dro", "gpg", "reinforce")]


@pytest.mark.parametrize("loss_type, level", SMOOTH)
def test_gradcheck(loss_type, level):
    batch = double(random_sequences(4, 4, 3, 6, seed=1))
    for beta, kl, corrected in ((0.0, "k3", False), (0.3, "k3", True), (0.3, "abs", False)):
        config = config_of(
            loss_type,
            importance_sampling_level=level,
            beta=beta,
            kl_estimator=kl,
            use_bias_correction_kl=corrected,
            **BATCH_OPTIONS,
        )
        logits = logits_of(batch).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, config=config: batch_loss(batch, config, x, temperature=0.8).loss,
            (logits,),
            fast_mode=True,
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprob_gradcheck(temperature):
    rows = double(random_rows(4, 7))
    logits = rows["logits"].requires_grad_()

    def outputs(x):
        return tuple(reference.token_logprob(x, rows["targets"], temperature=temperature))

    assert torch.autograd.gradcheck(outputs, (logits,), eps=1e-6, atol=1e-7)


TOKEN_OBJECTIVES = {
    "clip": {"low": 0.8, "high": 1.2, "cap": 1.5, "dual_clip": 1.4},
    "cispo": {"high": 1.1},
    "sapo": {"low": 1.05, "high": 1.0},
    "dppo_tv": {"low": 0.05, "high": 0.05, "cap": 20.0},
    "dppo_kl": {"low": 0.01, "high": 0.01, "cap": 20.0},
    "dro": {"low": 0.5},
    "reinforce": {},
}


@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES)
def test_policy_loss_is_policy_rows_with_its_numbers(objective):
    batch = double(random_sequences(4, 4, 3, 6))
    logits = logits_of(batch)
    types = {"clip": "grpo", "reinforce": "gpg"}
    options = {
        "clip": {"delta": 1.5, "dual_clip": 1.4},
        "dppo_tv": {"epsilon": 0.05},
        "dppo_kl": {"epsilon": 0.01},
    }
    config = config_of(
        types.get(objective, objective),
        aggregation="token_mean",
        beta=0.3,
        kl_estimator="k2",
        use_bias_correction_kl=True,
        entropy_coef=0.1,
        **options.get(objective, {"delta": None}),
    )
    expected = batch_loss(batch, config, logits, temperature=0.8)
    live = batch["mask"].reshape(-1)
    found = reference.policy_loss(
        logits,
        batch["targets"].reshape(-1),
        batch["advantages"].repeat_interleave(4),
        live.double() / live.sum(),
        old_logp=batch["old_logprobs"].reshape(-1),
        ref_logp=batch["ref_logprobs"].reshape(-1),
        policy_weights=torch.ones(16, dtype=torch.float64),
        entropy_weights=0.1 * live.double() / live.sum(),
        temperature=0.8,
        objective=objective,
        beta=0.3,
        kl_estimator="k2",
        bias_corrected_kl=True,
        **TOKEN_OBJECTIVES[objective],
    )
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15), name


def results_of(batch: dict, config: LossConfig, **options) -> list[torch.Tensor]:
    """Every field of the rows, and the gradient of the logits."""
    logits = logits_of(batch).requires_grad_()
    rows = batch_loss(batch, config, logits, **options)
    return [*rows, *torch.autograd.grad(rows.loss.sum(), logits)]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_lies_under_the_mask_changes_no_bit(loss_type):
    batch = double(random_sequences(4, 5, 3, 6))
    config = config_of(loss_type, beta=0.2, **BATCH_OPTIONS)
    hole = ~batch["mask"]
    seen = []
    for garbage in (0.0, NAN, INF, -INF):
        dirty = {name: value.clone() for name, value in batch.items()}
        for name in ("hidden", "old_logprobs", "ref_logprobs", "sampler_logprobs"):
            dirty[name][hole] = garbage
        dirty["targets"][hole] = 10**6 if garbage else -100
        temperature = torch.full(hole.shape, 0.8, dtype=torch.float64)
        temperature[hole] = garbage
        seen.append(results_of(dirty, config, temperature=temperature.reshape(-1)))
    for value in seen[0]:
        assert not value[hole.reshape(-1)].any()
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nan_in_a_live_row_surfaces(loss_type):
    batch = double(random_sequences(4, 5, 3, 6))
    row = tuple(batch["mask"].nonzero()[0].tolist())
    batch["hidden"][row] = NAN
    *_, mass, gradient = results_of(batch, config_of(loss_type, beta=0.2, **BATCH_OPTIONS))
    flat = row[0] * 5 + row[1]
    assert mass[flat].isnan()
    assert gradient[flat].isnan().all()


@pytest.mark.parametrize("aggregation", WEIGHTS)
def test_micro_batches_add_up(aggregation):
    batch = double(random_sequences(6, 4, 3, 6))
    tokens, groups = int(batch["mask"].sum()), len(batch["group_ids"].unique())
    normaliser = {"token_mean": tokens, "constant": 6 * 9, "prompt_mean": groups}
    denominators = {
        "denominator": normaliser.get(aggregation, 6),
        "entropy_denominator": tokens,
    }
    for loss_type in LOSS_TYPES:
        # The quantile is one of its call.
        options = BATCH_OPTIONS | {"top_entropy_quantile": 1.0}
        config = config_of(loss_type, aggregation=aggregation, beta=0.2, **options)
        whole = results_of(batch, config)
        parts = []
        for cut in (slice(0, 2), slice(2, 6)):
            part = {name: x if name == "weight" else x[cut] for name, x in batch.items()}
            parts.append(results_of(part, config, **denominators))
        for a, *b in zip(whole, *parts, strict=True):
            assert torch.allclose(a, torch.cat(b), rtol=1e-12, atol=1e-15), loss_type


def test_group_advantage_by_hand():
    rewards = torch.tensor([1.0, 0.0, math.nan, 2.0, 2.0], dtype=torch.float64)
    ids = torch.tensor([7, 7, 7, 3, 3])
    out = reference.group_advantage(rewards, ids, eps=0.0)
    half = 1 / math.sqrt(2)
    assert torch.allclose(out.advantages, torch.tensor([half, -half, 0, 0, 0]).double())
    assert out.mean.tolist() == [2.0, 0.5]
    assert out.degenerate.tolist() == [True, False]
    loo = reference.group_advantage(rewards, ids, baseline="leave_one_out", scale="none")
    assert loo.advantages.tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]


def test_segment_reduce_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cu = torch.tensor([0, 1, 1, 4])
    assert reference.segment_reduce(x, cu).tolist() == [1.0, 0.0, 9.0]
    assert reference.segment_reduce(x, cu, reduce="mean").tolist() == [1.0, 0.0, 3.0]
