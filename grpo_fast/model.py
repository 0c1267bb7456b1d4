"""The one place that loads models: folder to model, model to hidden states and head.

Shapes: `B` rows, `L` padded length, `D` hidden, `V` vocabulary.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from .chunked import Head
from .errors import ConfigError, nearest
from .plugins import describe, load_function, raised_at

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
MADE_BY = "made_by.json"
# Any one of these holds a vocabulary.
TOKENIZER_FILES = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt")
DOWNLOAD = "download one with `hf download ORG/NAME --local-dir FOLDER`"

# The same product twice differs by rounding alone; a forgotten factor or bias is far beyond.
HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_PRECISION_TOLERANCE = 2e-2


def pick_device(name: str) -> torch.device:
    """`torch.device(name)`, or for `auto` the GPU if there is one; ConfigError where it is not
    there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "cpu") or (index and not index.isdecimal()):
        raise ConfigError(f"device = '{name}' is not available: choose auto, cuda, cuda:0 or cpu")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise ConfigError(
            f"device = '{name}': PyTorch {torch.__version__} sees {count} GPUs: choose auto or cpu"
        )
    return torch.device(name)


def resolve_model(spec: str, *, directory: Path, seed: int) -> Path:
    """A model folder as it is; for `file.py:function` the `directory` that function(directory,
    seed) filled.

    The function writes aside and is renamed into place, so that an existing `directory` is whole
    and is used again; ConfigError where another function or seed made it.
    """
    if Path(spec).exists() or ":" not in spec:
        path = Path(spec)
        _check_folder(path)
        _check_weights(path)
        _check_tokenizer(path)
        return path
    function = load_function(spec)
    made = {"made_by": spec, "seed": seed}
    if directory.exists():
        return _made_before(directory, made)
    staging = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with quiet():
            function(staging, seed)
    except Exception as error:
        code = getattr(function, "__code__", None)
        where = raised_at(error, code.co_filename) if code else ""
        raise ConfigError(
            f"model function '{spec}' raised {describe(error)}{f' ({where})' if where else ''}"
        ) from error
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (staging / name).is_file():
            raise ConfigError(
                f"model function '{spec}' wrote no {name}: expected model.save_pretrained and "
                "tokenizer.save_pretrained into the folder it is given"
            )
    (staging / MADE_BY).write_text(json.dumps(made), encoding="utf-8")
    staging.rename(directory)
    return directory


def _made_before(directory: Path, made: dict) -> Path:
    record = directory / MADE_BY
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if _maker(found) != _maker(made):
        raise ConfigError(
            f"model folder {directory} was made by {found.get('made_by', 'something else')} with "
            f"seed {found.get('seed', 'unknown')}, this run wants {made['made_by']} with seed "
            f"{made['seed']}: put model and seed back, or choose another output_dir"
        )
    return directory


def _maker(made: dict) -> tuple:
    # As resolved paths: `make demo` names the file from here, `grpo-fast demo` from the root.
    file, _, name = made.get("made_by", "").rpartition(":")
    return Path(file).resolve(), name, made.get("seed")


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        kind = "is a file" if path.is_file() else "does not exist"
        names = (p.name for p in path.parent.glob("*") if p.is_dir())
        raise ConfigError(
            f"model folder {path} {kind}: {nearest(path.name, names)}expected a Hugging Face model "
            f"directory; {DOWNLOAD}"
        )
    if not (path / CONFIG).is_file():
        raise ConfigError(f"model folder {path} has no {CONFIG}: {DOWNLOAD}")


def _check_tokenizer(path: Path) -> None:
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"model folder {path} has no {TOKENIZER}: save the tokenizer there too, with "
            "tokenizer.save_pretrained"
        )


def _check_weights(path: Path) -> None:
    index = path / WEIGHTS_INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{index} is damaged ({describe(error)}): download it again"
            ) from error
        for shard in sorted(shards):
            if not (path / shard).is_file():
                raise ConfigError(
                    f"model folder {path} lacks {shard}, which {WEIGHTS_INDEX} names: download it "
                    "again"
                )
    elif not (path / WEIGHTS).is_file():
        pickled = sorted(path.glob("*.bin"))
        why = f" ({pickled[0].name} is never read, it can run code)" if pickled else ""
        raise ConfigError(
            f"model folder {path} has no {WEIGHTS}{why}: save the model with "
            "model.save_pretrained, or download it again"
        )


def load_model(path: str | Path, *, dtype: torch.dtype, device: torch.device | str):
    """`AutoModelForCausalLM.from_pretrained(path)` from local safetensors, no code of the model's
    own.

    Raises ConfigError for a missing or damaged file, and for weights that the file does not hold
    or holds in another shape: they would stay random.
    """
    from transformers import AutoModelForCausalLM

    _check_folder(Path(path))
    _check_weights(Path(path))
    with quiet(), _named_errors(path):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            # Both are refused below, with names: transformers would print a table and go on.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_report(path, type(model).__name__, report)
    return model.to(device)


def _check_report(path: str | Path, kind: str, report: dict) -> None:
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ConfigError(
            f"'{name}' in {path} has shape {list(found)}, {kind} of its {CONFIG} expects "
            f"{list(expected)}: weights and {CONFIG} are of different models"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"the weights in {path} lack {len(missing)} tensors of {kind}, first '{missing[0]}': "
            f"download the model again, or mend {CONFIG}"
        )


def load_tokenizer(path: str | Path):
    """`AutoTokenizer.from_pretrained(path)`, local and without code of the model's own."""
    from transformers import AutoTokenizer

    _check_folder(Path(path))
    _check_tokenizer(Path(path))
    with quiet(), _named_errors(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def save_model(folder: str | Path, model, tokenizer) -> None:
    """Model and tokenizer as a Hugging Face folder that `load_model` and others can read."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _named_errors(path: str | Path) -> Iterator[None]:
    """What transformers raises about the files in `path`, as one line that names the folder."""
    try:
        yield
    except SafetensorError as error:
        raise ConfigError(
            f"the weights in {path} are damaged or cut short ({error}): download them again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path} could not be loaded: {describe(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers for a while: what matters is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def hidden_states(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **more: object,
) -> Tensor:
    """`model(input_ids).logits` before the head: [B, L, D] with gradient, and no logits. `more`
    reaches every attention layer."""
    decoder = model.get_decoder()
    given = more if position_ids is None else {"position_ids": position_ids, **more}
    output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given)
    return output.last_hidden_state


def head(model) -> Head:
    """`model.get_output_embeddings()` and what the config does to its logits: weight, bias,
    logit_scale and softcap of `linear_grpo_loss`.

    Raises ConfigError for a head that a peft adapter changes: its adapter would get no gradient.
    """
    layer = model.get_output_embeddings()
    trained = getattr(layer, "modules_to_save", None)
    if trained is not None:
        layer = trained[layer.active_adapters[0]]
    elif type(layer).__module__.startswith("peft."):
        raise ConfigError(
            f"the output head of {type(model).__name__} has a peft adapter "
            f"({type(layer).__name__}), which the loss cannot train: leave the head out of "
            "target_modules, or train it whole with modules_to_save=['lm_head']"
        )
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise ConfigError(
            f"{type(model).__name__} has no output head: expected a causal language model whose "
            "get_output_embeddings() is a linear layer"
        )
    config = model.config.get_text_config()
    scale = 1.0
    # Cohere, Falcon H1; Granite divides.
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


@torch.no_grad()
def check_head(model) -> None:
    """Refuse a model whose logits are not those of `head(model)`: the loss would be another one."""
    layer = head(model)
    weight = layer.weight
    # From 1: id 0 is often the padding, whose embedding is zero.
    ids = torch.arange(1, 5, device=weight.device)[None] % weight.shape[0]
    with evaluating(model):
        if model.get_decoder() is model:
            raise ConfigError(f"{type(model).__name__} has no decoder apart from its head")
        hidden = hidden_states(model, ids)
        # Accelerate's mixed precision is around the whole forward, and not around its decoder.
        forward = getattr(model, "_original_forward", model)
        logits = forward(input_ids=ids, use_cache=False).logits
    if not hidden.isfinite().all():
        raise ConfigError(
            f"{type(model).__name__} gives NaN or inf on four tokens: its weights are damaged"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    ours = torch.nn.functional.linear(hidden.to(weight.dtype), weight, layer.bias).to(wide)
    ours, logits = layer.logits_(ours), logits.to(wide)
    tolerance = HEAD_TOLERANCE.get(weight.dtype, HALF_PRECISION_TOLERANCE)
    # Written so that NaN logits are refused too.
    if ours.shape != logits.shape or not (
        (ours - logits).abs().max() <= tolerance * ours.abs().max()
    ):
        raise ConfigError(
            f"the logits of {type(model).__name__} are not hidden @ weight.T + bias of its head, "
            "scaled and softcapped as its config says: the model changes them in a way the loss "
            "does not know, use another one"
        )


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """`model.eval()` for a while; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
