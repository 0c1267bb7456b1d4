"""The sizes of a model that its cost follows from: by name, or read from its `config.json`.

Letters: `D` hidden, `V` vocabulary.
"""

import json
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError, nearest


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
    window: int | None = None
    """Tokens that some layer sees at most."""

    @property
    def normed(self) -> int:
        """Numbers of a token that one layer's norms see."""
        around, of_heads = NORMS.get(self.family, (2, False))
        heads = self.head_dim * (self.heads + self.kv_heads)
        return around * self.hidden + (heads if of_heads else 0)

    @property
    def sides(self) -> int:
        """Rows and columns of one layer's matrices, added up."""
        attention = 4 * self.hidden + 2 * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * (self.hidden + self.intermediate)

    @property
    def body(self) -> int:
        """Weights of all layers that every token is multiplied by."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """Norms and biases, of which a model of billions has a thousandth, left out."""
        return self.body + (1 if self.tied else 2) * self.vocabulary * self.hidden


# Of a layer: (norms of hidden states, whether queries and keys have theirs), where not (2, False).
NORMS = {
    "Gemma2": (4, False),
    "Gemma3Text": (4, True),
    "Olmo2": (2, True),
    "Qwen3": (2, True),
}
# The sizes of each model's published config. `small` has the proportions of Qwen2.5-0.5B (MLP over
# hidden 5.4, head size 64, tied head), of which the trunk is most of the work and which one CPU
# thread steps in seconds; `wide` has more of a real model's vocabulary, and `tiny` is for tests.
MODELS = {
    "tiny": ModelShape("Qwen2", 32, 64, 2, 4, 2, 8, 64),
    "small": ModelShape("Qwen2", 384, 2048, 2, 6, 2, 64, 2048),
    "wide": ModelShape("Qwen2", 256, 1024, 4, 4, 2, 64, 32768),
    "qwen2.5-0.5b": ModelShape("Qwen2", 896, 4864, 24, 14, 2, 64, 151936),
    "qwen2.5-1.5b": ModelShape("Qwen2", 1536, 8960, 28, 12, 2, 128, 151936),
    "qwen2.5-7b": ModelShape("Qwen2", 3584, 18944, 28, 28, 4, 128, 152064, tied=False),
    "qwen3-4b": ModelShape("Qwen3", 2560, 9728, 36, 32, 8, 128, 151936),
    "llama-3.2-1b": ModelShape("Llama", 2048, 8192, 16, 32, 8, 64, 128256),
    "llama-3.1-8b": ModelShape("Llama", 4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "gemma-2-2b": ModelShape("Gemma2", 2304, 9216, 26, 8, 4, 256, 256000, window=4096),
}
# model_type of a config.json -> (family, whether the head is tied where the file does not say).
# Their layers have these seven matrices and no others.
FAMILIES = {
    "llama": ("Llama", False),
    "mistral": ("Mistral", False),
    "qwen2": ("Qwen2", False),
    "qwen3": ("Qwen3", False),
    "gemma": ("Gemma", True),
    "gemma2": ("Gemma2", True),
    "gemma3_text": ("Gemma3Text", True),
    "olmo2": ("Olmo2", False),
    "phi3": ("Phi3", False),
    "smollm3": ("SmolLM3", True),
}


def model_shape(name: str) -> ModelShape:
    """Of one of MODELS, a model folder or its config.json.

    Raises ConfigError for a name that is neither, a file that is no config, and a model type whose
    layers are others than are counted here.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"model '{name}' is no folder with a config.json, no such file and no known name: "
            f"{nearest(name, MODELS)}names are {', '.join(MODELS)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
    except (ValueError, AttributeError, OSError) as error:
        raise ConfigError(f"{path} is no JSON object of a model's config: {error}") from error
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{path} has model_type {kind!r}, whose layers are not counted here, expected one of "
            f"{', '.join(FAMILIES)}: name a model of about its size instead"
        )
    return _from_config(config, path, *FAMILIES[kind])


def _from_config(config: dict, path: Path, family: str, tied: bool) -> ModelShape:
    def size(key: str, default: int | None = None) -> int:
        found = config.get(key)
        found = default if found is None else found
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise ConfigError(f"{path} has {key} = {found!r}, expected a positive whole number")
        return found

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kinds = config.get("layer_types")
    windowed = config.get("use_sliding_window", True) and (
        kinds is None or "sliding_attention" in kinds
    )
    return ModelShape(
        family=family,
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        vocabulary=size("vocab_size"),
        tied=config.get("tie_word_embeddings", tied),
        window=config.get("sliding_window") if windowed else None,
    )
