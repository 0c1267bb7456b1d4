"""A model of a named shape with random weights: what a benchmark of trunk and head runs on."""

from grpo_fast.model_shapes import ModelShape


def model_config(shape: ModelShape):
    """The transformers config of `shape`."""
    import transformers

    window = {} if shape.window is None else {"sliding_window": shape.window}
    return getattr(transformers, f"{shape.family}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2**15,
        # States and scores of order 1: attention chooses, and a wrong mask shows.
        initializer_range=shape.hidden**-0.5,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **window,
    )
