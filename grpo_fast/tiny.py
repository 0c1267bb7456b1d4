"""A random Qwen3 of 25 thousand parameters and a tokenizer of one token a character, built in
code: what whole-program tests run on."""

from pathlib import Path

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=.,?:\n"


def tiny_tokenizer():
    """PreTrainedTokenizerFast: ids 0, 1, 2 are padding, end and unknown, then CHARACTERS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((PAD, EOS, UNKNOWN, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(**overrides):
    """Untrained Qwen3ForCausalLM in float32, from torch's global generator; `overrides` go to its
    config."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = {
        "vocab_size": 3 + len(CHARACTERS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    return Qwen3ForCausalLM(Qwen3Config(**options | overrides))


def save_tiny(folder: str | Path, **overrides) -> None:
    """Write `tiny_model(**overrides)` and its tokenizer as a Hugging Face model folder."""
    tiny_model(**overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
