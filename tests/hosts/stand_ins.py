"""What TRL's tests load from a hub, as folders of the same names: tiny random models of the same
families, a tokenizer of characters with Qwen's special tokens, prompts with the same columns."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

HUB = "trl-internal-testing"
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
TOKENS = {token: number for number, token in enumerate([*CHARACTERS, *SPECIAL])}
PAD, END = TOKENS["<|endoftext|>"], TOKENS["<|im_end|>"]
SIZE = {
    "vocab_size": len(TOKENS),
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": None,
}
HEADS_OF_EIGHT = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
# Name there, model type, what more its config takes.
CAUSAL = (
    ("tiny-Qwen2ForCausalLM-2.5", "qwen2", {}),
    ("tiny-Qwen3ForCausalLM", "qwen3", HEADS_OF_EIGHT),
    ("tiny-Qwen3MoeForCausalLM", "qwen3_moe", EXPERTS | {"moe_intermediate_size": 32}),
    ("tiny-LlamaForCausalLM-3.2", "llama", {}),
    ("tiny-MistralForCausalLM-0.2", "mistral", {"sliding_window": None}),
    ("tiny-Gemma2ForCausalLM", "gemma2", HEADS_OF_EIGHT),
    ("tiny-Cohere2ForCausalLM", "cohere2", {"logit_scale": 0.125}),
    ("tiny-GptOssForCausalLM", "gpt_oss", EXPERTS | HEADS_OF_EIGHT),
    (
        "tiny-Glm4MoeForCausalLM",
        "glm4_moe",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
)
REWARD = (
    ("tiny-Qwen2ForSequenceClassification-2.5", "qwen2", {}),
    ("tiny-Qwen3ForSequenceClassification", "qwen3", HEADS_OF_EIGHT),
    ("tiny-LlamaForSequenceClassification-3.2", "llama", {}),
)
TEMPLATES = {"qwen3": "qwen3", "qwen3_moe": "qwen3", "cohere2": "cohere2", "gpt_oss": "gptoss"}
# Three epochs are nine steps.
TRAIN = 3
WORDS = [
    "Beautiful",
    "is",
    "better",
    "than",
    "ugly",
    "and",
    "explicit",
    "is",
    "better",
    "than",
    "implicit",
]


def write(folder: Path) -> None:
    """Everything under `folder`, which then is the directory to start in."""
    torch.manual_seed(0)
    one = {"num_labels": 1}
    for names, kind, more in (
        (CAUSAL, AutoModelForCausalLM, {}),
        (REWARD, AutoModelForSequenceClassification, one),
    ):
        for name, family, options in names:
            config = AutoConfig.for_model(family, **SIZE | options | more)
            path = folder / HUB / name
            kind.from_config(config, dtype=torch.float32).save_pretrained(path)
            tokenizer(family).save_pretrained(path)
    prompts(folder / HUB / "zen")


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a character."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from trl import chat_template_utils

    core = Tokenizer(models.WordLevel(TOKENS, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    templates = Path(chat_template_utils.__file__).parent / "chat_templates"
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=" ",
        clean_up_tokenization_spaces=False,
    )
    name = TEMPLATES.get(family, "qwen2_5")
    made.chat_template = (templates / f"{name}.jinja").read_text(encoding="utf-8")
    return made


def prompts(folder: Path) -> None:
    """TRAIN to train with and 2 to test, as text and as conversations."""
    texts = [" ".join(WORDS[k % 7 : k % 7 + 2 + k % 3]) for k in range(TRAIN + 2)]
    talks = [[{"role": "user", "content": text}] for text in texts]
    configs = []
    for name, values in (("standard_prompt_only", texts), ("conversational_prompt_only", talks)):
        (folder / name).mkdir(parents=True)
        files = []
        for split, part in (("train", values[:TRAIN]), ("test", values[TRAIN:])):
            lines = "\n".join(json.dumps({"prompt": value}) for value in part)
            (folder / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            files.append(f"  - split: {split}\n    path: {name}/{split}.jsonl\n")
        configs.append(f"- config_name: {name}\n  data_files:\n{''.join(files)}")
    card = f"---\nconfigs:\n{''.join(configs)}---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
