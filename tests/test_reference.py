"""The oracle itself: gradcheck in float64, and values worked out by hand."""

import math

import pytest
import torch

from grpo_fast import LossConfig, reference
from grpo_fast.testing import random_rows, random_sequences


def double(rows: dict) -> dict:
    return {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprob_gradcheck(temperature):
    rows = double(random_rows(4, 7))
    logits = rows["logits"].requires_grad_()

    def outputs(x):
        return tuple(reference.token_logprob(x, rows["targets"], temperature=temperature))

    assert torch.autograd.gradcheck(outputs, (logits,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("delta", [None, 1.4])
def test_policy_loss_gradcheck(kl_estimator, delta):
    rows = double(random_rows(6, 5, seed=3))
    logits = rows.pop("logits").requires_grad_()

    def loss(x):
        return reference.policy_loss(
            x, **rows, beta=0.3, kl_estimator=kl_estimator, delta=delta, temperature=0.8
        ).loss

    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_linear_grpo_loss_gradcheck(loss_type, level):
    batch = double(random_sequences(3, 4, 3, 6))
    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        max_completion_length=4,
    )
    hidden = batch["hidden"].reshape(-1, 3).requires_grad_()
    weight = batch["weight"].requires_grad_()

    def loss(h, w):
        return reference.linear_grpo_loss(
            h,
            w,
            batch["targets"].reshape(-1),
            batch["advantages"].repeat_interleave(4),
            mask=batch["mask"].reshape(-1),
            cu_seqlens=torch.tensor([0, 4, 8, 12]),
            old_logp=batch["old_logprobs"].reshape(-1),
            ref_logp=batch["ref_logprobs"].reshape(-1),
            config=config,
        ).loss.sum()

    assert torch.autograd.gradcheck(loss, (hidden, weight), eps=1e-6, atol=1e-7)


def test_clip_objective_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 3.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -2.0])
    loss = reference.clip_objective(ratio, advantages, epsilon=0.2, epsilon_high=0.3, delta=2.0)
    # clipped up, not clipped (a loss may grow), not clipped, clipped down, capped by delta
    assert torch.allclose(loss, torch.tensor([-1.3, 1.5, -0.5, 0.8, 4.0]))


def test_kl_estimators_by_hand():
    logp, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    values = [
        float(reference.kl_divergence(logp, ref, estimator=name, limit=20.0))
        for name in ("k1", "k2", "k3")
    ]
    d = math.log(2)
    assert values == pytest.approx([d, d * d / 2, 0.5 - 1 + d])


def test_token_weights_add_up_by_hand():
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0], dtype=torch.bool)
    cu = torch.tensor([0, 3, 5, 8])
    expected = {
        "grpo": [1 / 6, 1 / 6, 0, 1 / 3, 0, 0, 0, 0],
        "bnpo": [1 / 3, 1 / 3, 0, 1 / 3, 0, 0, 0, 0],
        "dapo": [1 / 3, 1 / 3, 0, 1 / 3, 0, 0, 0, 0],
        "dr_grpo": [1 / 30, 1 / 30, 0, 1 / 30, 0, 0, 0, 0],
    }
    for loss_type, weights in expected.items():
        config = LossConfig(loss_type=loss_type, max_completion_length=10)
        found = reference.token_weights(mask, cu, config, None)
        assert torch.allclose(found, torch.tensor(weights, dtype=torch.float64)), loss_type


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
