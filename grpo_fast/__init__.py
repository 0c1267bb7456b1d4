"""grpo-fast: the GRPO update on one GPU, fused and exact.

Public names only, each loaded when first used: this import takes milliseconds, and transformers is
imported by nothing but `train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AdvantageOutput": "advantages",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "GRPOLoss": "ops",
    "Group": "groups",
    "GrpoFastError": "errors",
    "InputError": "errors",
    "LargestStep": "planner",
    "LogProbOutput": "ops",
    "LossConfig": "loss_config",
    "LossOutput": "ops",
    "RewardError": "errors",
    "StepOutput": "step",
    "TrainConfig": "config",
    "TrainResult": "trainer",
    "group_advantages": "advantages",
    "group_logprobs": "step",
    "grpo_backward": "step",
    "grpo_loss": "ops",
    "kl_in_reward": "kl_reward",
    "linear_grpo_loss": "ops",
    "linear_logprob": "ops",
    "make_groups": "groups",
    "next_entropy_coef": "entropy_control",
    "plan_memory": "planner",
    "rehearse": "planner",
    "token_logprob": "ops",
    "train": "trainer",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .advantages import AdvantageOutput, group_advantages
    from .config import TrainConfig
    from .entropy_control import next_entropy_coef
    from .errors import CheckpointError, ConfigError, GrpoFastError, InputError, RewardError
    from .groups import Group, make_groups
    from .kl_reward import kl_in_reward
    from .loss_config import LossConfig
    from .ops import (
        GRPOLoss,
        LogProbOutput,
        LossOutput,
        grpo_loss,
        linear_grpo_loss,
        linear_logprob,
        token_logprob,
    )
    from .planner import LargestStep, plan_memory, rehearse
    from .step import StepOutput, group_logprobs, grpo_backward
    from .trainer import TrainResult, train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'grpo_fast' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
