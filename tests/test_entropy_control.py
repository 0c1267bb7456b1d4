"""Adaptive entropy: how the coefficient moves, when it acts, and what is measured."""

import json
import math

import pytest
import torch

from grpo_fast import LossConfig, next_entropy_coef
from grpo_fast.entropy_control import EntropyControl, bonus_entropy

CONFIG = LossConfig(
    use_adaptive_entropy=True,
    entropy_coef=0.02,
    entropy_coef_min=0.01,
    entropy_coef_max=0.03,
    entropy_coef_delta=0.006,
    entropy_target=1.5,
)


@pytest.mark.parametrize(
    "entropy, expected", [(1.4, 0.026), (1.5, 0.026), (1.6, 0.014), (0.0, 0.026), (9.0, 0.014)]
)
def test_one_step_towards_the_target(entropy, expected):
    assert next_entropy_coef(CONFIG, entropy) == pytest.approx(expected)


def test_a_run_of_steps_stays_within_the_bounds():
    """By hand: up twice, to the upper bound; then down until the lower one."""
    control = EntropyControl(CONFIG.entropy_coef)
    used, kept = [], []
    for entropy in (1.0, 1.5, 1.2, 2.0, 1.9, 1.8, 1.7, 1.0, 1.0):
        used.append(control.loss(CONFIG).entropy_coef)
        control = control.after(CONFIG, entropy)
        kept.append(control.coef)
    assert kept == pytest.approx([0.026, 0.03, 0.03, 0.024, 0.018, 0.012, 0.01, 0.016, 0.022])
    # The first step has measured nothing; the four after 2.0 ... 1.7 are above the target.
    assert used == pytest.approx([0, 0.026, 0.03, 0.03, 0, 0, 0, 0, 0.016])


def test_only_the_coefficient_of_the_loss_changes():
    control = EntropyControl(0.5, 1.0)
    assert control.loss(CONFIG) == LossConfig(
        use_adaptive_entropy=True,
        entropy_coef=0.5,
        entropy_coef_min=0.01,
        entropy_coef_max=0.03,
        entropy_coef_delta=0.006,
        entropy_target=1.5,
    )


@pytest.mark.parametrize("entropy", [math.nan, math.inf])
def test_what_is_no_measurement_moves_nothing(entropy):
    control = EntropyControl(0.02, 1.0)
    assert control.after(CONFIG, entropy) == control


def test_the_state_survives_json_bit_for_bit():
    for control in (EntropyControl(0.1 + 0.2), EntropyControl(1 / 3, math.pi)):
        assert EntropyControl(**json.loads(json.dumps(control._asdict()))) == control


def test_the_mean_is_over_the_tokens_the_bonus_acts_on():
    """Masked tokens hold what they like; 6 live tokens, of which half lie above the median 3.5."""
    entropy = [torch.tensor([1.0, 2.0, math.nan, 4.0]), torch.tensor([6.0, 3.0, 9.0, 5.0])]
    masks = [[1, 1, 0, 1], [1, 1, 0, 1]]
    assert bonus_entropy(entropy, masks, 1.0) == 3.5
    assert bonus_entropy(entropy, masks, 0.5) == 5.0
    assert math.isnan(bonus_entropy(entropy, [[0] * 4] * 2, 1.0))
    assert math.isnan(bonus_entropy(entropy, [[0] * 4] * 2, 0.5))
