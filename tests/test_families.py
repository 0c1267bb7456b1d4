"""A packed step of every model family is a loop over its sequences: loss, log-probs and the
gradient of every parameter."""

import dataclasses

import pytest
import torch

from grpo_fast import ConfigError, LossConfig, reference
from grpo_fast.groups import Group
from grpo_fast.model import check_head, head
from grpo_fast.step import StepOutput, group_logprobs, grpo_backward

# Each family has what sets it apart: grouped heads, biases, query norms, softcaps, windows, scaled
# embeddings, layers without positions, tied and untied heads.
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
# (class, what differs from SMALL)
FAMILIES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 6}),
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}),
    "gemma2_window": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}),
    "gemma3": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}),
    "gemma3_window": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
    ),
}
WINDOWS = ("mistral_window", "gemma2_window", "gemma3_window")


def family_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A model of FAMILIES in evaluation mode."""
    import transformers

    kind, options = FAMILIES[name]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, kind + suffix)(**SMALL | options)
    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


# Rotary embeddings are made in float32 whatever the model is, hence not 1e-12.
TOLERANCE = 1e-6
CONFIG = LossConfig(loss_type="dapo", beta=0.1)


def ragged_groups(seed: int = 0, vocabulary: int = 60) -> list[Group]:
    """Long prompts, so that sharing pays; a completion of one token; one masked in part."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    made = []
    for prompt, lengths in [(9, (3, 1, 7, 4)), (5, (2, 6)), (4, (3,))]:
        completions = [ids(length) for length in lengths]
        masks = [[1] * length for length in lengths]
        masks[-1][0] = 0
        made.append(
            Group(
                prompt_ids=ids(prompt),
                completion_ids=completions,
                advantages=torch.randn(len(lengths), generator=generator),
                old_logprobs=[torch.randn(n, generator=generator) * 0.1 - 4 for n in lengths],
                ref_logprobs=[torch.randn(n, generator=generator) * 0.1 - 4 for n in lengths],
                completion_masks=masks,
            )
        )
    return made


def loop(model, groups: list[Group], config: LossConfig) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The definition: (loss, log-probs), each sequence by itself through the whole model."""
    logits, parts = [], []
    for group in groups:
        for k, completion in enumerate(group.completion_ids):
            ids = torch.tensor([[*group.prompt_ids, *completion]], device=model.device)
            logits.append(model(ids).logits[0, len(group.prompt_ids) - 1 : -1])
            parts.append((group, k))

    def cat(name):
        values = [torch.as_tensor(getattr(group, name)[k]) for group, k in parts]
        return torch.cat(values).to(model.device)

    targets = cat("completion_ids")
    lengths = [len(rows) for rows in logits]
    per_token = [torch.full((len(group.completion_ids[k]),), float(group.advantages[k]))
                 for group, k in parts]  # fmt: skip
    out = reference.grpo_loss(
        torch.cat(logits),
        targets,
        torch.cat(per_token).double().to(model.device),
        mask=cat("completion_masks").bool(),
        cu_seqlens=torch.tensor([0, *lengths], device=model.device).cumsum(0),
        old_logp=cat("old_logprobs").double(),
        ref_logp=cat("ref_logprobs").double(),
        config=config,
    )
    logps = reference.token_logprob(torch.cat(logits), targets).logp.detach()
    return out.loss.sum(), list(logps.split(lengths))


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        error = (found[name] - truth).norm()
        assert error <= tolerance * truth.norm(), f"{name}: {error / truth.norm():.1e}"


def assert_step_is_loop(model, groups, config, layout) -> tuple[StepOutput, list[torch.Tensor]]:
    """(the step's output, the loop's log-probs); the step's gradients are left in the model."""
    loss, logps = loop(model, groups, config)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    output = grpo_backward(model, groups, loss=config, **layout)
    assert float(output.loss) == pytest.approx(float(loss.detach()), rel=TOLERANCE)
    assert_same_gradients(gradients(model), expected)
    return output, logps


LAYOUTS = {
    "packed": {"share_prompts": "off", "token_budget": 40},
    "one row": {"share_prompts": "on", "token_budget": 1000},
    "rows": {"share_prompts": "on", "token_budget": 20},
    "chunks": {"share_prompts": "on", "chunking": "on", "token_budget": 17},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_step_is_a_loop_over_sequences(family, layout):
    model, groups = family_model(family), ragged_groups()
    output, logps = assert_step_is_loop(model, groups, CONFIG, layout)
    masks = [torch.tensor(mask) for group in groups for mask in group.completion_masks]
    for found, truth, mask in zip(output.logprobs, logps, masks, strict=True):
        assert torch.allclose(found.double(), truth * mask, atol=1e-6)
    for found, truth in zip(group_logprobs(model, groups, **layout), logps, strict=True):
        assert torch.allclose(found.double(), truth, atol=1e-6)


# On a GPU by its kernels and flash attention, in CI by PyTorch on a CPU.
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2_window"])
def test_in_the_dtypes_of_training_a_step_is_as_exact_as_the_loop(family, dtype, layout, device):
    groups, exact = ragged_groups(), family_model(family)
    model = family_model(family, dtype).to(device)
    # The oracle has the same rounded weights.
    exact.load_state_dict({name: x.double().cpu() for name, x in model.state_dict().items()})
    exact.zero_grad()
    loop(exact, groups, CONFIG)[0].backward()
    truth = gradients(exact)
    errors = []
    for step in (
        lambda: loop(model, groups, CONFIG)[0].backward(),
        lambda: grpo_backward(model, groups, loss=CONFIG, **layout),
    ):
        model.zero_grad()
        step()
        found = gradients(model)
        apart = sum(float((found[n].double().cpu() - x).square().sum()) for n, x in truth.items())
        errors.append(apart**0.5)
    norm = sum(float(x.square().sum()) for x in truth.values()) ** 0.5
    eager, ours = (error / norm for error in errors)
    assert ours <= 2 * eager + torch.finfo(dtype).eps, (ours, eager)


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_shorter_than_a_sequence_shares_no_prompt(family):
    model, groups = family_model(family), ragged_groups()
    output = grpo_backward(model, groups, share_prompts="on")
    alone = sum(
        len(group.prompt_ids) + len(completion) - 1
        for group in groups
        for completion in group.completion_ids
    )
    assert float(output.metrics["batch/forwarded_tokens_per_step"]) == alone


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_scaled_and_capped_heads_are_read_from_the_config(family):
    model = family_model(family, torch.float32)
    check_head(model)
    assert head(model).softcap == (30.0 if family == "gemma2" else None)


@pytest.fixture
def in_float64(monkeypatch):
    """What models compute in float32 whatever they are stays float64: Gemma's norms and the softmax
    of eager attention, whose rounding some adapters multiply."""
    wide, narrow = torch.float64, torch.Tensor.float
    softmax = torch.nn.functional.softmax

    def kept(x, dim=None, dtype=None, **more):
        return softmax(x, dim=dim, dtype=None if x.dtype == wide else dtype, **more)

    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == wide else narrow(x))
    monkeypatch.setattr(torch.nn.functional, "softmax", kept)


def lora(model, **options):
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
        # All linear layers but the head, whatever a family calls them.
        **{"target_modules": "all-linear", **options},
    )
    return peft.get_peft_model(model, config).double().eval()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapters_get_their_gradients_and_nothing_else_does(family, layout, in_float64):
    model, groups = lora(family_model(family)), ragged_groups()
    assert_step_is_loop(model, groups, CONFIG, layout)
    assert all("lora" in name for name in gradients(model))


def test_the_reference_of_a_lora_run_is_the_model_without_adapters():
    model, groups = lora(family_model("qwen2")), ragged_groups()
    with model.disable_adapter():
        found = group_logprobs(model, groups, share_prompts="on")
    _, plain = loop(family_model("qwen2"), groups, CONFIG)
    for mine, truth in zip(found, plain, strict=True):
        assert torch.allclose(mine.double(), truth, atol=1e-6)


def test_an_adapter_on_the_head_is_refused_and_a_trained_copy_is_trained():
    adapted = lora(family_model("llama"), target_modules=["lm_head", "q_proj"])
    with pytest.raises(ConfigError, match="output head of .* has a peft adapter"):
        grpo_backward(adapted, ragged_groups())
    whole = lora(family_model("llama"), modules_to_save=["lm_head"])
    groups = ragged_groups()
    loop(whole, groups, CONFIG)[0].backward()
    expected = gradients(whole)
    assert any("lm_head" in name for name in expected)
    whole.zero_grad()
    grpo_backward(whole, groups, loss=CONFIG)
    assert_same_gradients(gradients(whole), expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "gspo"])
def test_every_normaliser_is_that_of_the_step(loss_type, layout):
    config = LossConfig(loss_type=loss_type, beta=0.05, max_completion_length=8)
    model, groups = family_model("qwen3"), ragged_groups()
    assert_step_is_loop(model, groups, config, layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_prompt_mean_counts_the_tokens_of_a_group_that_is_cut(layout):
    model, groups = family_model("qwen3"), ragged_groups()
    # the definition: the mean of the groups' own token means
    means = [loop(model, [group], CONFIG)[0] for group in groups]
    (sum(means) / len(means)).backward()
    expected = gradients(model)
    model.zero_grad()
    config = LossConfig(aggregation="prompt_mean", beta=CONFIG.beta)
    grpo_backward(model, groups, loss=config, **layout)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_checkpointing_of_the_model_changes_nothing(layout):
    model, groups = family_model("qwen3"), ragged_groups()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_step_is_loop(model.train(), groups, CONFIG, layout)


def test_reentrant_checkpointing_of_a_prompt_in_leaves_is_refused():
    model, groups = family_model("qwen3").train(), ragged_groups()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert_step_is_loop(model, groups, CONFIG, LAYOUTS["one row"])
    with pytest.raises(ConfigError, match="recomputed by reentrant checkpointing"):
        grpo_backward(model, groups, loss=CONFIG, **LAYOUTS["chunks"])


def test_a_window_that_some_groups_exceed_keeps_only_those_apart():
    model, groups = family_model("mistral_window"), ragged_groups()
    groups[0] = dataclasses.replace(groups[0], prompt_ids=groups[0].prompt_ids[:2])
    short = [dataclasses.replace(groups[0], **first(groups[0], 4)), groups[1]]
    output, _ = assert_step_is_loop(model, short, CONFIG, {"share_prompts": "on"})
    # the first prompt once, the second behind each of its completions
    lengths = [len(completion) - 1 for group in short for completion in group.completion_ids]
    assert float(output.metrics["batch/forwarded_tokens_per_step"]) == 2 + 2 * 5 + sum(lengths)


def first(group: Group, count: int) -> dict:
    """What is known of its completions, cut to `count` tokens."""
    names = ("completion_ids", "old_logprobs", "ref_logprobs", "completion_masks")
    return {name: [values[:count] for values in getattr(group, name)] for name in names}


def test_experts_whose_sums_are_cut_by_their_load_are_not_refused():
    model, groups = family_model("qwen3_moe", torch.float32), ragged_groups()
    model.set_experts_implementation("grouped_mm")
    alone = group_logprobs(model, groups, share_prompts="off")
    for found, expected in zip(
        group_logprobs(model, groups, share_prompts="on"), alone, strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_head_that_is_not_what_its_config_says_is_refused():
    model = family_model("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 1.05 * forward(x)
    with pytest.raises(ConfigError, match="are not hidden @ weight.T"):
        grpo_backward(model, ragged_groups())


EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
# (class, what differs from SMALL, what the refusal says)
REFUSED = {
    "sinks": ("GptOss", EXPERTS | {"head_dim": 8, "num_local_experts": 4}, "sinks"),
    "convolution": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "kind 'conv'"),
    "recurrence": (
        "Qwen3Next",
        EXPERTS | {"layer_types": ["linear_attention"] * 2 + ["full_attention"], "num_experts": 4},
        "kind 'linear_attention'",
    ),
    "state space": (
        "FalconH1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "kind 'hybrid'",
    ),
    "a window by mask": (
        "Qwen2Moe",
        EXPERTS
        | {
            "num_experts": 4,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 3,
        },
        "sees 12 tokens by a mask of its own, and a sequence has 1[56]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_packed_row_would_get_wrong_is_refused_by_name(name, monkeypatch):
    kind, options, words = REFUSED[name]
    monkeypatch.setitem(FAMILIES, name, (kind, options))
    model = family_model(name)
    for sharing in ("off", "on"):
        with pytest.raises(ConfigError, match=words):
            grpo_backward(model, ragged_groups(), loss=CONFIG, share_prompts=sharing)
