"""How deep TRL's GRPOTrainer can be taken over: what stands in the way of each depth, in words."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from ..errors import GrpoFastError
from ..groups import Group
from ..loss_config import LossConfig
from ..model import head
from ..step import group_measures
from .hosts import trained_head

Depth = Literal["packed", "fused", "kernel", "own"]
# What the log says of each.
DEPTHS = {
    "packed": "depth 'packed', which has packed rows, shared prompts and the fused loss",
    "fused": "depth 'fused', which has the fused loss on padded rows",
    "kernel": "depth 'kernel', which has TRL's own loss on log-probs from here",
    "own": "depth 'own', which is TRL's own code",
}
# A config of rotary positions, for which it does not matter where a row starts, has one of them.
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling")
# One copy of the parameters a process, and gradients that nobody else averages.
REPLICATED = ("MULTI_CPU", "MULTI_GPU")


def replicated(accelerator: Any) -> bool:
    """Whether several processes hold the same parameters, as under DDP."""
    return accelerator.num_processes > 1 and accelerator.distributed_type in REPLICATED


def not_at_all(trainer: Any, model: Any) -> str | None:
    """Why nothing can be taken over; ConfigError for a head whose weights are not what it does."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if plugin is not None and plugin.zero_stage == 3:
        return "ZeRO stage 3 holds the head"
    trained_head(model)
    return None


def not_fused(trainer: Any, config: LossConfig) -> str | None:
    """Why the loss has to stay TRL's, as far as trainer and config tell."""
    accelerator, args = trainer.accelerator, trainer.args
    several, alike = accelerator.num_processes > 1, replicated(accelerator)
    hook = str(getattr(getattr(accelerator, "ddp_handler", None), "comm_hook", "no"))
    reasons = {
        "FSDP holds the parameters": trainer.is_fsdp_enabled,
        "DeepSpeed holds the gradients": trainer.is_deepspeed_enabled,
        f"{accelerator.num_processes} processes of {accelerator.distributed_type}": (
            several and not alike
        ),
        f"the communication hook '{hook}' of DDP": alike and hook != "no",
        "top_entropy_quantile is one quantile of all processes": (
            several and config.top_entropy_quantile < 1
        ),
        "fp16 scales the loss, use bf16": accelerator.scaler is not None,
        "an auxiliary loss of the experts' router is added": getattr(
            trainer, "aux_loss_enabled", False
        ),
        "a model that sees images": getattr(trainer, "_is_vlm", False),
        "torch_compile holds the whole model": args.torch_compile,
        # Up to TRL 1.13 the whole loss is Liger's, afterwards only layers are.
        "use_liger_kernel brings a loss of its own": getattr(trainer, "use_liger_kernel", False),
        "cast_lm_head_to_fp32 patches the head": args.cast_lm_head_to_fp32,
        f"optim '{args.optim}' steps inside of the backward": (
            any(word in str(args.optim) for word in ("lomo", "layerwise"))
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def not_packed(model: Any, config: LossConfig, forward: Any) -> str | None:
    """Why its rows have to stay padded; `forward` is the context of its passes."""
    if config.top_entropy_quantile < 1:
        return "top_entropy_quantile is one quantile of all rows together"
    if not any(hasattr(model.config.get_text_config(), name) for name in ROTARY):
        return "its positions are absolute, and TRL counts padding in them"
    try:
        with _training(model), forward():
            for share in ("on", "off"):
                group_measures(model, [_probe(model)], temperature=1.0, share_prompts=share)
    except GrpoFastError as error:
        return str(error)
    return None


def _probe(model: Any) -> Group:
    """Any few tokens: whether a model can be packed is seen on them."""
    vocabulary = head(model).weight.shape[0]
    ids = [token % vocabulary for token in range(1, 20)]
    return Group(prompt_ids=ids[:8], completion_ids=[ids[8:14], ids[14:]], advantages=[0.0, 0.0])


@contextlib.contextmanager
def _training(model: Any) -> Iterator[None]:
    """As in a training step, dropout included, and without a trace of it."""
    device, before = next(model.parameters()).device, model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            model.train(before)
