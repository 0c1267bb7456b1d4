"""B: options of a loss that are out of range, have no effect or are at an edge."""

import math

import pytest
import torch
from changed_call import IMPLS, INF, NAN, D, L, S, V, at, bits, call

from grpo_fast import ConfigError, InputError, LossConfig, linear_grpo_loss
from grpo_fast.testing import random_sequences


@pytest.mark.parametrize(
    "options, said",
    [
        ({"epsilon": 1.0}, r"epsilon = 1.0 is out of range: expected 0 <= epsilon < 1"),
        ({"epsilon": NAN}, r"epsilon = nan is out of range"),
        ({"epsilon_high": -0.1}, r"epsilon_high = -0.1 is out of range"),
        ({"delta": 1.1}, r"delta = 1.1 is out of range: expected more than 1 \+ epsilon_high"),
        ({"dual_clip": 0.9}, r"dual_clip = 0.9 is out of range: expected more than 1"),
        ({"beta": -0.1}, r"beta = -0.1 is out of range"),
        ({"beta": NAN}, r"beta = nan is out of range"),
        ({"temperature": 0.0}, r"temperature = 0.0 is out of range.*greedy"),
        ({"temperature": -1.0}, r"temperature = -1.0 is out of range"),
        ({"temperature": INF}, r"temperature = inf is out of range"),
        ({"loss_type": "gpro"}, r"loss_type = 'gpro' is not available: did you mean 'grpo'"),
        ({"loss_type": "cispo"}, r"loss_type 'cispo' needs epsilon_high"),
        ({"loss_type": "dro"}, r"dro_beta = None is out of range.*needs it"),
        ({"loss_type": "sapo", "delta": 4.0}, r"delta = 4.0 has no effect with loss_type 'sapo'"),
        ({"sapo_temperature_pos": 2.0}, r"sapo_temperature_pos = 2.0 has no effect"),
        ({"use_bias_correction_kl": True}, r"use_bias_correction_kl has no effect with beta = 0"),
        ({"entropy_target": 0.5}, r"entropy_target has no effect without use_adaptive_entropy"),
        ({"importance_sampling_max": 2.0}, r"importance_sampling_max has no effect with"),
        ({"importance_sampling_level": "word"}, r"choose one of token, sequence, sequence_token"),
        ({"kl_estimator": "k4"}, r"choose one of k1, k2, k3, abs"),
        ({"log_ratio_clamp": 100.0}, r"log_ratio_clamp = 100.0 .*88"),
        ({"max_completion_length": 0}, r"max_completion_length = 0 is out of range"),
        ({"objective": 3}, r"objective is int, expected a function"),
        ({"top_entropy_quantile": 1.5}, r"top_entropy_quantile = 1.5 is out of range"),
    ],
)
def test_b2_b3_b4_b7_b14_options_are_checked_when_set(options, said):
    with pytest.raises(ConfigError, match=said):
        LossConfig(**options)


def test_b3_a_kl_that_is_not_measured_is_not_zero(batch):
    with pytest.raises(InputError, match=r"beta = 0.1 needs ref_logprobs \(3, 4\)"):
        call(batch, config=LossConfig(beta=0.1))
    assert "kl" not in call(batch)[0].metrics
    assert "kl" in call(batch, ref_logprobs=batch["ref_logprobs"])[0].metrics


def test_b4_temperature_divides_the_logits(batch):
    found = call(batch, config=LossConfig(temperature=0.7))[0].logprobs
    logits = batch["hidden"] @ batch["weight"].T / 0.7
    expected = logits.log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    assert torch.allclose(found, expected, atol=1e-5)
    for bad in (0.0, -1.0, NAN, INF):
        with pytest.raises(InputError, match="temperature = .* expected a finite number > 0"):
            call(batch, temperature=bad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_b5_b6_on_policy_is_exact(batch, level, impl):
    config = LossConfig(importance_sampling_level=level)
    without, dhidden, _ = call(batch, impl=impl, config=config, old_logprobs=None)
    with_own, same, _ = call(batch, impl=impl, config=config, old_logprobs=without.logprobs)
    for output in (without, with_own):
        assert (output.tokens.ratio == 1).all()
        assert output.metrics["clip_ratio/region_mean"] == 0
    assert bits(dhidden) == bits(same)


@pytest.mark.parametrize("impl", IMPLS)
def test_b8_advantages_at_the_edge(batch, impl):
    far = torch.full((S, L), -1e4, device=batch["hidden"].device)
    for zero in (0.0, -0.0):
        rows = {"advantages": torch.full((S,), zero, device=far.device), "old_logprobs": far}
        config = LossConfig(skip_zero_advantage=False)
        output, *grads = call(batch, impl=impl, config=config, **rows)
        assert output.loss == 0
        assert not any(grad.any() for grad in grads)
    if far.is_cuda:
        return
    for bad in (INF, -INF, NAN):
        advantages = at(batch["advantages"], (1,), bad)
        with pytest.raises(
            InputError, match=r"advantages at token \[1, 0\] is -?(inf|nan), expected"
        ):
            call(batch, advantages=advantages)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_b9_a_ratio_at_the_bound_still_teaches(side, impl, device):
    """p = 1/2, old = p / bound in powers of two: the ratio is the bound, to the bit."""
    hidden = torch.zeros(1, 1, 2, device=device, requires_grad=True)
    weight = torch.eye(2, device=device)
    targets = torch.zeros(1, 1, dtype=torch.long, device=device)
    bound = 2.0 if side > 0 else 0.5
    own = linear_grpo_loss(
        hidden, weight, targets, torch.ones(1, device=device), impl=impl
    ).logprobs
    config = LossConfig(epsilon=0.5, epsilon_high=1.0)
    old = own - math.log(bound)
    output = linear_grpo_loss(
        hidden,
        weight,
        targets,
        torch.full((1,), side, device=device),
        old_logprobs=old,
        config=config,
        impl=impl,
    )
    (grad,) = torch.autograd.grad(output.loss, hidden)
    ratio = output.tokens.ratio.item()
    assert ratio == pytest.approx(bound, rel=1e-6)
    inside = ratio <= bound if side > 0 else ratio >= bound
    assert grad.any().item() == inside


@pytest.mark.parametrize("bad", [0.0, -2.0, NAN, INF])
def test_b10_denominators(batch, bad):
    with pytest.raises(InputError, match=r"denominator = .*, expected a finite number > 0"):
        call(batch, denominator=bad)
    with pytest.raises(InputError, match="entropy_denominator = .*, expected a finite number > 0"):
        call(batch, entropy_denominator=bad)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_b11_b12_neither_cuts_nor_order_change_the_step(loss_type, device):
    batch = random_sequences(8, 6, D, V, torch.float64, device=device)
    config = LossConfig(loss_type=loss_type, max_completion_length=6, entropy_coef=0.01)
    tokens = float(batch["mask"].sum())
    total = {"grpo": 8.0, "dapo": tokens, "dr_grpo": 48.0, "luspo": 8.0}[loss_type]
    names = ("hidden", "targets", "advantages", "mask", "old_logprobs")
    results = []
    for order in (list(range(8)), [3, 1, 7, 0, 2, 6, 5, 4]):
        for size in (8, 4, 1):
            weight = batch["weight"].clone().requires_grad_()
            for k in range(0, 8, size):
                rows = {name: batch[name][order[k : k + size]] for name in names}
                linear_grpo_loss(
                    weight=weight,
                    **rows,
                    config=config,
                    denominator=total,
                    entropy_denominator=tokens,
                ).loss.backward()
            results.append(weight.grad)
    for grad in results[1:]:
        assert torch.allclose(grad, results[0], rtol=1e-9, atol=1e-14)


def test_b13_the_default_loss_learns_a_bandit(device):
    hidden = torch.ones(2, 1, 1, device=device)
    weight = torch.zeros(2, 1, device=device, requires_grad=True)
    targets = torch.tensor([[0], [1]], device=device)
    loss = linear_grpo_loss(hidden, weight, targets, torch.tensor([1.0, -1.0], device=device)).loss
    loss.backward()
    assert weight.grad[0] < 0 < weight.grad[1]
