"""Checkpoints: safetensors and JSON only, written aside, synced and renamed, so that a visible one
is whole."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import CheckpointError
from .model import save_model

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"


class Checkpoint(NamedTuple):
    path: Path
    step: int
    state: dict[str, Any]
    """What the trainer put in."""


def save_checkpoint(
    folder: Path, step: int, *, model, tokenizer, optimizer, state: dict, keep: int
) -> Path:
    """Write `folder/step-000050` with model, tokenizer, optimizer and `state`; drop all but the
    `keep` newest."""
    target = folder / f"step-{step:06d}"
    staging = folder / f".{target.name}.writing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_model(staging, model, tokenizer)
    save_file(optimizer_tensors(model, optimizer), staging / OPTIMIZER)
    files = {path.name: _sha256(path) for path in sorted(staging.iterdir()) if path.is_file()}
    record = {"step": step, "files": files, "state": state}
    (staging / STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for path in staging.iterdir():
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
    _sync(folder)
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, or None where there is none at all, and a sentence for each
    damaged one passed over.

    Raises CheckpointError when there are checkpoints and none of them is intact.
    """
    problems = []
    for path in reversed(_folders(folder)):
        problem = _damage(path)
        if problem is None:
            record = json.loads((path / STATE).read_text(encoding="utf-8"))
            return Checkpoint(path, record["step"], record["state"]), problems
        problems.append(f"{path.name}/{problem}")
    if problems:
        raise CheckpointError(
            f"no checkpoint in {folder} is intact ({'; '.join(problems)}): restore one, or start "
            "anew without --resume"
        )
    return None, []


def _damage(path: Path) -> str | None:
    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        files = record["files"]
        whole = isinstance(record["step"], int) and isinstance(record["state"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        return f"{STATE} is missing or not readable"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != digest:
            return f"{name} does not match its sha256"
    return None


def optimizer_tensors(model, optimizer) -> dict[str, Tensor]:
    """AdamW's moments, step counts and master weights under `parameter name/moment`."""
    return {
        f"{name}/{key}": value.detach().clone().contiguous().cpu()
        for name, parameter in model.named_parameters()
        for key, value in _state_tensors(optimizer, parameter).items()
    }


def load_optimizer(path: Path, model, optimizer) -> None:
    """Put what `optimizer_tensors` saved in checkpoint `path` back; raises CheckpointError where it
    does not fit the model or the optimizer."""
    parameters = dict(model.named_parameters())
    with safe_open(path / OPTIMIZER, framework="pt") as file:
        saved: dict[str, set[str]] = {}
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            name, _, moment = key.rpartition("/")
            if name not in parameters:
                raise CheckpointError(
                    f"{path}/{OPTIMIZER} holds '{name}', which the model does not have"
                )
            saved.setdefault(name, set()).add(moment)
        _make_state(optimizer, [parameters[name] for name in saved])
        for name, moments in saved.items():
            state = _state_tensors(optimizer, parameters[name])
            if moments != set(state):
                raise CheckpointError(
                    f"{path}/{OPTIMIZER} holds {', '.join(sorted(moments))} of '{name}', this "
                    f"optimizer has {', '.join(sorted(state)) or 'nothing'}: put optimizer, "
                    "update_precision and dtype back"
                )
            for moment, tensor in state.items():
                value = file.get_tensor(f"{name}/{moment}")
                if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
                    raise CheckpointError(
                        f"{path}/{OPTIMIZER}: {moment} of '{name}' is {value.dtype} "
                        f"{list(value.shape)}, expected {tensor.dtype} {list(tensor.shape)}: put "
                        "model, optimizer, update_precision and dtype back"
                    )
                tensor.copy_(value)


def _state_tensors(optimizer, parameter) -> dict[str, Tensor]:
    """The optimizer's state of one parameter; of a quantized moment its parts, `exp_avg.codes`."""
    tensors = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if is_traceable_wrapper_subclass(value):
            parts, _ = value.__tensor_flatten__()
            tensors |= {f"{key}.{part}": getattr(value, part) for part in parts}
        else:
            tensors[key] = value
    return tensors


def _make_state(optimizer, parameters) -> None:
    """Have the optimizer make its own state, to be filled: a step at rate 0 on gradients of 0 moves
    no weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        parameter.grad = None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
