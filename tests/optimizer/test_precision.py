"""Updates of learning rate 1e-6 reach bfloat16 weights, exactly or on average."""

import copy
from types import SimpleNamespace

import pytest
import torch
from small_updates import BF16_EPS, MOVED, RATE, STEPS, N, config_of, gradient, run, weights
from torch import Tensor

from grpo_fast.optimizer import make_optimizer, round_stochastically
from grpo_fast.trainer import apply_gradients


def landed(precision: str) -> tuple[Tensor, Tensor, torch.optim.Optimizer, Tensor]:
    """(weights before, after, optimizer, parameter) of 100 steps with a gradient that stays."""
    parameter = weights()
    before = parameter.detach().double()
    optimizer = make_optimizer([parameter], config_of(precision))
    random = torch.rand(N, generator=torch.Generator().manual_seed(1)).bfloat16() + 0.5
    parameter.grad = random.to(parameter.grad_dtype)
    for _ in range(STEPS):
        optimizer.step()
    return before, parameter.detach().double(), optimizer, parameter


def test_plain_bfloat16_loses_the_updates():
    """The control: only weights below 2**-11 have neighbours nearer than twice the update, 2% of
    N(0, 0.02)."""
    before, after, *_ = landed("none")
    assert (after != before).double().mean() < 0.03
    # Those move one spacing where they should move half of one or more.
    assert abs((before - after).mean() / MOVED) < 0.04


def test_master_weights_land():
    before, after, optimizer, parameter = landed("master")
    master = optimizer.state[parameter]["master"]
    # Each step rounds the float32 master once, by half a spacing of numbers below 0.125 at most.
    assert (before - master.double() - MOVED).abs().max() <= STEPS * 2**-28 + 1e-3 * MOVED
    assert torch.equal(parameter, master.bfloat16())
    # What float64 predicts: the goal, rounded once.
    goal = (before - MOVED).bfloat16().double()
    assert (after != goal).double().mean() < 0.01
    assert (after != before).double().mean() > 0.8
    assert float((before - after).mean() / MOVED) == pytest.approx(1, abs=0.03)


def test_stochastic_weights_land_on_average():
    before, after, *_ = landed("stochastic")
    # A step of p spacings has the variance p (1 - p) spacing**2 <= RATE * spacing.
    spacing = BF16_EPS * before.abs() + RATE
    error = (STEPS * RATE * spacing.mean() / N).sqrt()
    assert error < 0.005 * MOVED
    assert abs((before - after).mean() - MOVED) < 4 * error
    assert (after != before).double().mean() > 0.6


def test_master_is_the_float32_adamw():
    """Bit for bit in the master, with weight decay and changing rates."""
    parameter, exact = weights(4099), weights(4099).detach().float().requires_grad_()
    options = {"weight_decay": 0.1, "learning_rate": 1e-3, "adam_beta2": 0.95}
    optimizer = make_optimizer([parameter], config_of(**options))
    oracle = torch.optim.AdamW([exact], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        parameter.grad = gradient(parameter, step).to(parameter.grad_dtype)
        exact.grad = parameter.grad.float()
        for group in (*optimizer.param_groups, *oracle.param_groups):
            group["lr"] = 1e-3 / (1 + step)
        optimizer.step()
        oracle.step()
        state = optimizer.state[parameter]
        assert torch.equal(state["master"], exact)
        assert torch.equal(parameter, exact.bfloat16())
    for name, value in oracle.state[exact].items():
        assert torch.equal(state[name], value)


def test_one_stochastic_step_is_float32_adamw_to_a_neighbour():
    parameter, exact = weights(4099), weights(4099).detach().float().requires_grad_()
    optimizer = make_optimizer([parameter], config_of("stochastic", learning_rate=1e-3))
    oracle = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0)
    parameter.grad = gradient(parameter, 0).to(parameter.grad_dtype)
    exact.grad = parameter.grad.float()
    optimizer.step()
    oracle.step()
    assert "master" not in optimizer.state[parameter]
    down = (exact.detach().view(torch.int32) & -(2**16)).view(torch.float32)
    up = (down.view(torch.int32) + 2**16).view(torch.float32)
    assert ((parameter == down) | (parameter == up)).all()
    # As often up as the dropped bits say, within four standard deviations of 4099 coins.
    share = (exact.detach().view(torch.int32) & (2**16 - 1)).double() / 2**16
    error = (share * (1 - share)).sum().sqrt() / len(share)
    assert abs((parameter == up).double().mean() - share.mean()) < 4 * error


# Negative, subnormal, at a change of exponent, tiny, large.
VALUES = [0.3, -0.3, 1e-40, 1.9999999, -1.9999999, 1e-30, 3e38, 1.0 + 2**-23]


@pytest.mark.parametrize("value", VALUES)
def test_stochastic_rounding_is_unbiased(value):
    """Over all 2**16 noises the mean is the value itself, in float64."""
    noise = torch.arange(2**16, dtype=torch.int32)
    exact = torch.full((2**16,), value)
    rounded = round_stochastically(exact, noise)
    assert len(rounded.double().unique()) == 2
    # Sums of 2**16 numbers of 8 bits are exact in float64.
    assert rounded.double().mean() == exact[0].double()


def test_stochastic_rounding_never_moves_a_bfloat16():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for noise in (0, 1, 2**15, 2**16 - 1):
        rounded = round_stochastically(
            every.float(), torch.full(every.shape, noise, dtype=torch.int32)
        )
        numbers = ~every.isnan()
        assert torch.equal(rounded[numbers].view(torch.int16), every[numbers].view(torch.int16))
        assert rounded[~numbers].isnan().all()


def test_stochastic_rounding_keeps_every_nan():
    """Also those whose mark is in the bits that bfloat16 drops, and that noise carries on."""
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32)
    value = bits.view(torch.float32)
    assert value.isnan().all()
    for noise in (0, 1, 2**16 - 1):
        assert round_stochastically(value, torch.full_like(bits, noise)).isnan().all()


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_noise_is_seeded_new_every_step_and_leaves_the_global_generator_alone(precision):
    results = {}
    for seed in (0, 0, 1):
        parameter = weights(4096)
        optimizer = make_optimizer([parameter], config_of(precision, seed=seed))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        run(optimizer, parameter, range(3))
        assert torch.equal(torch.get_rng_state(), before)
        if seed in results:
            assert torch.equal(parameter, results[seed])
        results[seed] = parameter.detach()
    assert torch.equal(results[0], results[1]) == (precision == "master")
    seeds = {optimizer._noise_seed()}
    run(optimizer, parameter, range(1))
    assert optimizer._noise_seed() not in seeds


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_a_gradient_that_is_not_finite_spoils_its_own_weight(precision, bad):
    clean, spoilt = weights(256), weights(256)
    for parameter in (clean, spoilt):
        optimizer = make_optimizer([parameter], config_of(precision))
        parameter.grad = gradient(parameter, 0).to(parameter.grad_dtype)
        if parameter is spoilt:
            parameter.grad[7] = bad
        optimizer.step()
    assert spoilt[7].isnan()
    others = torch.arange(256) != 7
    assert torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_the_loop_throws_such_a_step_away(precision):
    model = torch.nn.Linear(16, 16, dtype=torch.bfloat16)
    config = config_of(precision, warmup_steps=2)
    parts = SimpleNamespace(model=model, optimizer=make_optimizer(model.parameters(), config))
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan, dtype=parameter.grad_dtype)
    assert apply_gradients(config, parts, 1)["skipped_updates"] == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not parts.optimizer.state
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter, dtype=parameter.grad_dtype)
    assert apply_gradients(config, parts, 1)["learning_rate"] == RATE / 2
    assert parts.optimizer.param_groups[0]["lr"] == RATE / 2
    assert len(parts.optimizer.state) == 2
