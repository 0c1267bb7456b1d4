"""Model shapes by name, with random weights: what a benchmark of trunk and head runs on.

The sizes are those of each model's published config. `small` has the proportions of Qwen2.5-0.5B
(MLP over hidden 5.4, head size 64, tied head), of which the trunk is most of the work and which one
CPU thread steps in seconds; `tiny` is for tests.
"""

from typing import NamedTuple


class ModelShape(NamedTuple):
    family: str
    """`transformers.<family>Config`."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True

    def config(self):
        """The transformers config."""
        import transformers

        return getattr(transformers, f"{self.family}Config")(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=2**15,
            # States and scores of order 1: attention chooses, and a wrong mask shows.
            initializer_range=self.hidden**-0.5,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )


MODELS = {
    "tiny": ModelShape("Qwen2", 32, 64, 2, 4, 2, 8, 64),
    "small": ModelShape("Qwen2", 384, 2048, 2, 6, 2, 64, 2048),
    "qwen2.5-0.5b": ModelShape("Qwen2", 896, 4864, 24, 14, 2, 64, 151936),
    "qwen2.5-1.5b": ModelShape("Qwen2", 1536, 8960, 28, 12, 2, 128, 151936),
    "qwen2.5-7b": ModelShape("Qwen2", 3584, 18944, 28, 28, 4, 128, 152064, tied=False),
    "qwen3-4b": ModelShape("Qwen3", 2560, 9728, 36, 32, 8, 128, 151936),
    "llama-3.2-1b": ModelShape("Llama", 2048, 8192, 16, 32, 8, 64, 128256),
    "llama-3.1-8b": ModelShape("Llama", 4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "gemma-2-2b": ModelShape("Gemma2", 2304, 9216, 26, 8, 4, 256, 256000),
}
