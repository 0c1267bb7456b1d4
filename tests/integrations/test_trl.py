"""TRL's trainer and the drop-in from one seed: the same losses, gradients, metrics and weights."""

import logging
import math
import re
import sys
import types

import pytest
import torch

# Puts the hosts onto the path.
from grpo_bench.hosts import PEERS
from grpo_fast.errors import ConfigError, InputError
from grpo_fast.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
# float32 rounding, through a few steps of the optimizer.
RELATIVE, ABSOLUTE = 2e-5, 2e-6
CLOCKS = ("_time", "_runtime", "_per_second")
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}
TWO_ITERATIONS = {"num_iterations": 2, "steps_per_generation": 1, "max_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_tiny(path)
    return path


def reward(completion_ids, **columns):
    """Of token ids; no answer for some, and the same for all of a group now and then."""
    return [float(sum(i % 3 for i in ids) // 4) for ids in completion_ids]


def release() -> tuple[int, int]:
    """Of the TRL that is first on the path; tests/integrations/test_trl_releases.py has others."""
    import trl

    return tuple(int(part) for part in trl.__version__.split(".")[:2])


def host_class():
    from trl import GRPOTrainer

    return GRPOTrainer


def drop_in():
    from grpo_fast.integrations.trl import GRPOTrainer

    return GRPOTrainer


def trainer_of(kind, folder, *, peft_config=None, rollout_func=None, adjust=None, **options):
    from datasets import Dataset
    from trl import GRPOConfig

    options = {
        "output_dir": str(folder / "unused"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "seed": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    # Adapters begin at random, and before 1.10 TRL did not seed them.
    torch.manual_seed(1)
    prompts = Dataset.from_dict({"prompt": ["ab", "abcdefgh", "12", "x"] * 4})
    trainer = kind(
        str(folder),
        reward,
        GRPOConfig(**options),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        **({} if rollout_func is None else {"rollout_func": rollout_func}),
    )
    if adjust is not None:
        adjust(trainer)
    return trainer


def trained(kind, folder, **options):
    trainer = trainer_of(kind, folder, **options)
    trainer.train()
    return trainer


def assert_same_training(folder, *, depth="packed", **options):
    """Whole logs, metric by metric, and the weights at the end."""
    theirs = trained(host_class(), folder, **options)
    ours = trained(drop_in(), folder, **options)
    assert ours._taken == depth
    assert len(theirs.state.log_history) == len(ours.state.log_history)
    for expected, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name.endswith(CLOCKS):
                continue
            same = value == found[name] or math.isclose(
                found[name], value, rel_tol=RELATIVE, abs_tol=ABSOLUTE
            )
            assert same, f"step {expected['step']}: {name} {found[name]}, TRL has {value}"
    weights = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-3, atol=1e-4)
    return theirs, ours


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
def test_training_is_trl_s(folder, options):
    assert_same_training(folder, **options)


def test_twenty_steps_are_trl_s(folder):
    assert_same_training(folder, max_steps=20, learning_rate=1e-3, beta=0.04)


@pytest.mark.parametrize("options", [{"entropy_coef": 0.1}, {"loss_type": "grpo", "beta": 0.04}])
def test_a_quantile_of_the_micro_batch_takes_the_fused_loss_alone(folder, options):
    options |= {"top_entropy_quantile": 0.3, "gradient_accumulation_steps": 2}
    assert_same_training(folder, depth="fused", **options)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "sapo", "luspo", "vespo"])
def test_the_fused_loss_alone_is_trl_s(folder, monkeypatch, loss_type):
    monkeypatch.setattr(drop_in(), "depth", "fused")
    options = TWO_ITERATIONS | {"loss_type": loss_type, "beta": 0.04}
    options["mask_truncated_completions"] = True
    over_padding = loss_type == "luspo" and release() < (1, 10)
    assert_same_training(folder, depth="own" if over_padding else "fused", **options)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_adapters_train_as_with_trl(folder, beta):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    _, ours = assert_same_training(folder, peft_config=config, beta=beta, **TWO_ITERATIONS)
    assert all("lora" in name for name, x in ours.model.named_parameters() if x.requires_grad)


def rollout(prompts, trainer):
    """Completions of some length with words of an environment in them, and what the sampler said
    of each token; one that it did not score."""
    source = torch.Generator().manual_seed(trainer.state.global_step)
    encoded = trainer.processing_class(prompts)["input_ids"]
    completions, masks, logprobs = [], [], []
    for k, _ in enumerate(prompts):
        length = int(torch.randint(2, 9, (1,), generator=source))
        completions.append(torch.randint(3, 40, (length,), generator=source).tolist())
        masks.append([int(t != 1 and k != 3) for t in range(length)])
        noise = 0.2 * torch.randn(length, generator=source)
        logprobs.append((noise - 3.9).tolist())
    # Up to 1.10 TRL's loss is NaN where a token was not scored.
    if release() > (1, 10):
        logprobs[0][0] = math.nan
    return {
        "prompt_ids": encoded,
        "completion_ids": completions,
        "logprobs": logprobs,
        "env_mask": masks,
    }


def with_sampler(**options):
    """The trainer believes in vLLM from here on, whose log-probs the rollout hands over."""

    def adjust(trainer):
        trainer.use_vllm = trainer.args.use_vllm = True
        trainer._last_loaded_step = trainer.state.global_step
        trainer.vllm_generation = types.SimpleNamespace(sync_weights=lambda: None)
        for name, value in options.items():
            setattr(trainer, name, value)
            setattr(trainer.args, name, value)
        if hasattr(trainer, "_decide"):
            trainer._taken = trainer._decide()

    return adjust


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
def test_tokens_of_tools_are_masked_as_in_trl(folder, loss_type):
    assert_same_training(
        folder, rollout_func=rollout, loss_type=loss_type, beta=0.04, **TWO_ITERATIONS
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
def test_the_sampler_s_correction_is_trl_s(folder, loss_type, mode):
    adjust = with_sampler(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.2,
        vllm_importance_sampling_clip_min=0.5,
    )
    theirs, _ = assert_same_training(
        folder, rollout_func=rollout, adjust=adjust, loss_type=loss_type
    )
    assert "sampling/importance_sampling_ratio/mean" in theirs.state.log_history[0]


def test_a_group_without_a_difference_still_is_measured(folder, monkeypatch):
    monkeypatch.setitem(
        globals(), "reward", lambda completion_ids, **_: [1.0] * len(completion_ids)
    )
    theirs, _ = assert_same_training(folder, weight_decay=5.0)
    assert theirs.state.log_history[0]["frac_reward_zero_std"] == 1.0
    assert theirs.state.log_history[0]["entropy"] > 1.0


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
    folder, options, words, caplog, scored
):
    caplog.set_level(logging.INFO, "grpo_fast")
    _, ours = assert_same_training(folder, depth="kernel", **options)
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


def test_a_micro_batch_with_images_has_trl_s_loss(folder, caplog, scored):
    options = {"adjust": with_images, "max_steps": 4, "gradient_accumulation_steps": 2}
    assert_same_training(folder, **options)
    images = [line for line in lines_about_trl(caplog) if "images" in line]
    assert len(images) == 1
    assert len(scored) == 4


def test_the_kernel_alone_is_trl_s(folder, monkeypatch, scored):
    monkeypatch.setattr(drop_in(), "depth", "kernel")
    assert_same_training(folder, depth="kernel", beta=0.04, **TWO_ITERATIONS)
    assert len(scored) == 4 + 2 * 2, "policy; old and reference of two generations"


def test_a_registered_head_and_the_kernel_depth_are_one(folder, monkeypatch, scored):
    from grpo_fast.integrations import trl_head

    monkeypatch.setattr(drop_in(), "depth", "kernel")
    theirs = trained(host_class(), folder)
    trl_head.register()
    try:
        ours = trained(drop_in(), folder)
    finally:
        trl_head.unregister()
    assert len(scored) == 3
    assert ours.state.log_history[0]["loss"] == pytest.approx(theirs.state.log_history[0]["loss"])


def test_a_head_that_something_else_took_is_left_there(folder, monkeypatch, caplog, scored):
    from trl.trainer import utils

    theirs = utils._ChunkedLogProbFunction
    other = type("Other", (theirs,), {"__module__": "elsewhere"})
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", other)
    assert trained(drop_in(), folder, delta=1.1)._taken == "own"
    assert "is already that of elsewhere: undo that integration" in caplog.text
    assert utils._ChunkedLogProbFunction is other
    assert not scored


def test_a_quantised_head_is_left_to_trl(folder, caplog):
    trainer = trainer_of(drop_in(), folder)
    quantised = trainer.model.lm_head.weight.detach().to(torch.int8)
    trainer.model.lm_head.weight = torch.nn.Parameter(quantised, requires_grad=False)
    assert trainer._decide() == "own"
    assert "is quantised (Parameter, torch.int8)" in caplog.text


def test_zero_3_is_left_to_trl(folder, caplog):
    trainer = trainer_of(drop_in(), folder)
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


def test_an_adapter_on_the_head_is_refused_by_trl(folder):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        trainer_of(drop_in(), folder, peft_config=config)


def test_liger_s_layers_come_without_its_loss(folder):
    """Its loss went from TRL before 1.16, where the option is about layers."""
    with pytest.warns(FutureWarning, match="use_liger_kernel"):
        trainer = trainer_of(drop_in(), folder, use_liger_kernel=True)
    assert trainer._taken == "packed"
    assert trainer.args.liger_kernel_config == {"fused_linear_cross_entropy": False}


def test_a_depth_that_there_is_not_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(drop_in(), "depth", "deep")
    words = "GRPOTrainer.depth = 'deep' is not known: choose packed, fused, kernel, own"
    with pytest.raises(ConfigError, match=re.escape(words)):
        trainer_of(drop_in(), folder)


def test_the_log_names_the_depth_once(folder, caplog):
    caplog.set_level(logging.INFO, "grpo_fast")
    trained(drop_in(), folder)
    trained(drop_in(), folder, top_entropy_quantile=0.5)
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


def test_depth_own_turns_it_off(folder, monkeypatch):
    monkeypatch.setattr(drop_in(), "depth", "own")
    assert_same_training(folder, depth="own")


def gradients_of_one_step(kind, folder, **options):
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
    trainer = trained(kind, folder, adjust=adjust, beta=0.04, **options)
    return torch.cat([x.reshape(-1).double() for x in found.values()]), dtypes, trainer


@pytest.mark.parametrize("depth", ["packed", "fused", "kernel"])
def test_bfloat16_is_as_exact_as_trl_s(folder, monkeypatch, depth):
    """Against float32, which is four digits closer to the truth than either."""
    monkeypatch.setattr(drop_in(), "depth", depth)
    exact, dtypes, _ = gradients_of_one_step(host_class(), folder)
    assert dtypes == {torch.float32}
    theirs, dtypes, stock = gradients_of_one_step(host_class(), folder, bf16=True)
    assert dtypes == {torch.bfloat16}
    found, dtypes, trainer = gradients_of_one_step(drop_in(), folder, bf16=True)
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


def test_after_an_error_in_a_micro_batch_no_gradient_is_left(folder, monkeypatch):
    from grpo_fast import step

    row_loss, rows = step._row_loss, []

    def failing(*arguments):
        rows.append(arguments)
        if len(rows) == 4:
            raise RuntimeError("out of memory")
        return row_loss(*arguments)

    monkeypatch.setattr(step, "_row_loss", failing)
    monkeypatch.setattr(step, "group_budget", lambda groups, device: 40)
    trainer = trainer_of(drop_in(), folder, gradient_accumulation_steps=4)
    with pytest.raises(RuntimeError, match="out of memory") as error:
        trainer.train()
    assert error.value.__notes__ == [
        "grpo-fast dropped all gradients of this optimizer step: begin it again"
    ]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("depth", ["packed", "fused", "kernel", "own"])
def test_the_profiler_sees_the_passes_that_it_sees_in_trl(folder, monkeypatch, depth):
    from trl.extras.profiling import ProfilingContext

    names: list[str] = []
    monkeypatch.setattr(drop_in(), "depth", depth)
    monkeypatch.setattr(ProfilingContext, "_log_metrics", lambda self, _: names.append(self.name))
    passes = []
    for kind in (host_class(), drop_in()):
        names.clear()
        trained(kind, folder, beta=0.04, **TWO_ITERATIONS)
        passes.append(sorted(names))
    assert passes[0] == passes[1]
    assert "GRPOTrainer._get_per_token_logps_and_entropies" in passes[0]


def test_prompts_are_forwarded_once(folder, monkeypatch):
    """Otherwise all of the above could be TRL's own code."""
    import grpo_fast.integrations.trl as integration

    seen = []

    def spied(model, groups, **options):
        seen.append(groups)
        return original(model, groups, **options)

    original = integration.grpo_backward
    monkeypatch.setattr(integration, "grpo_backward", spied)
    trained(drop_in(), folder, max_steps=1)
    ((first, second),) = seen
    assert [len(first.completion_ids), len(second.completion_ids)] == [4, 4]


@pytest.mark.parametrize(
    "options, calls",
    [
        ({"loss_type": "dapo"}, [[4, 4]] * 2),
        ({"loss_type": "dapo", "num_iterations": 2}, [[4, 4]] * 2),
        # Two optimizer steps a generation: a group is whole only by chance.
        ({"loss_type": "grpo", "steps_per_generation": 4}, [8] * 2),
        # The means of a micro-batch are nobody else's.
        ({"loss_type": "bnpo"}, [4] * 4),
        ({"loss_type": "dapo", "entropy_coef": 0.1}, [4] * 4),
    ],
    ids=str,
)
def test_an_optimizer_step_is_packed_as_one(folder, monkeypatch, options, calls):
    """TRL spreads its groups over micro-batches of four."""
    import grpo_fast.integrations.trl as integration

    seen, original = [], integration.grpo_backward

    def spied(model, groups, **more):
        seen.append(sorted(len(group.completion_ids) for group in groups))
        return original(model, groups, **more)

    monkeypatch.setattr(integration, "grpo_backward", spied)
    micro = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    # Adam makes steps of what gradients near 0 are rounded by.
    micro |= {"learning_rate": 1e-3}
    assert_same_training(folder, **micro, **options)
    assert [
        step if isinstance(call, list) else sum(step)
        for step, call in zip(seen, calls, strict=True)
    ] == (calls)
    assert len(seen) == len(calls)


def test_what_was_made_ahead_is_gone_with_an_error(folder, monkeypatch):
    trainer = trainer_of(
        drop_in(), folder, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    backward = trainer.accelerator.backward
    calls = []

    def failing(loss, **more):
        calls.append(loss)
        if len(calls) == 1:
            raise RuntimeError("of a test")
        return backward(loss, **more)

    trainer.accelerator.backward = failing
    with pytest.raises(RuntimeError, match="of a test"):
        trainer.train()
    assert not trainer._ahead


def test_a_micro_batch_that_changes_after_its_gradient_was_made_is_an_error(folder):
    trainer = trainer_of(
        drop_in(), folder, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda batch: (
        prepare(batch) if trainer._step % 2 == 0 else dict(prepare(batch))
    )
    with pytest.raises(InputError, match="change them all before that one"):
        trainer.train()


def test_a_loss_that_is_scaled_afterwards_is_an_error(folder):
    trainer = trainer_of(drop_in(), folder)
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **more: backward(loss * 0.5, **more)
    with pytest.raises(InputError, match="multiplied by 0.5 after compute_loss"):
        trainer.train()


@pytest.mark.parametrize("version", ["1.8.2", "1.17.0", "2.0.0", "0.29.1"])
def test_other_versions_of_trl_are_refused(monkeypatch, version):
    import trl

    from grpo_fast.integrations.trl_versions import host

    monkeypatch.setattr(trl, "__version__", version)
    words = f"trl is {version}, grpo_fast.integrations.trl is written for trl >= 1.9, < 1.17"
    with pytest.raises(ConfigError, match=re.escape(words)):
        host()


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    from grpo_fast.integrations.trl_versions import host

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'trl>=1.9,<1.17'")):
        host()


def test_the_host_is_the_installed_one():
    assert issubclass(drop_in(), host_class())
    assert PEERS.is_dir()
