"""`LigerFusedLinearGRPOLoss` against `linear_grpo_loss`, option by option, and the traps: one name,
two meanings."""

import math

import pytest

from grpo_bench.hosts import Gap, Trap, even_batch, gap, liger_loss, ours, random_batch
from grpo_fast.loss_config import LossConfig

# Liger computes in float32 whatever it is given.
LIMIT = 1e-6
# Liger's weight of the KL where none is given.
BETA = 0.04
CASES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo"},
    {"loss_type": "dapo", "num_items_in_batch": 1000},
    {"loss_type": "dr_grpo", "max_completion_length": 16},
    {"loss_type": "cispo", "epsilon_high": 1.5},
    {"loss_type": "sapo"},
    {"loss_type": "vespo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.28},
    {"loss_type": "grpo", "delta": 1.5},
    {"loss_type": "grpo", "temperature": 0.7},
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    {
        "loss_type": "grpo",
        "beta": 0.1,
        "use_bias_correction_kl": True,
        "importance_sampling_level": "sequence",
    },
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    {"loss_type": "vespo", "vespo_k_neg": 1.0, "vespo_lambda_pos": 2.0},
]


def translate(options: dict) -> LossConfig:
    """There is no preset: names are the same but for `epsilon_low`, `beta` has another default."""
    options = {"beta": BETA, **options}
    options.pop("num_items_in_batch", None)
    if "epsilon_low" in options:
        options["epsilon"] = options.pop("epsilon_low")
    return LossConfig(**options, log_ratio_clamp=80.0)


def batch_for(options: dict) -> dict:
    # The product of a sequence's ratios is what VESPO looks at: it must stay near 1.
    return random_batch(old_gap=0.3 if options["loss_type"] == "vespo" else 0.9)


def difference(options: dict, impl: str = "auto") -> Gap:
    """One row of docs/conformance.md."""
    batch, denominator = batch_for(options), options.get("num_items_in_batch")
    result = ours(batch, translate(options), denominator=denominator, impl=impl)
    return gap(result, liger_loss(batch, **options))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_value_and_gradient_are_liger_s(options, impl):
    assert max(difference(options, impl)) <= LIMIT


@pytest.mark.parametrize("options", CASES, ids=str)
def test_every_option_of_a_case_changes_liger_s_loss(options):
    """Otherwise the test above would show nothing."""
    batch = batch_for(options)
    with_all = liger_loss(batch, **options)
    for name in options.keys() - {"loss_type", "max_completion_length"}:
        rest = {key: options[key] for key in options.keys() - {name}}
        assert max(gap(liger_loss(batch, **rest), with_all)) > 1e-5, name


def luspo_by_token():
    """Loss of a sequence of one token, padded to two."""
    batch = even_batch((1,), (1.0,), width=2)
    options = {"loss_type": "luspo", "importance_sampling_level": "token", "beta": 0.0}
    return liger_loss(batch, **options).loss, ours(batch, LossConfig(**options)).loss


def cispo_without_epsilon_high():
    """Size of the on-policy gradient over that of `-A log p`."""
    batch = even_batch((4,), (1.0,))
    options = {"loss_type": "cispo", "beta": 0.0}
    right = ours(batch, LossConfig(**options, epsilon_high=5.0)).hidden.norm()
    plain = ours(batch, LossConfig(loss_type="reinforce")).hidden.norm()
    return liger_loss(batch, **options).hidden.norm() / plain, right / plain


def beta_by_default():
    """Weight of the KL where none was asked for: loss of a token of advantage 0 and KL 1/2."""
    batch = even_batch((1,), (0.0,), ref_gap=-math.log(2))
    k3 = 1 - math.log(2)
    return liger_loss(batch).loss / k3, ours(batch, LossConfig()).loss / k3


def dapo_in_two():
    """Sum over two micro-batches, of a step of loss 0.5."""
    whole = even_batch((1, 3), (1.0, -1.0))
    parts = [{k: x if k == "weight" else x[j : j + 1] for k, x in whole.items()} for j in (0, 1)]
    there = sum(liger_loss(part, beta=0.0).loss for part in parts)
    return there, sum(ours(part, LossConfig(), denominator=4).loss for part in parts)


TRAPS = [
    Trap(
        "`luspo` with `importance_sampling_level` `token`, or with a KL, counts padding, as TRL "
        "did up to 1.9: loss of one token of probability 1/2, padded to two, old log-prob 0",
        -0.75,
        -1.0,
        luspo_by_token,
    ),
    Trap(
        "`cispo` with the default `epsilon_high` = 0.2: size of every on-policy gradient. "
        "LossConfig refuses it",
        0.2,
        1.0,
        cispo_without_epsilon_high,
    ),
    Trap(
        "`beta` is 0.04 by default, in TRL and here 0: weight of a KL that nobody asked for",
        0.04,
        0.0,
        beta_by_default,
    ),
    Trap(
        "`dapo` divides by the tokens of its call unless it is given `num_items_in_batch`: a loss "
        "of 0.5, in two parts. Here `denominator` is the step's number of tokens",
        0.0,
        0.5,
        dapo_in_two,
    ),
]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.measure.__name__)
def test_trap(trap):
    assert trap.measure() == pytest.approx((trap.there, trap.here), abs=1e-6)
