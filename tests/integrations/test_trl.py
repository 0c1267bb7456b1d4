"""TRL's trainer and the drop-in from one seed: the same losses, gradients, metrics and weights."""

import pytest
import torch
from trl_training import (
    MARKS,
    TWO_ITERATIONS,
    assert_same_training,
    drop_in,
    host_class,
    release,
    rollout,
    trained,
    with_sampler,
)

from grpo_fast.tiny import tiny_model, tiny_tokenizer

pytestmark = MARKS


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo"},
        {"loss_type": "grpo", "gradient_accumulation_steps": 2},
        {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
        {"loss_type": "dapo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"loss_type": "dr_grpo", "gradient_accumulation_steps": 2},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo", **TWO_ITERATIONS},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", **TWO_ITERATIONS},
        {"loss_type": "vespo", **TWO_ITERATIONS},
        {"loss_type": "grpo", "beta": 0.04},
        {"loss_type": "dapo", "beta": 0.04, **TWO_ITERATIONS},
        {"loss_type": "vespo", "beta": 0.04, **TWO_ITERATIONS},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", **TWO_ITERATIONS},
        {"loss_type": "grpo", "delta": 1.3, "epsilon": 0.01, **TWO_ITERATIONS},
        {"loss_type": "dapo", "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"temperature": 0.7, **TWO_ITERATIONS},
        {"loss_type": "grpo", "mask_truncated_completions": True},
        {"loss_type": "dapo", "mask_truncated_completions": True},
        {"entropy_coef": 0.1, "gradient_accumulation_steps": 2},
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 5.0},
        {"off_policy_mask_threshold": 0.0, **TWO_ITERATIONS},
        {"gradient_checkpointing": True},
        {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4},
    ],
    ids=str,
)
def test_training_is_trl_s(model, options):
    assert_same_training(model, **options)


def test_twenty_steps_are_trl_s(model):
    assert_same_training(model, max_steps=20, learning_rate=1e-3, beta=0.04)


@pytest.mark.parametrize("options", [{"entropy_coef": 0.1}, {"loss_type": "grpo", "beta": 0.04}])
def test_a_quantile_of_the_micro_batch_takes_the_fused_loss_alone(model, options):
    options |= {"top_entropy_quantile": 0.3, "gradient_accumulation_steps": 2}
    assert_same_training(model, depth="fused", **options)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "sapo", "luspo", "vespo"])
def test_the_fused_loss_alone_is_trl_s(model, monkeypatch, loss_type):
    monkeypatch.setattr(drop_in(), "depth", "fused")
    options = TWO_ITERATIONS | {"loss_type": loss_type, "beta": 0.04}
    options["mask_truncated_completions"] = True
    over_padding = loss_type == "luspo" and release() < (1, 10)
    assert_same_training(model, depth="own" if over_padding else "fused", **options)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_adapters_train_as_with_trl(model, beta):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    _, ours = assert_same_training(model, peft_config=config, beta=beta, **TWO_ITERATIONS)
    assert all("lora" in name for name, x in ours.model.named_parameters() if x.requires_grad)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
def test_tokens_of_tools_are_masked_as_in_trl(model, loss_type):
    assert_same_training(
        model, rollout_func=rollout, loss_type=loss_type, beta=0.04, **TWO_ITERATIONS
    )


@pytest.mark.parametrize(
    "loss_type, mode",
    [
        ("dapo", "token_truncate"),
        ("dapo", "token_mask"),
        ("grpo", "sequence_truncate"),
        ("grpo", "sequence_mask"),
        ("vespo", "token_truncate"),
    ],
)
def test_the_sampler_s_correction_is_trl_s(model, loss_type, mode):
    adjust = with_sampler(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.2,
        vllm_importance_sampling_clip_min=0.5,
    )
    theirs, _ = assert_same_training(
        model, rollout_func=rollout, adjust=adjust, loss_type=loss_type
    )
    assert "sampling/importance_sampling_ratio/mean" in theirs.state.log_history[0]


def test_a_group_without_a_difference_still_is_measured(model):
    def same(completion_ids, **columns):
        return [1.0] * len(completion_ids)

    theirs, _ = assert_same_training(model, reward=same, weight_decay=5.0)
    assert theirs.state.log_history[0]["frac_reward_zero_std"] == 1.0
    assert theirs.state.log_history[0]["entropy"] > 1.0


def gradients_of_one_step(kind, model, **options):
    """(gradients, dtypes that a layer gave) of a step on completions that are always the same."""
    from transformers import TrainerCallback

    found, dtypes = {}, set()

    class Read(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **more):
            found.update({name: x.grad.clone() for name, x in model.named_parameters()})

    def adjust(trainer):
        trainer.add_callback(Read())
        layer = trainer.model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))

    options = {"rollout_func": rollout, "max_steps": 1, "max_grad_norm": 0.0} | options
    trainer = trained(kind, model, adjust=adjust, beta=0.04, **options)
    return torch.cat([x.reshape(-1).double() for x in found.values()]), dtypes, trainer


@pytest.mark.parametrize("depth", ["packed", "fused", "kernel"])
def test_bfloat16_is_as_exact_as_trl_s(model, monkeypatch, depth):
    """Against float32, which is four digits closer to the truth than either."""
    monkeypatch.setattr(drop_in(), "depth", depth)
    exact, dtypes, _ = gradients_of_one_step(host_class(), model)
    assert dtypes == {torch.float32}
    theirs, dtypes, stock = gradients_of_one_step(host_class(), model, bf16=True)
    assert dtypes == {torch.bfloat16}
    found, dtypes, trainer = gradients_of_one_step(drop_in(), model, bf16=True)
    assert dtypes == {torch.bfloat16}
    assert trainer._taken == depth
    error, there = ((x - exact).norm().item() for x in (found, theirs))
    assert error <= 2 * there <= 0.1 * exact.norm().item()
    assert trainer.state.log_history[0].keys() == stock.state.log_history[0].keys()
    loss, expected = (x.state.log_history[0]["loss"] for x in (trainer, stock))
    assert loss == pytest.approx(expected, abs=0.01)


def test_a_masked_token_without_a_probability_leaves_the_metrics_whole(tmp_path):
    """What no loss holds is 0 here and -100 in the pass before: a ratio of inf, times 0."""
    torch.manual_seed(0)
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight.data *= 400
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(tmp_path)
    options = {"rollout_func": rollout, "beta": 0.04, "learning_rate": 0.0, **TWO_ITERATIONS}
    theirs, ours = (trained(kind, tmp_path, **options) for kind in (host_class(), drop_in()))
    for expected, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        for name in ("loss", "kl", "entropy", "clip_ratio/region_mean"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name
