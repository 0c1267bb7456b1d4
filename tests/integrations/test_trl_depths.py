"""How deep the drop-in takes TRL's trainer over, and the one line that says so."""

import logging
import re
import types

import pytest
import torch
from trl_training import (
    MARKS,
    TWO_ITERATIONS,
    assert_same_training,
    drop_in,
    host_class,
    trained,
    trainer_of,
)

from grpo_fast.errors import ConfigError
from grpo_fast.tiny import tiny_tokenizer

pytestmark = MARKS
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}


def lines_about_trl(caplog):
    return [record.getMessage() for record in caplog.records if "TRL" in record.getMessage()]


@pytest.fixture
def scored(monkeypatch):
    """Rows that our head scored, call by call."""
    from grpo_fast.integrations import trl_head

    seen, score = [], trl_head._score

    def spied(hidden, *more):
        seen.append(len(hidden))
        return score(hidden, *more)

    monkeypatch.setattr(trl_head, "_score", spied)
    return seen


def scaled_by_fp16(trainer):
    """fp16 needs a GPU; its scaler, which is what multiplies the loss, does not."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    if hasattr(trainer, "_decide"):
        trainer._taken = trainer._decide()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_type": "cispo"}, "Set epsilon_high = 5.0"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 patches the head"),
        ({"delta": 1.1}, "delta = 1.1"),
        (COMPILED, "torch_compile"),
        ({"adjust": scaled_by_fp16}, "fp16 scales the loss"),
    ],
    ids=str,
)
def test_where_the_loss_is_trl_s_the_head_is_ours_and_one_line_says_so(
    model, options, words, caplog, scored
):
    caplog.set_level(logging.INFO, "grpo_fast")
    _, ours = assert_same_training(model, depth="kernel", **options)
    *_, line = lines_about_trl(caplog)
    assert "depth 'kernel'" in line
    assert words in line
    assert len(scored) == ours.args.max_steps


def test_experts_train_with_their_auxiliary_loss(tmp_path, caplog, scored):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    for part in (Qwen3MoeForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path)
    theirs, _ = assert_same_training(tmp_path, depth="kernel", gradient_accumulation_steps=2)
    assert theirs.state.log_history[0]["aux_loss"] > 0
    assert "an auxiliary loss of the experts' router" in caplog.text
    assert scored


def with_images(trainer):
    """Every second micro-batch has an image, which a text model reads no pixel of."""
    prepare = trainer._prepare_inputs

    def prepared(batch):
        prepare(batch)
        batches = trainer._buffered_inputs
        for k, inputs in enumerate(batches):
            if k % 2 and "num_images" not in inputs:
                size = len(inputs["prompt_ids"])
                images = {"pixel_values": torch.zeros(size, 3), "num_images": [1] * size}
                batches[k] = inputs | images
        return batches[trainer._step % len(batches)]

    trainer._prepare_inputs = prepared


def test_a_micro_batch_with_images_has_trl_s_loss(model, caplog, scored):
    options = {"adjust": with_images, "max_steps": 4, "gradient_accumulation_steps": 2}
    assert_same_training(model, **options)
    images = [line for line in lines_about_trl(caplog) if "images" in line]
    assert len(images) == 1
    assert len(scored) == 4


def test_the_kernel_alone_is_trl_s(model, monkeypatch, scored):
    monkeypatch.setattr(drop_in(), "depth", "kernel")
    assert_same_training(model, depth="kernel", beta=0.04, **TWO_ITERATIONS)
    assert len(scored) == 4 + 2 * 2, "policy; old and reference of two generations"


def test_a_registered_head_and_the_kernel_depth_are_one(model, monkeypatch, scored):
    from grpo_fast.integrations import trl_head

    monkeypatch.setattr(drop_in(), "depth", "kernel")
    theirs = trained(host_class(), model)
    trl_head.register()
    try:
        ours = trained(drop_in(), model)
    finally:
        trl_head.unregister()
    assert len(scored) == 3
    assert ours.state.log_history[0]["loss"] == pytest.approx(theirs.state.log_history[0]["loss"])


def test_a_head_that_something_else_took_is_left_there(model, monkeypatch, caplog, scored):
    from trl.trainer import utils

    theirs = utils._ChunkedLogProbFunction
    other = type("Other", (theirs,), {"__module__": "elsewhere"})
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", other)
    assert trained(drop_in(), model, delta=1.1)._taken == "own"
    assert "is already that of elsewhere: undo that integration" in caplog.text
    assert utils._ChunkedLogProbFunction is other
    assert not scored


def test_a_quantised_head_is_left_to_trl(model, caplog):
    trainer = trainer_of(drop_in(), model)
    quantised = trainer.model.lm_head.weight.detach().to(torch.int8)
    trainer.model.lm_head.weight = torch.nn.Parameter(quantised, requires_grad=False)
    assert trainer._decide() == "own"
    assert "is quantised (Parameter, torch.int8)" in caplog.text


def test_zero_3_is_left_to_trl(model, caplog):
    trainer = trainer_of(drop_in(), model)
    trainer.is_deepspeed_enabled = True
    depths = []
    for stage in (2, 3):
        plugin = types.SimpleNamespace(zero_stage=stage)
        state = types.SimpleNamespace(deepspeed_plugin=plugin)
        trainer.accelerator = types.SimpleNamespace(
            state=state,
            num_processes=1,
            distributed_type="DEEPSPEED",
            scaler=None,
            unwrap_model=lambda model: model,
        )
        depths.append(trainer._decide())
    assert depths == ["kernel", "own"]
    assert "ZeRO stage 3 holds the head" in caplog.text


def test_an_adapter_on_the_head_is_refused_by_trl(model):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        trainer_of(drop_in(), model, peft_config=config)


def test_liger_s_layers_come_without_its_loss(model):
    """Its loss went from TRL before 1.16, where the option is about layers."""
    with pytest.warns(FutureWarning, match="use_liger_kernel"):
        trainer = trainer_of(drop_in(), model, use_liger_kernel=True)
    assert trainer._taken == "packed"
    assert trainer.args.liger_kernel_config == {"fused_linear_cross_entropy": False}


def test_a_depth_that_there_is_not_is_an_error(model, monkeypatch):
    monkeypatch.setattr(drop_in(), "depth", "deep")
    words = "GRPOTrainer.depth = 'deep' is not known: choose packed, fused, kernel, own"
    with pytest.raises(ConfigError, match=re.escape(words)):
        trainer_of(drop_in(), model)


def test_the_log_names_the_depth_once(model, caplog):
    caplog.set_level(logging.INFO, "grpo_fast")
    trained(drop_in(), model)
    trained(drop_in(), model, top_entropy_quantile=0.5)
    lines = [record.getMessage() for record in caplog.records if "TRL" in record.getMessage()]
    assert len(lines) == 2
    assert "packed rows, shared prompts and the fused loss" in lines[0]
    assert "top_entropy_quantile" in lines[1]


def test_absolute_positions_are_not_packed(tmp_path, caplog):
    """TRL counts padding on the left in them, so a packed row would be another model's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    caplog.set_level(logging.INFO, "grpo_fast")
    tokenizer = tiny_tokenizer()
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=1, **size
        )
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    assert_same_training(tmp_path, depth="fused")
    assert "its positions are absolute" in caplog.text


def test_depth_own_turns_it_off(model, monkeypatch):
    monkeypatch.setattr(drop_in(), "depth", "own")
    assert_same_training(model, depth="own")
