"""OpenRLHF's `PolicyLoss` and `Actor.forward`, same arguments and results: log-probs and entropy
without logits, and a clip whose slopes are exact.

Shapes: `S` sequences, `L` padded length.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..loss_config import LossConfig
from ..model import hidden_states
from ..objective import bounds_of
from ..ops import linear_logprob
from .hosts import Exchange, float_mean, holders, host_module, trained_head
from .logprobs import loss_of_logprobs

TESTED = "0.11.2"
INSTALL = f"pip install 'openrlhf=={TESTED}'"
# OpenRLHF keeps the logarithms of its binary KL finite with it.
LEAST_PROBABILITY = 1e-6
_exchange = Exchange("openrlhf")
_forward: list[Callable[..., Any]] = []


class Correction(NamedTuple):
    """How much a token counts for a sampler that was not the policy."""

    weights: Tensor
    filtered: Tensor
    """Share of the tokens, or sequences, beyond the bounds."""
    kl: Tensor


class PolicyLoss(nn.Module):
    """`openrlhf.models.PolicyLoss`: ppo or gspo, dual clip, and the correction for the sampler."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        self.level = _choice("is_correction_level", is_correction_level, ("off", "token", "seq"))
        self.mode = _choice("is_correction_mode", is_correction_mode, ("mask", "clip"))
        gatings = ("ratio", "binary_kl", "tv")
        self.gating = _choice("is_correction_gating", is_correction_gating, gatings)
        self.low, self.high = is_correction_threshold
        self.gspo = _choice("policy_loss_type", policy_loss_type, ("ppo", "gspo")) == "gspo"
        if self.mode == "clip" and (self.level == "seq" or self.gating != "ratio"):
            raise ConfigError(
                "is_correction_mode = 'clip' bounds the ratio of a token: set "
                "is_correction_level = 'token' and is_correction_gating = 'ratio'"
            )
        if self.level != "off" and self.gating != "ratio" and self.low > 0:
            raise ConfigError(
                f"is_correction_gating = '{self.gating}' has no lower bound: set "
                f"is_correction_threshold = (0.0, {self.high})"
            )
        self.config = LossConfig(
            loss_type="gspo" if self.gspo else "dapo",
            aggregation="token_mean" if token_level_loss and not self.gspo else "sequence_mean",
            epsilon=clip_eps_low,
            epsilon_high=clip_eps_high,
            dual_clip=dual_clip,
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, clip ratio, KL to the old policy, KL of sampler and old policy, share filtered);
        the last two are None without a correction. All tensors [S, L]."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        mask = mask.bool()
        if self.level != "off" and rollout_log_probs is None:
            raise ConfigError(
                f"is_correction_level = '{self.level}' needs rollout_log_probs: pass them, or set "
                "it to 'off'"
            )
        old, correction = old_log_probs, None
        if self.level != "off":
            if self.gspo:
                old = rollout_log_probs
            else:
                correction = self._correction(old_log_probs, rollout_log_probs, mask)
        per_sequence = self.config.adds_up == "sequence_mean"
        whole = global_batch_size if per_sequence else batch_num_tokens
        counted = mask.any(-1) if per_sequence else mask
        loss, ratio = loss_of_logprobs(
            log_probs,
            advantages,
            mask,
            self.config,
            old_logprobs=old,
            correction=None if correction is None else correction.weights,
            denominator=counted.sum().clamp(min=1) if whole is None else whole / dp_size,
        )
        bounds = bounds_of(self.config)
        clipped = ratio.clamp(bounds.low, bounds.high) * advantages < ratio * advantages
        kl = float_mean((old_log_probs - log_probs).detach(), mask)
        extras = (None, None) if correction is None else (correction.kl, correction.filtered)
        return loss, float_mean(clipped, mask), kl, *extras

    def _correction(self, old: Tensor, sampler: Tensor, mask: Tensor) -> Correction:
        """Weights [S, L]: the token's ratio, 0 where its gate is beyond the bounds."""
        gap = torch.where(mask, old - sampler, 0.0).detach()
        ratio = gap.exp()
        gate = gap if self.gating == "ratio" else self._divergence(old, sampler)
        if self.level == "seq":
            live = mask.sum(-1, keepdim=True).clamp(min=1)
            gate = torch.where(mask, gate, 0.0).sum(-1, keepdim=True) / live
        gate = gate.exp() if self.gating == "ratio" else gate
        beyond = (gate < self.low) | (gate > self.high)
        clip = self.mode == "clip"
        weights = gate.clamp(self.low, self.high) if clip else ratio.masked_fill(beyond, 0.0)
        by_sequence = self.level == "seq"
        filtered = beyond.float().mean() if by_sequence else float_mean(beyond, mask)
        return Correction(weights, filtered, float_mean(-gap, mask))

    def _divergence(self, old: Tensor, sampler: Tensor) -> Tensor:
        """Of the two coins "this token or another one"."""
        p, q = (
            x.detach().exp().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY) for x in (sampler, old)
        )
        if self.gating == "tv":
            return (p - q).abs()
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


class ActorOutput(dict):
    """What OpenRLHF reads of a model's output: `output.entropy`, `output.get(...)`."""

    __getattr__ = dict.get


def actor_forward(
    self: nn.Module,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: Any = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **mm_inputs: Any,
) -> Any:
    """`Actor.forward`: log-probs of the actions, [S, length of action_mask], or of all tokens.

    Whoever asks for neither wants logits, and is given OpenRLHF's own forward.
    """
    if action_mask is None and not return_logprobs:
        if not _forward:
            raise ConfigError(
                "Actor.forward without action_mask or return_logprobs gives logits, "
                "which are not made here: set return_logprobs=True"
            )
        return _forward[0](
            self,
            sequences,
            action_mask,
            attention_mask,
            return_output,
            allgather_logits,
            return_logprobs,
            ring_attn_group,
            packed_seq_lens,
            return_entropy,
            **mm_inputs,
        )
    _check(self, mm_inputs)
    batch, length = sequences.shape
    if self.packing_samples:
        ring = host_module("openrlhf.models.ring_attn_utils", install=INSTALL)
        ids, positions, labels, pad, indices = ring.unpad_and_slice_tensor(
            sequences, attention_mask, ring_attn_group
        )
        seen = None
    else:
        ids, labels, seen = sequences, sequences.roll(-1, dims=1), attention_mask
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    layer = trained_head(self.model)
    hidden = hidden_states(self.model, ids, seen, positions)
    found = linear_logprob(
        hidden.to(layer.weight.dtype),
        layer.weight,
        labels,
        bias=layer.bias,
        temperature=getattr(self, "temperature", 1.0),
        softcap=layer.softcap,
        logit_scale=layer.logit_scale,
        return_entropy=return_entropy,
    )

    def whole(values: Tensor) -> Tensor:
        if self.packing_samples:
            values = ring.gather_and_pad_tensor(
                values, ring_attn_group, pad, indices, batch, length
            )
        return values[:, :-1]

    log_probs = whole(found.logprobs)
    if action_mask is not None:
        log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
    output = ActorOutput(entropy=whole(found.entropy)) if return_entropy else ActorOutput()
    return (log_probs, output) if return_output else log_probs


def _check(actor: nn.Module, mm_inputs: dict[str, Any]) -> None:
    if mm_inputs or getattr(actor, "is_vlm", False):
        raise ConfigError(
            "grpo-fast forwards text models in OpenRLHF: call unregister() for images"
        )
    if getattr(actor.model.config, "output_router_logits", False):
        raise ConfigError(
            "output_router_logits is set, and the routers' loss is not made here: set "
            "aux_loss_coef = 0, or call unregister()"
        )


def _choice(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: choose one of {', '.join(known)}")
    return value


def register() -> None:
    """Exchange `PolicyLoss` in every module that has it by now, and `Actor.forward`; call it in
    every worker process, before the actor is built. `unregister` puts both back."""
    models = host_module("openrlhf.models", install=INSTALL)
    found = holders("PolicyLoss", models.PolicyLoss)
    before = models.Actor.forward
    _exchange.apply(
        *((module, "PolicyLoss", PolicyLoss) for module in found),
        (models.Actor, "forward", actor_forward),
    )
    _forward.append(before)


def unregister() -> None:
    """OpenRLHF computes its own loss and log-probs again."""
    _exchange.undo()
    _forward.clear()
