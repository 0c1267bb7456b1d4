"""Losses and slopes of per-token vectors against the oracle, apart from any vocabulary."""

import math

import pytest
import torch

from grpo_fast import LossConfig, reference_loss
from grpo_fast.aggregation import token_weights, top_entropy
from grpo_fast.policy_terms import PolicyTerms, policy_terms
from grpo_fast.rows import LossRows


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


def terms_of(config: LossConfig, logp: torch.Tensor, **vectors: torch.Tensor) -> PolicyTerms:
    mask = torch.ones_like(logp, dtype=torch.bool)
    targets = torch.zeros_like(logp, dtype=torch.long)
    given = LossRows(targets=targets, mask=mask, temperature=1.0, **vectors)
    return policy_terms(logp, torch.zeros_like(logp), given, config, reduce=None)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_slope_is_the_derivative_of_the_oracle_s_loss(kl, delta, beta):
    config = LossConfig(epsilon=0.1, epsilon_high=0.3, delta=delta, beta=beta, kl_estimator=kl)
    r = rows()
    found = terms_of(config, **r)
    logp = r["logp"].requires_grad_()
    tokens = reference_loss.Tokens(
        logprobs=logp,
        old_logprobs=r["old_logp"],
        ref_logprobs=None,
        sampler_logprobs=None,
        advantages=r["advantages"],
        mask=torch.ones_like(logp, dtype=torch.bool),
        entropy=torch.zeros_like(logp),
        cu_seqlens=None,
    )
    kl_rows = reference_loss.kl_divergence(logp, r["ref_logp"], estimator=kl, limit=20.0)
    loss = r["weights"] * (reference_loss.objective_of(config)(tokens) + beta * kl_rows)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.allclose(found.loss, loss, rtol=1e-12)
    assert torch.allclose(found.slope, slope, rtol=1e-12, atol=1e-15)
    assert torch.allclose(found.kl, kl_rows, rtol=1e-12)


def test_far_off_tokens_are_taken_at_the_limit_and_still_pulled_back():
    config = LossConfig(beta=1.0, log_ratio_clamp=5.0)
    logp = torch.tensor([-1e4, 0.0], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    ref = torch.tensor([0.0, -1e4], dtype=torch.float64)
    terms = terms_of(config, logp, advantages=zero, weights=zero + 1, ref_logp=ref)
    assert terms.kl.tolist() == pytest.approx([math.exp(5) - 6, math.exp(-5) + 4])
    assert terms.slope[0] < 0, "a log-prob far below the reference must be raised"
    assert terms.slope[1] > 0, "a log-prob far above the reference must be lowered"


def test_nan_surfaces():
    r = rows(3)
    r["old_logp"][1] = math.nan
    terms = terms_of(LossConfig(), **r)
    assert terms.loss.isnan().tolist() == [False, True, False]
    assert terms.slope.isnan().tolist() == [False, True, False]


def test_denominator_replaces_the_normaliser():
    mask = torch.tensor([True, True, False])
    weights = token_weights(mask, LossConfig(), segments=None, denominator=8.0)
    assert weights.tolist() == [0.125, 0.125, 0.0]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 1.0])
def test_top_entropy_is_a_quantile_without_its_limit_on_size(share):
    entropy = torch.rand(101, dtype=torch.float64)
    mask = torch.rand(101) < 0.8
    expected = mask & (entropy >= torch.quantile(entropy[mask], 1 - share))
    assert torch.equal(top_entropy(entropy, mask, share).bool(), expected)
    many = torch.rand(2**24 + 2)  # torch.quantile ends at 2^24
    kept = top_entropy(many, torch.ones_like(many, dtype=torch.bool), share).mean().item()
    assert kept == pytest.approx(share, abs=1e-3)


def test_top_entropy_of_no_rows_at_all():
    nothing = torch.zeros(0)
    assert top_entropy(nothing, nothing.bool(), 0.5).shape == (0,)
