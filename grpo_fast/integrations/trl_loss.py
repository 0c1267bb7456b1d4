"""The loss that TRL's GRPOTrainer has in one micro-batch: as a LossConfig, and what it divides by.

Shapes: `B` rows of a micro-batch, `C` padded length of completions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..loss_config import LossConfig
from .trl_versions import of_the_generation

# Inputs of `_compute_loss` by the names that the loss has for them.
LOGPROBS = {
    "old_per_token_logps": "old_logprobs",
    "ref_per_token_logps": "ref_logprobs",
    "sampling_per_token_logps": "sampler_logprobs",
}
SEQUENCE_SUMS = ("grpo", "sapo", "luspo")


class Denominators(NamedTuple):
    policy: float | Tensor
    entropy: float | Tensor | None
    """None where the call counts the tokens that the bonus acts on."""


def loss_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, C]: the tokens in the loss."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def step_loss(
    trainer: Any, loss: LossConfig, inputs: Mapping[str, Tensor], version: str
) -> tuple[LossConfig, Denominators]:
    """(`loss` with the entropy bonus of now, its denominators) in TRL `version`."""
    tokens = max(int(loss_mask(inputs).sum()), 1)
    # Set where there is training: nothing is accumulated in an evaluation.
    steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    kind, rows = loss.loss_type, len(inputs["completion_ids"])
    whole = of_the_generation(version, kind)
    if kind in SEQUENCE_SUMS:
        policy = rows * steps
    elif kind == "bnpo":
        policy = tokens * steps
    elif kind == "dr_grpo":
        policy = rows * trainer.max_completion_length * steps
    else:
        policy = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        if trainer.model.training and not whole:
            # Counted over the generation batch, which may last for several optimizer steps.
            policy = policy * steps / trainer.args.steps_per_generation
    if whole:
        return _with_bonus(trainer, loss, 1), Denominators(policy, policy)
    entropy = tokens if loss.top_entropy_quantile == 1 else None
    return _with_bonus(trainer, loss, steps), Denominators(policy, entropy)


def _with_bonus(trainer: Any, loss: LossConfig, steps: int) -> LossConfig:
    """The config with the entropy bonus that TRL's controller has come to."""
    if not getattr(trainer, "_entropy_bonus_enabled", False):
        return loss
    coefficient = trainer.entropy_coef
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coefficient = 0.0
    return dataclasses.replace(loss, entropy_coef=coefficient / steps)
