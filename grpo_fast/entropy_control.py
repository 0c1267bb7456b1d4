"""Adaptive entropy bonus (Skywork-OR1, 2505.22312): a coefficient that follows the entropy of the
step before.

Shapes: `N` live and masked tokens of one optimizer step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .aggregation import top_entropy
from .loss_config import LossConfig


def next_entropy_coef(config: LossConfig, entropy: float) -> float:
    """`(coef + delta if entropy <= target else coef - delta)`, within [min, max].

    config: its `entropy_coef` is the one of the step that measured `entropy`, a mean in nats over
    the tokens the bonus acts on. The bonus acts in a step only where the step before measured at
    most `entropy_target`; elsewhere that step's loss has entropy_coef 0. As TRL does it.
    """
    step = config.entropy_coef_delta
    moved = config.entropy_coef + (step if entropy <= config.entropy_target else -step)
    return min(max(moved, config.entropy_coef_min), config.entropy_coef_max)


def bonus_entropy(entropy: Sequence[Tensor], masks: Sequence[Sequence[int]], share: float) -> float:
    """`cat(entropy)[cat(masks)].mean()` over the `share` of highest entropy; NaN without a token.

    One tensor and one mask of 0 and 1 a completion; share: `top_entropy_quantile`.
    """
    values = torch.cat([x.double() for x in entropy])
    live = torch.tensor([x for mask in masks for x in mask], device=values.device) != 0
    if share < 1:
        live = top_entropy(torch.where(live, values, 0.0), live, share) != 0
    return float(values[live].mean())


class EntropyControl(NamedTuple):
    """What adaptive control remembers between optimizer steps."""

    coef: float
    entropy: float | None = None
    """Of the step before; None before the first one, which so has no bonus."""

    def loss(self, config: LossConfig) -> LossConfig:
        """`config` with the coefficient of the next step."""
        acts = self.entropy is not None and self.entropy <= config.entropy_target
        return dataclasses.replace(config, entropy_coef=self.coef if acts else 0.0)

    def after(self, config: LossConfig, entropy: float) -> "EntropyControl":
        """The control once a step has measured `entropy`; NaN and inf, of a diverged step or one
        without a token, are no measurement."""
        if not math.isfinite(entropy):
            return self
        coef = next_entropy_coef(dataclasses.replace(config, entropy_coef=self.coef), entropy)
        return EntropyControl(coef, entropy)
