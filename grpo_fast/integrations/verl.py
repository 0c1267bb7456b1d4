"""verl with this project's policy losses and fused head: `register()`, then
`policy_loss.loss_mode=grpo_fast` and `use_fused_kernels=True`.

Shapes: `S` sequences, `L` padded length, `T` packed tokens, `D` hidden, `V` vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..loss_config import LossConfig
from ..objective import bounds_of, dppo_kl, dppo_tv
from ..ops import linear_logprob
from ..presets import VERL_AGGREGATIONS, VERL_LOSS_TYPES, verl_denominators
from .hosts import Exchange, float_mean, host_module, trained_head, version_of
from .logprobs import loss_of_logprobs

TESTED = "0.9.1"
INSTALL = f"pip install 'verl=={TESTED}'"
# bypass_mode is verl's own way to call another loss.
MODES = tuple(mode for mode in VERL_LOSS_TYPES if mode != "bypass_mode")
NAMES = {"grpo_fast": "vanilla"} | {f"grpo_fast_{mode}": mode for mode in MODES}
# verl adds these to the policy loss itself.
ELSEWHERE = {"use_kl_loss": False, "entropy_coeff": 0}
_exchange = Exchange("verl")
_registered: list[str] = []

PolicyLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def policy_loss(mode: str, own: LossConfig | None = None) -> PolicyLoss:
    """A function for verl's registry: the loss that verl calls `mode`, or `own`, added up as
    loss_agg_mode says."""

    def grpo_fast_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        view = _options(config, mode, loss_agg_mode)
        loss_config = LossConfig.from_verl(view) if own is None else _adds_up(own, loss_agg_mode)
        mask = response_mask.bool()
        weights = rollout_is_weights
        if weights is not None and loss_config.loss_type == "gmpo":
            weights = _geometric_mean(weights, mask)
        loss, ratio = loss_of_logprobs(
            log_prob,
            advantages,
            mask,
            loss_config,
            old_logprobs=old_log_prob,
            correction=weights,
            **verl_denominators(view, mask),
        )
        if loss_config.loss_type in ("gpg", "reinforce"):
            return loss, {}
        with torch.no_grad():
            gap = old_log_prob - log_prob
            metrics = {"actor/ppo_kl": float_mean(gap, mask)}
            if loss_config.loss_type != "dro":
                upper, lower = _held(loss_config, ratio, -gap, log_prob, old_log_prob, advantages)
                metrics["actor/pg_clipfrac"] = float_mean(upper, mask)
                metrics["actor/pg_clipfrac_lower"] = float_mean(lower, mask)
        return loss, metrics

    return grpo_fast_loss


def _options(config: Any, mode: str, loss_agg_mode: str) -> dict[str, Any]:
    """verl's actor config as it would be for verl's own loss of that mode."""
    if not isinstance(config, Mapping):
        raise ConfigError("config is missing: verl passes actor_rollout_ref.actor to a policy loss")
    policy = dict(config.get("policy_loss") or {}) | {"loss_mode": mode}
    return dict(config) | ELSEWHERE | {"policy_loss": policy, "loss_agg_mode": loss_agg_mode}


def _adds_up(own: LossConfig, loss_agg_mode: str) -> LossConfig:
    if loss_agg_mode not in VERL_AGGREGATIONS:
        known = ", ".join(VERL_AGGREGATIONS)
        raise ConfigError(f"loss_agg_mode = {loss_agg_mode!r}: choose one of {known}")
    return replace(own, aggregation=VERL_AGGREGATIONS[loss_agg_mode])


def _geometric_mean(weights: Tensor, mask: Tensor) -> Tensor:
    """GMPO's ratio is a geometric mean over the sequence, and so is its weight."""
    logs = torch.where(mask, weights, 1.0).clamp(min=1e-10).log()
    mean = logs.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.exp().expand(mask.shape)


def _held(config, ratio, log_ratio, logp, old, advantages) -> tuple[Tensor, Tensor]:
    """Tokens that verl counts in pg_clipfrac and in pg_clipfrac_lower, [S, L] bool."""
    bounds, kind = bounds_of(config), config.loss_type
    nothing = torch.zeros_like(ratio, dtype=torch.bool)
    if kind in ("sapo", "vespo"):
        return nothing, nothing
    if kind == "gmpo":
        beyond = (log_ratio < -bounds.low) | (log_ratio > bounds.high)
        return beyond & (advantages > 0), beyond & (advantages < 0)
    if kind.startswith("dppo"):
        blocked = _blocked(kind, bounds, logp, old, advantages)
        return blocked, ~blocked & (ratio > bounds.cap)
    low, high = ratio < bounds.low, ratio > bounds.high
    if kind == "cispo":
        return low | high, nothing
    upper = (low & (advantages < 0)) | (high & (advantages > 0))
    reached = torch.where(upper, ratio.clamp(bounds.low, bounds.high), ratio)
    return upper, (advantages < 0) & (reached > bounds.dual_clip)


def _blocked(kind: str, bounds, logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Tokens beyond DPPO's trust region: those whose objective loses its slope."""
    # With weight 1 and a log-prob that is not 0, a loss of 0 is one that was blocked.
    tokens = SimpleNamespace(
        logprobs=logp,
        old_logprobs=old,
        log_ratio=logp - old,
        ratio=torch.ones_like(logp),
        advantages=torch.where(advantages > 0, 1.0, -1.0).to(logp.dtype),
    )
    function = dppo_tv if kind == "dppo_tv" else dppo_kl
    return function(tokens, bounds) == 0


class FusedLinearForPPO(nn.Module):
    """verl's module of this name: (hidden, vocab_weights, input_ids, temperature) to (log-probs,
    entropy), both differentiable, by `linear_logprob`; chunk_size and impl_backend change
    nothing."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [T, D] or [S, L, D]; the results, float32, are shaped like input_ids."""
        output = linear_logprob(
            hidden_states,
            vocab_weights,
            input_ids.long(),
            temperature=temperature,
            return_entropy=True,
        )
        return output.logprobs, output.entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The same for verl's backend `triton`, rows flat as there."""
    if reduction != "none" or dist_process_group is not None:
        raise ConfigError(
            "linear_cross_entropy of grpo-fast has reduction 'none' and no process group: call "
            "unregister() for Megatron"
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    return FusedLinearForPPO()(rows, weight, labels.reshape(-1), temperature)


def register(**losses: LossConfig) -> None:
    """Add `grpo_fast`, `grpo_fast_gspo`, ... to verl's policy losses and take over its fused head.

    losses: more names, each with any LossConfig, `register(my_vespo=LossConfig(...))`. Call it in
    every worker process, before the model is built.
    """
    version_of("verl", tested=TESTED)
    core = host_module("verl.trainer.ppo.core_algos", install=INSTALL)
    head = host_module("verl.utils.experimental.torch_functional", install=INSTALL)
    kernel = host_module("verl.utils.kernel.linear_cross_entropy", install=INSTALL)
    dense = host_module("verl.models.transformers.dense_common", install=INSTALL)
    functions = {name: policy_loss(mode) for name, mode in NAMES.items()}
    functions |= {name: policy_loss("vanilla", own) for name, own in losses.items()}
    taken = sorted(functions.keys() & core.POLICY_LOSS_REGISTRY.keys())
    if taken and not _exchange.before:
        raise ConfigError(f"verl has a policy loss {taken[0]} already: choose another name")
    _exchange.apply(
        (head, "FusedLinearForPPO", FusedLinearForPPO),
        (kernel, "linear_cross_entropy", linear_cross_entropy),
        *(
            (dense, name, _checked(getattr(dense, name)))
            for name in ("forward_with_torch_backend", "forward_with_triton_backend")
        ),
    )
    for name, function in functions.items():
        core.register_policy_loss(name)(function)
        _registered.append(name)


def unregister() -> None:
    """verl has its own head again, and our losses are gone from its registry."""
    if _exchange.before:
        core = host_module("verl.trainer.ppo.core_algos", install=INSTALL)
        while _registered:
            core.POLICY_LOSS_REGISTRY.pop(_registered.pop(), None)
    _exchange.undo()


def _checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """verl hands over `lm_head.weight`, which says nothing of an adapter: look at the model."""

    @functools.wraps(forward)
    def checked(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        trained_head(self)
        return forward(self, *arguments, **keywords)

    return checked
