"""A resumed optimizer goes on bit for bit, and refuses the state of another precision."""

import copy

import pytest
import torch
from small_updates import config_of, run, train_tiny, weights

from grpo_fast import CheckpointError
from grpo_fast.checkpoint import load_optimizer, save_checkpoint
from grpo_fast.model import load_model
from grpo_fast.optimizer import make_optimizer
from grpo_fast.tiny import tiny_tokenizer


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
