"""Choices of formula against the oracle, apart from any vocabulary."""

import math

import pytest
import torch

from grpo_fast import ConfigError, LossConfig, reference
from grpo_fast.objective import policy_terms, token_weights


def rows(n: int = 200) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(n, generator=generator, dtype=torch.float64)

    logp = -normal().abs()
    return {
        "logp": logp,
        "advantages": normal(),
        "weights": torch.rand(n, generator=generator, dtype=torch.float64),
        "old_logp": logp + normal(),
        "ref_logp": logp + normal(),
    }


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_slope_is_the_derivative_of_the_oracle_s_loss(kl, delta, beta):
    config = LossConfig(epsilon=0.1, epsilon_high=0.3, delta=delta, beta=beta, kl_estimator=kl)
    r = rows()
    found = policy_terms(**r, config=config)
    logp = r["logp"].requires_grad_()
    ratio = (logp - r["old_logp"]).exp()
    loss = reference.clip_objective(
        ratio, r["advantages"], epsilon=0.1, epsilon_high=0.3, delta=delta
    )
    kl_rows = reference.kl_divergence(logp, r["ref_logp"], estimator=kl, limit=20.0)
    loss = r["weights"] * (loss + beta * kl_rows)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.allclose(found.loss, loss, rtol=1e-12)
    assert torch.allclose(found.slope, slope, rtol=1e-12, atol=1e-15)
    assert torch.allclose(found.kl, kl_rows, rtol=1e-12)


def test_far_off_tokens_are_taken_at_the_limit_and_still_pulled_back():
    config = LossConfig(beta=1.0, log_ratio_clamp=5.0)
    logp = torch.tensor([-1e4, 0.0], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    ref = torch.tensor([0.0, -1e4], dtype=torch.float64)
    terms = policy_terms(logp, zero, zero + 1, old_logp=None, ref_logp=ref, config=config)
    assert terms.kl.tolist() == pytest.approx([math.exp(5) - 6, math.exp(-5) + 4])
    assert terms.slope[0] < 0, "a log-prob far below the reference must be raised"
    assert terms.slope[1] > 0, "a log-prob far above the reference must be lowered"


def test_nan_surfaces():
    r = rows(3)
    r["old_logp"][1] = math.nan
    terms = policy_terms(**r, config=LossConfig())
    assert terms.loss.isnan().tolist() == [False, True, False]
    assert terms.slope.isnan().tolist() == [False, True, False]


def test_denominator_replaces_the_normaliser():
    mask = torch.tensor([True, True, False])
    weights = token_weights(mask, LossConfig(), segments=None, denominator=8.0)
    assert weights.tolist() == [0.125, 0.125, 0.0]


BAD = {
    "loss_type": ({"loss_type": "gpro"}, "loss_type = 'gpro'.*did you mean 'grpo'.*dr_grpo"),
    "level": ({"importance_sampling_level": "word"}, "choose one of token, sequence"),
    "kl": ({"kl_estimator": "k4"}, "choose one of k1, k2, k3"),
    "epsilon": ({"epsilon": 1.0}, "epsilon = 1.0 is out of range: expected 0 <= epsilon < 1"),
    "epsilon-nan": ({"epsilon": math.nan}, "epsilon = nan"),
    "epsilon_high": ({"epsilon_high": -0.1}, "epsilon_high = -0.1"),
    "delta": ({"delta": 1.1}, r"delta = 1.1 .*more than 1 \+ epsilon_high = 1.2"),
    "beta": ({"beta": -1.0}, "beta = -1.0"),
    "beta-nan": ({"beta": math.nan}, "beta = nan"),
    "temperature": ({"temperature": 0}, "temperature = 0 .*greedy"),
    "clamp": ({"log_ratio_clamp": 100.0}, "log_ratio_clamp = 100.0.*88"),
    "length": ({"max_completion_length": 0}, "max_completion_length = 0"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD.keys())
def test_bad_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**options)
