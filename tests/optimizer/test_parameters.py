"""Which parameters are stepped, in which pieces, and the bytes and the gradients they have."""

import copy
from types import SimpleNamespace

import pytest
import torch
from small_updates import BF16_EPS, RATE, config_of, gradient, nbytes, run, train_tiny, weights
from torch import Tensor

from grpo_fast import Group, InputError, grpo_backward
from grpo_fast import optimizer as optimizer_module
from grpo_fast.optimizer import RoundedAdamW, make_optimizer, state_bytes
from grpo_fast.tiny import tiny_model
from grpo_fast.trainer import apply_gradients


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
