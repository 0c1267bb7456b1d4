"""The only place that loads a model; its trunk, its head, and the check that they are all there is.

Shapes: `B` rows, `L` tokens, `D` hidden, `V` vocabulary.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError
from .plugins import load_function

# Options of Hugging Face configs that change the logits after the head.
TRANSFORMED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
# Logits of float32 models agree to a few roundings; half precision rounds each to 2^-8.
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
MADE = ".complete"


class Head(NamedTuple):
    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if PyTorch sees one; raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device = {name!r}: expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device = {name!r}, but PyTorch sees no GPU here: use device auto or cpu"
        )
    return device


def resolve_model(spec: str, *, directory: Path, seed: int) -> str:
    """A model directory as it is; `file.py:function` is called once to fill `directory`."""
    if ":" not in spec:
        return spec
    record = json.dumps({"made_by": spec, "seed": seed})
    done = directory / MADE
    if done.is_file() and done.read_text(encoding="utf-8") == record:
        return str(directory)
    make = load_function(spec)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    make(directory, seed)
    # Written last: a directory without it was interrupted and is made again.
    done.write_text(record, encoding="utf-8")
    return str(directory)


def _check_directory(path: Path, needed: tuple[str, ...]) -> None:
    if not path.is_dir():
        raise ConfigError(
            f"model {path} is no directory: give a local Hugging Face model directory "
            "(config.json, "
            "model.safetensors, tokenizer.json), or file.py:function that makes one"
        )
    for name in needed:
        if not any((path / option).is_file() for option in name.split("|")):
            raise ConfigError(
                f"model {path} has no {name.replace('|', ' or ')}: complete the directory"
            )


def load_model(path: str | Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """`AutoModelForCausalLM.from_pretrained(path)`: safetensors only, no remote code, no hub."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    path = Path(path)
    _check_directory(path, ("config.json", "model.safetensors|model.safetensors.index.json"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"model {path} cannot be loaded ({said}): mend the directory") from error
    return model.to(device)


def load_tokenizer(path: str | Path) -> Any:
    """`AutoTokenizer.from_pretrained(path)`, local files only."""
    from transformers import AutoTokenizer

    path = Path(path)
    _check_directory(path, ("config.json", "tokenizer.json|tokenizer.model|vocab.json"))
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"tokenizer in {path} cannot be loaded ({said})") from error


def hidden_states(model, input_ids: Tensor) -> Tensor:
    """`model(input_ids, output_hidden_states=True).hidden_states[-1]` without the head: [B, L, D].

    Rows are padded on the right, where no causal state looks, so no mask is needed.
    """
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state


def head(model) -> Head:
    """The output embedding."""
    layer = model.get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None))


@torch.no_grad()
def check_head(model) -> None:
    """`model(ids).logits == hidden_states(ids) @ weight.T + bias`, or a ConfigError that says why.

    The fused loss never runs the model's own head, so whatever else the model does to its logits
    must be known, not assumed away.
    """
    config = model.config.get_text_config()
    for name in TRANSFORMED_LOGITS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"{type(model).__name__} has {name} = {getattr(config, name)}, which changes the "
                "logits after the head: not supported by this trainer yet, use another model"
            )
    if model.get_output_embeddings() is None or not hasattr(model, "base_model"):
        raise ConfigError(
            f"{type(model).__name__} has no separate head: use a causal language model"
        )
    weight, bias = head(model)
    ids = torch.arange(4, device=weight.device)[None] % weight.shape[0]
    training = model.training
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits.float()
    hidden = hidden_states(model, ids)
    model.train(training)
    found = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error <= HEAD_TOLERANCE[weight.dtype]:
        raise ConfigError(
            f"{type(model).__name__} does something to its logits after the head (they differ by "
            f"{error:.1%}): not supported by this trainer, use another model"
        )
