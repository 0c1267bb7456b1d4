"""Layers recomputed in the backward instead of kept, for any transformers model and without a
change to it.

Shapes: `T` tokens of a row, `D` hidden, `L` layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import Checkpointing
from .errors import ConfigError
from .loss_config import check_choice


@contextmanager
def checkpointing_layers(model, mode: Checkpointing) -> Iterator[None]:
    """`layer(x)` -> `torch.utils.checkpoint.checkpoint(layer, x)` in every layer of `model` for a
    while; the backward may come later.

    `off` (or `auto`, which is decided elsewhere) changes nothing. `on` keeps the [T, D] input of
    each of L layers and computes the layer once more in the backward; `offload` keeps these inputs
    in CPU memory (on a CPU that only costs a copy). The recomputed layer is the same call, so
    gradients are the same bit by bit. A layer that the model checkpoints itself is left alone.
    Raises ConfigError for a model whose layers cannot be found.
    """
    check_choice("checkpointing", mode, Checkpointing)
    wrapped: list[tuple[nn.Module, Callable | None]] = []
    try:
        if mode in ("on", "offload"):
            for layer in layers(model):
                if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
                    wrapped.append((layer, vars(layer).get("forward")))
                    # Without dropout there is no random state to keep.
                    layer.forward = partial(
                        _recomputed, layer.forward, mode == "offload", layer.training
                    )
        yield
    finally:
        for layer, before in wrapped:
            if before is None:
                del layer.forward
            else:
                layer.forward = before


def layers(model) -> nn.ModuleList:
    """The decoder layers, in order."""
    decoder = model.get_decoder()
    count = decoder.config.num_hidden_layers
    found = [part for part in decoder.children() if isinstance(part, nn.ModuleList)]
    for part in found:
        if len(part) == count:
            return part
    raise ConfigError(
        f"{type(model).__name__} has no list of {count} layers that could be checkpointed (found "
        f"lists of {sorted(len(part) for part in found)}): use checkpointing='off'"
    )


def _recomputed(
    forward: Callable, offload: bool, random: bool, *states: torch.Tensor, **given: object
):
    keep = torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext()
    # What is computed inside is dropped, so these hooks see the layer's input alone.
    with keep:
        return checkpoint(forward, *states, use_reentrant=False, preserve_rng_state=random, **given)
