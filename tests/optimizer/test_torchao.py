"""AdamW with moments of 8 bits: torchao's, as it asks to be called and as it is."""

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from small_updates import MOVED, RATE, STEPS, config_of, gradient, nbytes, train_tiny, weights
from torch import Tensor

from grpo_fast import CheckpointError, ConfigError
from grpo_fast.checkpoint import load_optimizer, optimizer_tensors, save_checkpoint
from grpo_fast.optimizer import check_optimizer, make_optimizer
from grpo_fast.tiny import tiny_tokenizer
from grpo_fast.trainer import apply_gradients

TORCHAO = Path(sys.prefix) / "torchao"


class Codes(Tensor):
    """A moment held in parts, as torchao's are: here a bfloat16 and what it lacks."""

    @staticmethod
    def __new__(cls, high: Tensor, low: Tensor):
        return Tensor._make_wrapper_subclass(cls, high.shape, dtype=torch.float32)

    def __init__(self, high: Tensor, low: Tensor) -> None:
        self.high, self.low = high, low

    def __tensor_flatten__(self):
        return ["high", "low"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, *_):
        return cls(parts["high"], parts["low"])

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise NotImplementedError(function)


class FakeAdamW8bit(torch.optim.Optimizer):
    """What torchao's class asks of its caller: rates that are tensors, parts in its state."""

    def __init__(self, params, lr, betas, weight_decay, *, bf16_stochastic_round):
        self.given = {"betas": betas, "weight_decay": weight_decay}
        self.bf16_stochastic_round = bf16_stochastic_round
        super().__init__(params, {"lr": torch.tensor(lr)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert isinstance(group["lr"], Tensor)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    parts = parameter.detach().clone().zero_(), torch.zeros(parameter.shape)
                    state |= {"step": torch.tensor(0.0), "exp_avg": Codes(*parts)}
                state["step"] += 1
                state["exp_avg"].high.add_(parameter.grad)
                state["exp_avg"].low.sub_(parameter.grad)
                parameter.sub_(group["lr"] * state["exp_avg"].high)


@pytest.fixture
def torchao(monkeypatch):
    package, optim = ModuleType("torchao"), ModuleType("torchao.optim")
    optim.AdamW8bit = FakeAdamW8bit
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.optim", optim)


@pytest.mark.parametrize("precision", ["stochastic", "none"])
def test_adamw_8bit_is_torchao_s_with_our_options(torchao, precision):
    config = config_of(
        precision, optimizer="adamw_8bit", weight_decay=0.1, adam_beta1=0.8, warmup_steps=4
    )
    model = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    parts = SimpleNamespace(model=model, optimizer=make_optimizer(model.parameters(), config))
    optimizer = parts.optimizer
    assert optimizer.given == {"betas": (0.8, 0.999), "weight_decay": 0.1}
    assert optimizer.bf16_stochastic_round == (precision == "stochastic")
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(RATE)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter, dtype=parameter.grad_dtype)
    apply_gradients(config, parts, 1)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(RATE / 4)


def test_moments_in_parts_come_back_bit_for_bit(torchao, model, tmp_path):
    config = config_of("stochastic", optimizer="adamw_8bit", learning_rate=1e-2)
    optimizer = make_optimizer(model.parameters(), config)
    train_tiny(model, optimizer, range(2))
    path = save_checkpoint(
        tmp_path, 2, model=model, tokenizer=tiny_tokenizer(), optimizer=optimizer, state={}, keep=1
    )
    fresh = make_optimizer(model.parameters(), config)
    before = copy.deepcopy(model.state_dict())
    load_optimizer(path, model, fresh)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert float(fresh.param_groups[0]["lr"]) == pytest.approx(1e-2)
    for parameter in model.parameters():
        was, now = optimizer.state[parameter], fresh.state[parameter]
        assert now["step"] == was["step"] == 2
        assert torch.equal(now["exp_avg"].high, was["exp_avg"].high)
        assert torch.equal(now["exp_avg"].low, was["exp_avg"].low)


@pytest.fixture
def real_torchao(monkeypatch):
    """The real one, which `make test` brings: beside everything else it would print at imports."""
    if not TORCHAO.is_dir():
        pytest.skip("torchao comes with `make test`")
    monkeypatch.setattr(sys, "path", [*sys.path, str(TORCHAO)])


@pytest.mark.usefixtures("real_torchao")
@pytest.mark.parametrize("precision", ["stochastic", "none"])
def test_torchao_lands_stochastically_and_loses_without(precision):
    config = config_of(precision, optimizer="adamw_8bit")
    parameter = weights(2**16)
    before = parameter.detach().double()
    optimizer = make_optimizer([parameter], config)
    parameter.grad = torch.rand(2**16, generator=torch.Generator().manual_seed(1)).bfloat16() + 0.5
    for _ in range(STEPS):
        optimizer.step()
    moved = (before - parameter.detach().double()).mean() / MOVED
    # Moments of 8 bits are off by some percent each, and by less on average.
    assert float(moved) == pytest.approx(1.0 if precision == "stochastic" else 0.0, abs=0.04)
    assert nbytes(optimizer, parameter) == pytest.approx(6, abs=0.1)


@pytest.mark.usefixtures("real_torchao")
@pytest.mark.parametrize("precision", ["stochastic", "none"])
def test_torchao_goes_on_bit_for_bit(precision, tmp_path):
    """A moment in parts, one too short for them, and noise from the seed of the step."""
    config = config_of(precision, optimizer="adamw_8bit", learning_rate=1e-3)

    def train(model, optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = gradient(parameter, step).to(parameter.grad_dtype)
            optimizer.step()

    model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    optimizer = make_optimizer(model.parameters(), config)
    train(model, optimizer, range(2))
    resumed = copy.deepcopy(model)
    saved = optimizer_tensors(model, optimizer)
    assert {"weight/exp_avg.codes", "weight/exp_avg.scale", "bias/exp_avg"} < set(saved)
    save_file(saved, tmp_path / "optimizer.safetensors")
    second = make_optimizer(resumed.parameters(), config)
    load_optimizer(tmp_path, resumed, second)
    assert torch.equal(resumed.weight, model.weight)
    train(model, optimizer, range(2, 4))
    train(resumed, second, range(2, 4))
    assert torch.equal(resumed.weight, model.weight)
    assert torch.equal(resumed.bias, model.bias)
    float32 = make_optimizer(resumed.parameters(), config_of("stochastic"))
    with pytest.raises(CheckpointError, match="optimizer, update_precision and dtype back"):
        load_optimizer(tmp_path, resumed, float32)


def test_adamw_8bit_without_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    config = config_of("stochastic", optimizer="adamw_8bit")
    with pytest.raises(ConfigError, match="needs torchao .*: pip install torchao, or choose adamw"):
        make_optimizer([weights(8)], config)
    with pytest.raises(ConfigError, match="needs torchao"):
        check_optimizer(config)
    check_optimizer(config_of())
