"""What a loss call says of itself, by-products of its sweep: 0-d tensors on the device.

Names are TRL's. No sync and no second look at the vocabulary. What was not measured has no entry.
Shapes: `N` rows (tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .loss_config import LossConfig
from .objective import bounds_of, objective_name


def clips_ratio(config: LossConfig) -> bool:
    """Whether the objective holds a ratio at bounds that `clip_ratio` can count."""
    return config.objective is None and objective_name(config) in ("clip", "cispo")


def clipped_tokens(
    ratio: Tensor, advantages: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor] | None:
    """Tokens held at the lower and at the upper bound, where the objective clips a ratio: [N] bool
    each.

    For the PPO clip those whose policy gradient the clip takes away, for CISPO those whose weight
    it bounds.
    """
    if not clips_ratio(config):
        return None
    bounds = bounds_of(config)
    low, high = ratio < bounds.low, ratio > bounds.high
    if objective_name(config) == "cispo":
        return low, high
    return low & (advantages < 0), high & (advantages > 0)


@dataclass(kw_only=True, eq=False)
class Measured:
    """What one call knows of its tokens, [N]."""

    measured: Tensor
    """bool: live, and not skipped."""
    n_tokens: Tensor
    """0-d: the live tokens, skipped ones too."""
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None
    mass: Tensor
    advantages: Tensor
    logp: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    sampler_logp: Tensor | None
    config: LossConfig

    @cached_property
    def count(self) -> Tensor:
        return self.measured.sum().float()

    def mean(self, x: Tensor) -> Tensor:
        return torch.where(self.measured, x.float(), 0.0).sum() / self.count.clamp(min=1)

    def largest(self, x: Tensor, least: float) -> Tensor:
        """`least` where nothing was measured."""
        x = torch.where(self.measured, x.float(), least)
        # One token more, so that an empty call has an answer too.
        return torch.nn.functional.pad(x, (0, 1), value=least).amax()

    def or_one(self, extreme: Tensor) -> Tensor:
        # With no live token the extremes are those of an unchanged policy.
        return torch.where(self.count > 0, extreme, 1.0)

    def beyond_clamp(self, other: Tensor) -> Tensor:
        return self.mean((self.logp - other).abs() > self.config.log_ratio_clamp)

    @cached_property
    def clipped(self) -> tuple[Tensor, Tensor]:
        return clipped_tokens(self.ratio, self.advantages, self.config)

    @cached_property
    def scored(self) -> Tensor:
        """A NaN of the sampler is a token that it could not score."""
        return self.measured & ~self.sampler_logp.isnan()

    @cached_property
    def sampler_gap(self) -> Tensor:
        old = self.logp if self.old_logp is None else self.old_logp
        return torch.where(self.scored, (old - self.sampler_logp).float(), 0.0).abs()


_ALWAYS = {
    "n_tokens": lambda call: call.n_tokens,
    "n_tokens_skipped": lambda call: call.n_tokens - call.count,
    "entropy": lambda call: call.mean(call.entropy),
    "ratio/mean": lambda call: call.mean(call.ratio),
    "ratio/min": lambda call: call.or_one(-call.largest(-call.ratio, -torch.inf)),
    "ratio/max": lambda call: call.or_one(call.largest(call.ratio, -torch.inf)),
    # (sum r)^2 / (n sum r^2): the share of the tokens that the weights amount to.
    "ratio/ess": lambda call: (
        call.mean(call.ratio).square() / call.mean(call.ratio.square()).clamp(min=1e-30)
    ),
    "gradient_mass/mean": lambda call: call.mean(call.mass),
    "gradient_mass/max": lambda call: call.largest(call.mass, 0.0),
}
_CLIPPED = {
    "clip_ratio/low_mean": lambda call: call.mean(call.clipped[0]),
    "clip_ratio/high_mean": lambda call: call.mean(call.clipped[1]),
    "clip_ratio/region_mean": lambda call: call.mean(call.clipped[0] | call.clipped[1]),
}
_WITH_OLD = {"ratio/clamped_frac": lambda call: call.beyond_clamp(call.old_logp)}
_WITH_REF = {
    "kl": lambda call: call.mean(call.kl),
    "kl/clamped_frac": lambda call: call.beyond_clamp(call.ref_logp),
}
_WITH_SAMPLER = {
    "sampling/sampling_logp_difference/mean": lambda call: (
        call.sampler_gap.sum() / call.scored.sum().clamp(min=1)
    ),
    "sampling/sampling_logp_difference/max": lambda call: call.largest(call.sampler_gap, 0.0),
    "n_tokens_unscorable": lambda call: (call.measured & ~call.scored).sum().float(),
}
_METRICS: dict[str, Callable[[Measured], Tensor]] = (
    _ALWAYS | _CLIPPED | _WITH_OLD | _WITH_REF | _WITH_SAMPLER
)


def metric_names(
    config: LossConfig, *, has_old: bool, has_ref: bool, has_sampler: bool
) -> tuple[str, ...]:
    """What a call measures, which its data does not change."""
    return (
        *_ALWAYS,
        *(_CLIPPED if clips_ratio(config) else ()),
        *(_WITH_OLD if has_old else ()),
        *(_WITH_REF if has_ref else ()),
        *(_WITH_SAMPLER if has_sampler else ()),
    )


@torch.no_grad()
def loss_metrics(call: Measured) -> dict[str, Tensor]:
    """Means and extremes over the measured tokens, float32."""
    names = metric_names(
        call.config,
        has_old=call.old_logp is not None,
        has_ref=call.ref_logp is not None,
        has_sampler=call.sampler_logp is not None,
    )
    return {name: _METRICS[name](call) for name in names}
