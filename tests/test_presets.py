"""Other trainers' configs, read without the trainers: which attributes, which versions, which
refusals. That the losses are the same is measured in tests/parity."""

from types import SimpleNamespace

import pytest
import torch

from grpo_fast.errors import ConfigError
from grpo_fast.loss_config import LossConfig
from grpo_fast.presets import verl_denominators

# What every GRPOConfig has, and what came with which version.
TRL = {"loss_type": "dapo", "beta": 0.1, "temperature": 0.7, "epsilon": 0.3, "use_vllm": True}
V0_24 = {
    "importance_sampling_level": "token",
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_cap": 2.0,
}
V1_0 = V0_24 | {
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_cap": 3.0,
    "use_bias_correction_kl": False,
}
V1_16 = V1_0 | {
    "vllm_importance_sampling_cap": None,
    "vllm_importance_sampling_clip_max": None,
    "vllm_importance_sampling_clip_min": 0.5,
    "use_bias_correction_kl": True,
}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ({}, {}),
        (
            V0_24,
            {
                "importance_sampling_correction": "token_truncate",
                "importance_sampling_max": 2.0,
            },
        ),
        (V1_0, {"importance_sampling_correction": "sequence_mask"}),
        (
            V1_16,
            {
                "importance_sampling_correction": "sequence_mask",
                "importance_sampling_max": None,
                "importance_sampling_min": 0.5,
                "use_bias_correction_kl": True,
            },
        ),
    ],
    ids=["0.19", "0.24", "1.0", "1.16"],
)
def test_every_version_of_trl_is_read_as_it_was(version, expected):
    options = {"beta": 0.1, "temperature": 0.7, "epsilon": 0.3, "log_ratio_clamp": 80.0}
    expected = LossConfig(**options, importance_sampling_level="token", **expected)
    assert LossConfig.from_trl(SimpleNamespace(**TRL, **version)) == expected
    assert LossConfig.from_trl(TRL | version) == expected


def test_a_router_loss_by_default_is_nobody_s_choice():
    class Args(SimpleNamespace):
        router_aux_loss_coef = 0.001  # TRL 1.7 to 1.13

    LossConfig.from_trl(Args(**TRL))
    with pytest.raises(ConfigError, match="router_aux_loss_coef = 0.01 is a loss of the model's"):
        LossConfig.from_trl(Args(**TRL, router_aux_loss_coef=0.01))


def test_options_that_do_nothing_there_do_nothing_here():
    idle = {"sapo_temperature_pos": 2.0, "vespo_k_pos": 1.0, "entropy_coef_max": 0.5}
    assert LossConfig.from_trl(TRL | idle) == LossConfig.from_trl(TRL)
    actor = {"loss_agg_mode": "token-mean", "clip_ratio": 0.2}
    idle = {"tau_pos": 2.0, "kl_loss_coef": 0.1, "kl_loss_type": "k1", "loss_scale_factor": 9}
    assert LossConfig.from_verl(actor | idle) == LossConfig.from_verl(actor)


def test_the_wrong_object_is_named():
    with pytest.raises(ConfigError, match="object has no option loss_type: expected a GRPOConfig"):
        LossConfig.from_trl(object())
    with pytest.raises(ConfigError, match="dict has no option loss_agg_mode: expected actor_roll"):
        LossConfig.from_verl({"actor_rollout_ref": {}})


# Three sequences of 2, 0 and 3 tokens, padded to 4.
MASK = torch.arange(4) < torch.tensor([2, 0, 3])[:, None]
STEP = {"dp_size": 4, "batch_num_tokens": 1000, "global_batch_size": 64}


@pytest.mark.parametrize(
    ("aggregation", "counted", "given"),
    [
        ("token-mean", 5, 250),
        ("token-sum", 1, 0.25),
        ("seq-mean-token-sum", 2, 16),
        ("seq-mean-token-mean", 2, 16),
        ("seq-mean-token-sum-norm", 8, 64),
    ],
)
def test_verl_divides_by_what_it_was_given_or_counts_what_is_there(aggregation, counted, given):
    actor = {"loss_agg_mode": aggregation}
    assert verl_denominators(actor, MASK) == {"denominator": counted}
    actor["global_batch_info"] = STEP
    assert verl_denominators(actor, MASK) == {"denominator": given}
    actor["entropy_coeff"] = 0.1
    both = {"denominator": given, "entropy_denominator": given}
    assert verl_denominators(actor, MASK) == both
    assert verl_denominators(actor, torch.zeros_like(MASK))["denominator"] == given


def test_verl_s_odd_ones_divide_in_their_own_way():
    actor = {"loss_agg_mode": "token-mean", "entropy_coeff": 0.1}
    for mode, denominator in (("sapo", 2), ("geo_mean", 3)):
        actor["policy_loss"] = {"loss_mode": mode}
        expected = {"denominator": denominator, "entropy_denominator": 5}
        assert verl_denominators(actor, MASK) == expected
    actor |= {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 16}
    actor["policy_loss"] = {"loss_mode": "vanilla"}
    assert verl_denominators(actor, MASK)["denominator"] == 32
    nothing = verl_denominators({"loss_agg_mode": "token-mean"}, torch.zeros_like(MASK))
    assert nothing == {"denominator": 1}, "no token gives a loss of 0, not 0 / 0"
