"""A random model of 20 thousand parameters and a tokenizer of single letters, for tests."""

import string
from pathlib import Path
from typing import Any

PAD, EOS = "<pad>", "<eos>"


def tiny_tokenizer() -> Any:
    """One token a character of letters, digits and a few signs; ids 0 pad, 1 end of sequence."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.ascii_lowercase + string.digits + " +-=?."
    vocabulary = {token: k for k, token in enumerate([PAD, EOS, "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token="<unk>"
    )


def tiny_model(**overrides: Any) -> Any:
    """A random Qwen3 of 2 layers, hidden 32, vocabulary 50; seed before the call."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return Qwen3ForCausalLM(Qwen3Config(**options | overrides))


def save_tiny(folder: Path, **overrides: Any) -> Path:
    """`tiny_model` and `tiny_tokenizer` as a Hugging Face model directory."""
    tiny_model(**overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
