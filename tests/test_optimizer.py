"""Updates of learning rate 1e-6 reach bfloat16 weights, exactly or on average, and a resumed run
goes on bit for bit.

N weights N(0, 0.02) that AdamW moves by 1e-6 a step, all in one direction, for 100 steps.
"""

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_fast import CheckpointError, ConfigError, Group, InputError, grpo_backward
from grpo_fast import optimizer as optimizer_module
from grpo_fast.checkpoint import load_optimizer, optimizer_tensors, save_checkpoint
from grpo_fast.config import TrainConfig
from grpo_fast.model import load_model
from grpo_fast.optimizer import (
    RoundedAdamW,
    check_optimizer,
    make_optimizer,
    round_stochastically,
    state_bytes,
)
from grpo_fast.tiny import save_tiny, tiny_model, tiny_tokenizer
from grpo_fast.trainer import apply_gradients

RATE, STEPS, N = 1e-6, 100, 100_000
MOVED = RATE * STEPS
BF16_EPS = 2.0**-7
NEEDED = {"model": "m", "dataset": "d.jsonl", "reward": ("r.py:f",)}


TORCHAO = Path(sys.prefix) / "torchao"


def config_of(precision: str = "master", **changes) -> TrainConfig:
    options = {"dtype": "bfloat16", "update_precision": precision, "learning_rate": RATE}
    return TrainConfig(**NEEDED | options | changes)


def weights(count: int = N, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter((0.02 * torch.randn(count, generator=generator)).to(dtype))


def gradient(parameter: Tensor, step: int) -> Tensor:
    # Apart from the seed of the weights, or the first gradient would be the weights themselves.
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def run(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: range) -> None:
    for step in steps:
        parameter.grad = gradient(parameter, step).to(parameter.grad_dtype)
        optimizer.step()


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


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_state_dict_comes_back_in_float32_and_goes_on_bit_for_bit(precision):
    config = config_of(precision, learning_rate=1e-4)
    whole, first = weights(4099), weights(4099)
    run(make_optimizer([whole], config), whole, range(6))
    optimizer = make_optimizer([first], config)
    run(optimizer, first, range(3))
    at_save = copy.deepcopy(optimizer.state[first])
    second = torch.nn.Parameter(first.detach().clone())
    resumed = make_optimizer([second], config)
    resumed.load_state_dict(optimizer.state_dict())
    run(resumed, second, range(3, 6))
    assert torch.equal(second, whole)
    # The one that was saved from is not stepped along.
    assert all(torch.equal(at_save[name], value) for name, value in optimizer.state[first].items())


def test_state_of_another_precision_is_refused():
    saved = {}
    for precision in ("master", "stochastic", "none"):
        parameter = weights(16)
        optimizer = make_optimizer([parameter], config_of(precision))
        run(optimizer, parameter, range(1))
        saved[precision] = optimizer.state_dict()
    for made, loaded in [
        ("master", "stochastic"),
        ("stochastic", "master"),
        ("stochastic", "none"),
    ]:
        optimizer = make_optimizer([weights(16)], config_of(made))
        with pytest.raises(CheckpointError, match="the update_precision that the state was saved"):
            optimizer.load_state_dict(saved[loaded])


@pytest.fixture
def model(tmp_path):
    """Loaded as a resumed one is, for what `bfloat16()` would round besides the parameters."""
    torch.manual_seed(0)
    save_tiny(tmp_path / "base")
    return load_model(tmp_path / "base", dtype=torch.bfloat16, device="cpu").eval()


def train_tiny(model, optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 40, (2, 8), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("precision", ["master", "stochastic", "none"])
def test_a_checkpoint_goes_on_bit_for_bit(precision, model, tmp_path):
    # Decay moves weights also where a gradient is 0: putting the state back must not.
    config = config_of(precision, learning_rate=1e-4, weight_decay=1.0)
    optimizer = make_optimizer(model.parameters(), config)
    train_tiny(model, optimizer, range(3))
    path = save_checkpoint(
        tmp_path, 3, model=model, tokenizer=tiny_tokenizer(), optimizer=optimizer, state={}, keep=1
    )
    train_tiny(model, optimizer, range(3, 6))
    resumed = load_model(path, dtype=torch.bfloat16, device="cpu").eval()
    at_save = copy.deepcopy(resumed.state_dict())
    second = make_optimizer(resumed.parameters(), config)
    load_optimizer(path, resumed, second)
    assert all(torch.equal(at_save[name], value) for name, value in resumed.state_dict().items())
    assert second.param_groups[0]["lr"] == 1e-4
    train_tiny(resumed, second, range(3, 6))
    state = resumed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert any(not torch.equal(state[name], value) for name, value in at_save.items())


@pytest.mark.parametrize(
    "saved, loaded, words",
    [
        ("stochastic", "master", "this optimizer has exp_avg, exp_avg_sq, master, step"),
        ("master", "stochastic", "holds exp_avg, exp_avg_sq, master, step of"),
        ("none", "stochastic", "is torch.bfloat16 .* expected torch.float32"),
    ],
)
def test_a_checkpoint_of_another_precision_is_refused(saved, loaded, words, model, tmp_path):
    optimizer = make_optimizer(model.parameters(), config_of(saved))
    train_tiny(model, optimizer, range(1))
    path = save_checkpoint(
        tmp_path, 1, model=model, tokenizer=tiny_tokenizer(), optimizer=optimizer, state={}, keep=1
    )
    with pytest.raises(CheckpointError, match=words):
        load_optimizer(path, model, make_optimizer(model.parameters(), config_of(loaded)))


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_chunks_do_not_change_the_result(precision, monkeypatch):
    """Large parameters in rows, small ones together, one without a gradient, float32 between."""
    shapes = [(64, 32), (3,), (), (128, 64), (5, 7), (0, 4)]

    def trained(chunk: int) -> list[Tensor]:
        monkeypatch.setattr(optimizer_module, "CHUNK", chunk)
        generator = torch.Generator().manual_seed(0)
        parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16())
            for shape in shapes
        ]
        parameters[0].data = parameters[0].data.T
        parameters += [weights(64, torch.float32), weights(64)]
        optimizer = make_optimizer(parameters, config_of(precision, learning_rate=1e-3))
        for step in range(3):
            for parameter in parameters[:-1]:
                parameter.grad = gradient(parameter, step).to(parameter.grad_dtype)
            optimizer.step()
        assert torch.equal(parameters[-1], weights(64))
        assert optimizer.state[parameters[0]]["step"] == 3
        return parameters

    for whole, cut in zip(trained(2**24), trained(512), strict=True):
        if precision == "master" or whole.dtype == torch.float32:
            assert torch.equal(whole, cut)
        else:
            # Other noise, as many rows are drawn apart: three times to one of two neighbours.
            # 0.004 covers a weight that comes back to 0 from where the spacing was wider.
            apart = (whole.double() - cut.double()).abs()
            assert (apart <= 3 * BF16_EPS * (whole.double().abs() + 0.004)).all()


def test_a_chunk_is_no_larger_than_it_says(monkeypatch):
    monkeypatch.setattr(optimizer_module, "CHUNK", 512)
    parameters = [torch.nn.Parameter(torch.ones(100, 32).bfloat16()), weights(300), weights(300)]
    optimizer = make_optimizer(parameters, config_of())
    sizes = []
    real = optimizer_module.adamw

    def spy(pieces, *arguments, **options):
        sizes.append(sum(piece.numel() for piece in pieces))
        real(pieces, *arguments, **options)

    monkeypatch.setattr(optimizer_module, "adamw", spy)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter, dtype=parameter.grad_dtype)
    optimizer.step()
    assert sum(sizes) == 3800
    assert max(sizes) <= 512


def test_float32_parameters_have_torch_s_adamw():
    for precision in ("master", "stochastic", "none"):
        optimizer = make_optimizer([weights(8, torch.float32)], config_of(precision))
        assert type(optimizer) is torch.optim.AdamW
    assert type(make_optimizer([weights(8)], config_of("none"))) is torch.optim.AdamW
    assert type(make_optimizer([weights(8)], config_of())) is RoundedAdamW


def test_a_float32_parameter_beside_bfloat16_ones_is_torch_s_bit_for_bit():
    beside, alone = weights(4099, torch.float32), weights(4099, torch.float32)
    optimizer = make_optimizer([weights(8), beside], config_of(weight_decay=0.1))
    oracle = torch.optim.AdamW([alone], lr=RATE, weight_decay=0.1)
    assert type(optimizer) is RoundedAdamW
    run(optimizer, beside, range(4))
    run(oracle, alone, range(4))
    assert torch.equal(beside, alone)
    assert "master" not in optimizer.state[beside]
    for name, value in oracle.state[alone].items():
        assert torch.equal(optimizer.state[beside][name], value)


def nbytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """Bytes a number of a parameter, its gradient and all kept for it, besides the step count."""
    model = SimpleNamespace(named_parameters=lambda: [("p", parameter)])
    state = optimizer_tensors(model, optimizer)
    kept = [value.nbytes for name, value in state.items() if name != "p/step"]
    return (parameter.nbytes + parameter.grad.nbytes + sum(kept)) / parameter.numel()


@pytest.mark.parametrize(
    "precision, dtype, expected",
    [
        ("master", torch.bfloat16, 18),
        ("stochastic", torch.bfloat16, 12),
        ("none", torch.bfloat16, 8),
        ("master", torch.float32, 16),
    ],
)
def test_bytes_a_parameter(precision, dtype, expected):
    parameter = weights(4096, dtype)
    config = config_of(precision, dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    optimizer = make_optimizer([parameter], config)
    run(optimizer, parameter, range(1))
    assert nbytes(optimizer, parameter) == expected
    both = parameter.element_size() + parameter.grad.element_size()
    assert state_bytes([parameter], config) == 4096 * (expected - both)


def test_gradients_of_many_rows_add_up_in_float32_beside_a_master():
    torch.manual_seed(0)
    model = tiny_model().bfloat16().eval()
    exact = tiny_model().double().eval()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    completions = torch.randint(3, 50, (256, 9)).tolist()
    group = Group(prompt_ids=[4, 5, 6], completion_ids=completions, advantages=torch.randn(256))
    grpo_backward(exact, [group])

    def error(rows: int) -> float:
        model.zero_grad(set_to_none=True)
        grpo_backward(model, [group], share_prompts="off", token_budget=11 * 256 // rows)
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        return sum(float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs)

    one_row, rounded = error(1), error(128)
    model.zero_grad(set_to_none=True)
    make_optimizer(model.parameters(), config_of("master"))
    assert error(128) < 1.1 * one_row < 0.7 * rounded


def test_a_tied_head_is_stepped_once():
    torch.manual_seed(0)
    model = tiny_model(tie_word_embeddings=True).bfloat16()
    head = model.lm_head.weight
    assert head is model.model.embed_tokens.weight
    optimizer = make_optimizer(model.parameters(), config_of())
    train_tiny(model, optimizer, range(2))
    assert len(optimizer.state) == len(list(model.parameters()))
    assert optimizer.state[head]["step"] == 2
    assert torch.equal(model.model.embed_tokens.weight, optimizer.state[head]["master"].bfloat16())


def test_only_the_adapters_of_a_lora_model_have_state():
    import peft

    torch.manual_seed(0)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model().bfloat16(), adapters, autocast_adapter_dtype=False)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model.parameters(), config_of(learning_rate=1e-3))
    train_tiny(model, optimizer, range(1))
    names = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert names == changed
    assert len(names) == 4
    assert all("lora" in name for name in names)


def test_bfloat16_gradients_are_clipped_to_the_norm_and_decay_is_decoupled():
    model = torch.nn.Linear(1024, 256, bias=False, dtype=torch.bfloat16)
    config = config_of(max_grad_norm=0.5, weight_decay=0.1, learning_rate=1e-3)
    parts = SimpleNamespace(model=model, optimizer=make_optimizer(model.parameters(), config))
    parameter = model.weight
    before = parameter.detach().double()
    parameter.grad = 10 * gradient(parameter, 0).to(parameter.grad_dtype)
    exact = parameter.grad.double().norm()
    norm = apply_gradients(config, parts, 1)["grad_norm"]
    assert norm == pytest.approx(float(exact), rel=BF16_EPS)
    clipped = parameter.grad.double()
    assert float(clipped.norm()) == pytest.approx(0.5, rel=BF16_EPS)
    master = parts.optimizer.state[parameter]["master"].double()
    # AdamW's first step is the rate, but where a gradient is not large beside eps.
    step = 1e-3 * clipped / (clipped.abs() + 1e-8)
    assert (before * (1 - 1e-4) - step - master).abs().max() < 1e-7


def test_frozen_parameters_are_left_out_and_a_closure_is_called():
    frozen, trained = weights(8).requires_grad_(False), weights(8)
    optimizer = make_optimizer([frozen, trained], config_of())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]

    def closure() -> Tensor:
        loss = trained.float().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == weights(8).float().sum()


def test_float16_has_a_master_and_no_stochastic_rounding():
    parameter = weights(64, torch.float16)
    run(make_optimizer([parameter], config_of()), parameter, range(1))
    with pytest.raises(InputError, match="expected bfloat16 or float32"):
        make_optimizer([parameter], config_of("stochastic"))


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
