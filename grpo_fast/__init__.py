"""grpo-fast: the GRPO update on one GPU, fused and exact. Public names only; transformers is not imported here."""

from .advantages import AdvantageOutput, group_advantages
from .config import LossConfig, TrainConfig
from .errors import CheckpointError, ConfigError, GrpoFastError, InputError, RewardError
from .ops import (
    GRPOLoss,
    LogProbOutput,
    LossOutput,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    token_logprob,
)

__version__ = "0.1.0"
__all__ = [
    "AdvantageOutput",
    "CheckpointError",
    "ConfigError",
    "GRPOLoss",
    "GrpoFastError",
    "InputError",
    "LogProbOutput",
    "LossConfig",
    "LossOutput",
    "RewardError",
    "TrainConfig",
    "TrainResult",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "token_logprob",
    "train",
]


def __getattr__(name: str):
    # The trainer needs transformers, which takes seconds to import; the loss does not.
    if name in ("train", "TrainResult"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'grpo_fast' has no attribute {name!r}")
